"""Fenced blocks of Markdown, run as a reader would: in order, in one folder, in one session."""

import json
import re
import shlex
from pathlib import Path

from videollama3.cli import main

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def fenced_blocks(markdown):
    """(language, code) of every block."""
    blocks = _BLOCK.findall(markdown)
    assert 2 * len(blocks) == markdown.count("```"), "a block without a language, or not closed"
    return blocks


def run_blocks(blocks, capsys):
    """Runs them; the output of each."""
    names, outputs = {}, []
    for language, code in blocks:
        _RUNNERS[language](code, names)
        outputs.append(capsys.readouterr().out)
    return outputs


def _run_python(code, names):
    code = re.sub(r"max_new_tokens=\d+", "max_new_tokens=4", code)
    exec(compile(code, "snippet", "exec"), names)


def _run_diff(code, names):
    """The new side of a comparison."""
    assert all(line[:1] in ("+", "-", " ", "") for line in code.splitlines())
    _run_python("\n".join(line[1:] for line in code.splitlines() if not line.startswith("-")), names)


def _run_bash(code, names):
    for line in code.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "videollama3", f"a shell snippet that is not ours: {line}"
        # Random weights answer at length.
        extra = ["--max-new-tokens", "4"] if arguments[0] == "ask" else []
        assert main([*arguments, *extra, "--debug"]) == 0, line


def _write_jsonl(code, names):
    """Rows of data, for the blocks that follow under the name that the pages use."""
    for line in code.splitlines():
        assert isinstance(json.loads(line), dict)
    Path("rows.jsonl").write_text(code, encoding="utf-8")


_RUNNERS = {"python": _run_python, "bash": _run_bash, "diff": _run_diff, "jsonl": _write_jsonl}
