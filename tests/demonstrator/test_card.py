"""The card says what the reports say, and installing leaves out what a package does not need."""

import json

import pytest
from demonstrator.card import render_card
from demonstrator.install import FILES, install

REPORT = {
    "accuracy": {
        "video/color": {"percent": 99.5, "questions": 200},
        "one/direction": {"percent": 97.0, "questions": 100},
        "image/shape": {"percent": 96.0, "questions": 50},
    },
    "pruned_percent": 41.2,
    "same_without_pruning": {"percent": 98.7, "questions": 700},
    "same_without_pruning_by_question": {
        "one/color": {"percent": 100.0, "questions": 200},
        "one/shape": {"percent": 99.0, "questions": 200},
        "one/direction": {"percent": 97.5, "questions": 200},
    },
}


def test_figures_are_those_of_the_reports():
    card = render_card(REPORT, {"summary": {"missed": 3, "mean delay in seconds": None}})
    assert "| What color is the shape? | 99.5 % of 200 |" in card
    assert "| Which way does the shape move? |  | 97 % of 100 |" in card
    assert "| What shape is it? |  |  |  |  | 96 % of 50 |" in card
    assert "Pruning drops 41.2 % of the clips' visual tokens. Without it 98.7 % of 700 answers" in card
    assert "to the first four questions above, 100 %, 99 %, 97.5 %, -." in card
    assert "| missed | 3 |" in card
    assert "| mean delay in seconds | - |" in card
    assert "## Watching" not in render_card(REPORT, None)


def test_only_what_is_needed_is_installed(tmp_path):
    source, target = tmp_path / "stage4", tmp_path / "package"
    source.mkdir()
    target.mkdir()
    (target / "old.bin").write_bytes(b"old")
    for name in (*FILES, "modeling_videollama3.py", "training_args.bin"):
        settings = {"auto_map": {"AutoConfig": "x.Y"}, "video_processor": {"auto_map": {}, "fps": 2}}
        (source / name).write_text(json.dumps(settings))
    install(source, "card", target)
    assert sorted(path.name for path in target.iterdir()) == sorted([*FILES, "README.md"])
    assert "auto_map" not in (target / "config.json").read_text()
    assert json.loads((target / "processor_config.json").read_text())["video_processor"] == {"fps": 2}
    (source / "model.safetensors").write_bytes(bytes(16 * 2**20))
    with pytest.raises(ValueError, match="Expected at most 16777216 bytes"):
        install(source, "card", target)
