"""`videollama3 convert`: what it prints, and its one clear line for each failure."""

import shutil
import subprocess
import sys

import pytest

from videollama3.cli import main

from .twins import official, read_json, stored


def test_report(golden_folder, tmp_path, capsys):
    source, out = str(golden_folder / "ckpt"), str(tmp_path / "out")
    assert main(["convert", source, out, "--to", "native", "--max-shard-size", "500KB", "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        f"{source}: official layout -> native layout in {out}",
        "67 tensors, 1.0 MB in 2 weight file(s)",
        "head: own",
    ]
    assert lines[3].startswith("verified: logits differ by at most ")
    assert lines[3].endswith(" of the largest one")
    assert len(lines) == 4


def test_dtype_overwrite_and_notes(golden_folder, tmp_path, capsys):
    source = official(golden_folder, tmp_path / "source")
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").unlink()
    arguments = ["convert", str(source), str(tmp_path / "out"), "--to", "plugin"]
    assert main(arguments) == 0
    assert "note: no processor: the source has no complete set of tokenizer" in capsys.readouterr().out
    assert main([*arguments, "--dtype", "bfloat16"]) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        f"videollama3 convert: Expected '{tmp_path / 'out'}' to be absent or empty, it has files: choose another, or pass "
        "--overwrite to convert.\n"
    )
    assert main([*arguments, "--dtype", "bfloat16", "--overwrite"]) == 0
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


@pytest.mark.parametrize(
    "arguments", [[], ["a"], ["a", "b"], ["a", "b", "--to", "onnx"], ["a", "b", "--to", "plugin", "--dtype", "int4"]]
)
def test_bad_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["convert", *arguments])
    assert caught.value.code == 2
    assert "usage: videollama3 convert" in capsys.readouterr().err


def test_failures_are_one_line(golden_folder, tmp_path, capsys):
    source = official(
        golden_folder, tmp_path / "source", lambda weights: {**weights, "more": weights["lm_head.weight"][:1] + 0}
    )
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "plugin"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("; 1 without a place: more.\n")
    assert main(["convert", str(tmp_path / "absent"), str(tmp_path / "out"), "--to", "plugin"]) == 1
    assert "Expected a checkpoint folder or a Hub id such as owner/name, got" in capsys.readouterr().err


REMOTE = """
import sys
sys.modules["videollama3"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__module__.split(".")[0], type(processor).__name__)
"""


@pytest.mark.slow
def test_a_plugin_folder_loads_without_the_package(golden_folder, tmp_path, monkeypatch):
    shutil.copytree(golden_folder / "ckpt", tmp_path / "source")
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "out"), "--to", "plugin"]) == 0
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    result = subprocess.run(
        [sys.executable, "-c", REMOTE, str(tmp_path / "out")], capture_output=True, text=True, check=False, timeout=240
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["transformers_modules", "VideoLlama3Processor"]
    assert stored(tmp_path / "out")
