"""The README's Python snippets, run as they are on a checkpoint in the authors' layout."""

import re
from pathlib import Path

import pytest

from tests.conftest import GOLDEN
from tests.media import write_clip

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.mp4", 200, 25)
    (tmp_path / "picture.png").write_bytes((GOLDEN / "media" / "img3_40x30.png").read_bytes())
    code = SNIPPETS[number].replace("DAMO-NLP-SG/VideoLLaMA3-2B", str(GOLDEN / "ckpt"))
    code = re.sub(r"max_new_tokens=\d+", "max_new_tokens=4", code)
    exec(compile(code, f"README.md snippet {number}", "exec"), {"model_path": str(GOLDEN / "ckpt")})
    assert capsys.readouterr().out


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2
