"""docs/streaming.md: every block runs, in order; the files it names exist."""

import io
import re
import sys
from pathlib import Path

from tests.media import write_clip
from tests.snippets import fenced_blocks, run_blocks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "streaming.md").read_text(encoding="utf-8")


def test_every_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What?\n/state\n"))
    write_clip(tmp_path / "clip.mp4", 100, 25)
    blocks = fenced_blocks(PAGE)
    outputs = run_blocks(blocks, capsys)
    assert [language for language, _ in blocks] == ["bash", *["python"] * 4]
    # The demonstrator looks once a second.
    assert "num_frames: 4" in outputs[0]
    assert "num_frames=4" in outputs[1]
    assert "'user', 'assistant'" in outputs[2]
    assert "num_ticks=4" in outputs[4]
    assert (tmp_path / "session" / "session.json").is_file()


def test_named_files_exist():
    for path in re.findall(r"`((?:tests|benchmarks|docs|src)/[\w./]*)`", PAGE):
        assert (ROOT / path).exists(), path
