"""`videollama3 chat` and `watch` as a user runs them."""

import io
import sys

import pytest

from tests.conftest import GOLDEN
from tests.media import write_clip
from videollama3.cli import main
from videollama3.streaming import session as session_module

MODEL = ["--model", str(GOLDEN / "ckpt")]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("media") / "clip.mp4", 100, 25)


def chat(monkeypatch, capsys, clip, lines, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    status = main(["chat", clip, *MODEL, "--max-new-tokens", "4", *arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured


def ask(capsys, clip, question, *arguments):
    assert main(["ask", clip, question, *MODEL, "--max-new-tokens", "4", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--fps", "2", "--max-frames", "3"], ["--no-prune", "--no-system-prompt"]])
def test_the_first_answer_is_that_of_ask(clip, monkeypatch, capsys, arguments):
    expected = ask(capsys, clip, "What?", *arguments)
    assert chat(monkeypatch, capsys, clip, "What?\n", *arguments).out.rstrip("\n") == expected.rstrip("\n")


def test_commands_between_questions(clip, monkeypatch, capsys):
    once = chat(monkeypatch, capsys, clip, "What?\n").out
    said = chat(monkeypatch, capsys, clip, "\n/help\nWhat?\n/reset\nWhat?\n/frames\n/state\n/nope x\n/quit\nNever\n")
    assert said.out.count(once) == 2
    assert said.out.startswith("/frames  the frames held")
    rows = [line.split() for line in said.out.splitlines() if line.strip()[:1].isdigit()]
    assert [row[1] for row in rows] == ["0.0s", "1.0s", "2.0s", "3.0s"]
    assert "num_frames: 4\n" in said.out
    assert "there is no command /nope" in said.err
    assert "4 frames from 0.0 to 3.0 s" in said.err


def test_ctrl_c_breaks_off_the_answer_only(clip, monkeypatch, capsys):
    ask_session = session_module.StreamingSession.ask
    questions = []

    def interrupted(self, text, **options):
        questions.append(text)
        pieces = ask_session(self, text, **options)

        def broken():
            yield "half an ans"
            next(pieces)
            pieces.close()
            raise KeyboardInterrupt

        return broken() if len(questions) == 1 else pieces

    expected = chat(monkeypatch, capsys, clip, "What?\n").out
    monkeypatch.setattr(session_module.StreamingSession, "ask", interrupted)
    said = chat(monkeypatch, capsys, clip, "First?\nWhat?\n")
    assert said.out == f"half an ans\n{expected}"
    assert "broken off" in said.err
    assert questions == ["First?", "What?"]


def test_watch_prints_times_and_a_report(clip, capsys):
    arguments = ["watch", clip, "Tell me.", *MODEL, "--max-new-tokens", "2"]
    assert main([*arguments, "--threshold", "0", "--fps", "2", "--seconds", "3", "--drop"]) == 0
    said = capsys.readouterr()
    times = [line.split("]")[0] for line in said.out.splitlines() if line.startswith("[")]
    watched = int(said.err.split("watched ")[1].split()[0])
    assert times[0] in ("[0.0s", "[0.5s", "[1.0s")
    assert len(times) == watched <= 6
    assert main([*arguments, "--threshold", "1"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "watched 4 ticks\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "no.mp4"], "no.mp4': no such file"),
        (["chat", "picture.png"], "use videollama3 ask"),
        (["watch", "no.mp4", "x"], "no.mp4': no such file"),
        (["watch", "CLIP", "x", "--max-cache-tokens", "99999999"], "max_cache_tokens between 1 and"),
    ],
)
def test_failed_work_is_one_line_and_status_1(clip, capsys, arguments, message):
    assert main([clip if argument == "CLIP" else argument for argument in [*arguments, *MODEL]]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith(f"videollama3 {arguments[0]}: ")
    assert message in errors[-1]
