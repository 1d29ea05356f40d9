"""docs/batch.md: every block runs; the fields it names are those of the output; the files it names exist."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.media import write_clip
from tests.snippets import fenced_blocks, run_blocks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")


def test_every_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.mp4", 100, 25)
    Image.linear_gradient("L").resize((70, 98)).save(tmp_path / "picture.png")
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "a.mp4", 50, 25)
    (tmp_path / "clips" / "b.mp4").write_bytes(b"no video")
    commands, rows = fenced_blocks(PAGE)
    # The rows first: the second command reads them.
    _, output = run_blocks([rows, commands], capsys)
    assert "answers.jsonl: 1 of 2 rows answered, 1 failed" in output
    assert "more.jsonl: 3 of 3 rows answered, 0 failed" in output
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    table = PAGE.split("| field | |", 1)[1].split("\n\n", 1)[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1] if row else "")}
    assert named == set().union(*lines)
    assert (tmp_path / "answers.jsonl.run.json").is_file()


@pytest.mark.parametrize("path", re.findall(r"`(?:python )?((?:tests|benchmarks|docs|src)/[\w./]*)`", PAGE))
def test_named_files_exist(path):
    assert (ROOT / path).exists()
