"""`videollama3 batch --engine vllm` against transformers: the same answers and failures. Run by `make test-vllm`."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.vllm import cases
from tests.vllm.conftest import ENGINE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]


def rows(media):
    """Every case as a row, options of videos in rows, and rows that fail."""
    own = [{"id": name, "messages": cases.for_transformers(name, media)} for name in cases.CASES]
    clip = str(media["moving"])
    return [
        *own,
        {"id": "fps 2", "video": clip, "fps": 2},
        {"id": "at most 2 frames", "video": clip, "max_frames": 2},
        {"id": "window", "video": clip, "start_time": 1, "end_time": 3},
        {"id": "small", "video": clip, "max_visual_tokens": 20},
        {"id": "literal", "video": clip, "prompt": "What is <|video_pad|> or <image> or <|im_end|>?"},
        {"id": "broken", "video": "broken.mp4"},
        {"id": "absent", "video": "absent.mp4"},
    ]


@pytest.fixture(scope="module")
def answered(checkpoint, media, tmp_path_factory):
    """Results by engine and id."""
    folder = tmp_path_factory.mktemp("batch")
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(media)))
    options = {
        "vllm": ["--vllm-options", json.dumps({"max_model_len": 2048, "max_num_seqs": 16, "enforce_eager": True})]
    }
    return {engine: run(folder, engine, checkpoint, options.get(engine, [])) for engine in ("transformers", "vllm")}


def run(folder, engine, checkpoint, options):
    output = folder / f"{engine}.jsonl"
    command = [sys.executable, "-m", "videollama3", "batch", str(folder / "rows.jsonl"), "-o", str(output)]
    command += ["--model", str(checkpoint), "--dtype", "float32", "--engine", engine, "--prompt", "What happens?"]
    command += ["--max-new-tokens", str(cases.MAX_NEW_TOKENS), "--workers", "1", *options]
    done = subprocess.run(command, env=ENGINE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
    return {line["id"]: line for line in map(json.loads, output.read_text().splitlines())}


def test_the_results_are_those_of_transformers(answered):
    wanted, got = answered["transformers"], answered["vllm"]
    assert len(wanted) == len(cases.CASES) + 7
    assert wanted.keys() == got.keys()
    for name, line in wanted.items():
        for key in ("answer", "error", "num_visual_tokens", "num_new_tokens", "finished", "key"):
            assert got[name].get(key) == line.get(key), (name, key)
    assert {name for name, line in got.items() if "error" in line} == {"broken", "absent"}
    # Else equal answers would mean nothing.
    assert len({line["answer"] for line in got.values() if "answer" in line}) >= 10


def test_a_prompt_that_is_too_long_fails_alone(checkpoint, media, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"video": str(media[name]), "id": name}) + "\n" for name in ("moving", "still"))
    )
    options = [
        "--no-prune",
        "--vllm-options",
        json.dumps({"max_model_len": 320, "max_num_seqs": 16, "enforce_eager": True}),
    ]
    lines = run(tmp_path, "vllm", checkpoint, options)
    assert lines["moving"]["num_visual_tokens"] == 84
    assert "Expected a prompt of at most 319 tokens, got 351" in lines["still"]["error"]
