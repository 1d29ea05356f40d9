"""The command as a user runs it: real files, real processes, some of them killed."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.conftest import GOLDEN
from tests.media import numbered_picture, write_clip
from videollama3.cli import main

CHECKPOINT = str(GOLDEN / "ckpt")
NUM_CLIPS = 5


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Clips of several lengths, a picture, and a file that is no video."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(NUM_CLIPS):
        pictures = [numbered_picture(11 * i + k) for k in range(100)]
        write_clip(folder / f"{i}.mp4", 25 + 12 * i, pictures=pictures, options={"preset": "ultrafast"})
    (folder / "broken.mp4").write_bytes((folder / "1.mp4").read_bytes()[:700])
    picture = GOLDEN / "media" / "img3_40x30.png"
    (folder / "picture.png").write_bytes(picture.read_bytes())
    return folder


def batch(*arguments, workers=("--workers", "2")):
    return main(["batch", *map(str, arguments), "--model", CHECKPOINT, "--max-new-tokens", "6", *workers])


def results(path):
    """By index; none may stand twice."""
    lines = [json.loads(line) for line in Path(path).read_text(encoding="ascii").splitlines()]
    by_index = {line["index"]: line for line in lines}
    assert len(by_index) == len(lines)
    return [by_index[index] for index in sorted(by_index)]


def test_answers_are_those_of_ask(clips, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert batch(clips, "-o", output, "--prompt", "What?", "--fps", "2") == 0
    assert capsys.readouterr().out.startswith(f"{output}: 6 of 7 rows answered, 1 failed; 7 done now in ")
    answered = results(output)
    assert [line["id"] for line in answered] == sorted(os.listdir(clips))
    assert [line["index"] for line in answered if "error" in line] == [5]
    assert "Expected message 0, part 0 (video) as a whole video file" in answered[5]["error"]
    for line in answered:
        if "error" in line:
            assert "answer" not in line
            continue
        path = str(clips / line["id"])
        arguments = ["ask", path, "What?", "--model", CHECKPOINT, "--max-new-tokens", "6", "--fps", "2"]
        assert main(arguments) == 0
        assert line["answer"].rstrip("\n") == capsys.readouterr().out.rstrip("\n")
        assert line["prompt"] == "What?"
        assert line["num_new_tokens"] == 6 or line["finished"]
        assert line["num_visual_tokens"] > 0
        assert line["read_seconds"] > 0 < line["answer_seconds"]
    # Longer clips have more tokens: these are not the counts of another row.
    counts = [line["num_visual_tokens"] for line in answered[:NUM_CLIPS]]
    assert counts == sorted(counts) != [counts[0]] * NUM_CLIPS
    # One row at a time gives the same answers.
    alone = tmp_path / "alone.jsonl"
    assert batch(clips, "-o", alone, "--prompt", "What?", "--fps", "2", "--max-batch-rows", "1") == 0
    assert [line.get("answer") for line in results(alone)] == [line.get("answer") for line in answered]


def test_rows_of_their_own(clips, tmp_path, capsys):
    rows = [
        {"video": "4.mp4", "prompt": "First?", "start_time": 1, "id": "window"},
        {"media": ["picture.png", "1.mp4"], "prompt": "Both?"},
        {"messages": [{"role": "user", "content": "Only words."}]},
        {"video": "absent.mp4", "prompt": "Gone?"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "video", "path": "4.mp4"}, {"type": "text", "text": "Late?"}]}
            ]
        },
    ]
    path = clips / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        assert batch(path, "-o", tmp_path / "out.jsonl") == 0
    finally:
        path.unlink()
    window, both, words, absent, late = results(tmp_path / "out.jsonl")
    assert (window["id"], window["media"]) == ("window", ["4.mp4"])
    assert absent["error"].endswith("absent.mp4': no such file.")
    assert words["num_visual_tokens"] == 0
    assert window["num_visual_tokens"] < late["num_visual_tokens"]
    capsys.readouterr()
    for line, arguments in (
        (window, [clips / "4.mp4", "First?", "--start", "1"]),
        (both, [clips / "picture.png", clips / "1.mp4", "Both?"]),
        (late, [clips / "4.mp4", "Late?"]),
    ):
        assert main(["ask", *map(str, arguments), "--model", CHECKPOINT, "--max-new-tokens", "6"]) == 0
        assert line["answer"].rstrip("\n") == capsys.readouterr().out.rstrip("\n")


def test_failures_are_done_again_only_when_asked(clips, tmp_path, capsys):
    output, folder = tmp_path / "out.jsonl", tmp_path / "clips"
    folder.mkdir()
    for name in ("0.mp4", "1.mp4"):
        (folder / name).write_bytes((clips / name).read_bytes())
    good = (folder / "0.mp4").read_bytes()
    (folder / "0.mp4").write_bytes(good[:400])
    assert batch(folder, "-o", output, "--prompt", "What?") == 0
    (folder / "0.mp4").write_bytes(good)
    capsys.readouterr()
    assert batch(folder, "-o", output, "--prompt", "What?") == 0
    again = capsys.readouterr()
    assert "1 of 2 rows answered, 1 failed; 0 done now" in again.out
    assert again.err == f"{output}: 2 of 2 rows done before\n"
    assert batch(folder, "-o", output, "--prompt", "What?", "--retry-failed") == 0
    assert "2 of 2 rows answered, 0 failed; 1 done now" in capsys.readouterr().out
    assert [line["answer"] != "" for line in results(output)] == [True, True]


def test_where_everything_failed(tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    assert batch(tmp_path, "-o", tmp_path / "out.jsonl", "--prompt", "What?") == 1
    said = capsys.readouterr()
    assert "0 of 1 rows answered, 1 failed" in said.out
    assert "Expected an answer to at least one row, got 1 failures: see" in said.err
    assert len(results(tmp_path / "out.jsonl")) == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["FOLDER", "-o", "OUT"], 2, "arguments are required: --prompt (unless INPUT is a .jsonl file)"),
        (["FOLDER", "--prompt", "?"], 2, "arguments are required: -o"),
        (["FOLDER", "-o", "OUT", "--prompt", "?", "--overwrite", "--retry-failed"], 2, "not allowed with argument"),
        (["FOLDER", "-o", "OUT", "--prompt", "?", "--vllm-options", "{}"], 0, ""),
        (["FOLDER", "-o", "OUT", "--prompt", "?", "--vllm-options", "[1]"], 2, "expected a JSON object, got '[1]'"),
        (
            ["FOLDER", "-o", "OUT", "--prompt", "?", "--vllm-options", '{"a": 1}'],
            2,
            "--vllm-options needs --engine vllm",
        ),
        (["FOLDER", "-o", "OUT", "--prompt", "?", "--ray-actors", "2"], 2, "--ray-actors needs --ray"),
        (["FOLDER", "-o", "OUT", "--prompt", "?", "--ray", "local"], 2, "--workers is of no use with --ray"),
        (["nowhere", "-o", "OUT", "--prompt", "?"], 1, "a glob or a media file, got 'nowhere': nothing"),
        (
            ["FOLDER", "-o", "OUT", "--prompt", "?", "--max-visual-tokens", "0"],
            1,
            "row 0: Expected max_visual_tokens as a positive",
        ),
    ],
)
def test_usage(tmp_path, capsys, arguments, status, message):
    picture = GOLDEN / "media" / "img3_40x30.png"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(picture.read_bytes())
    places = {"FOLDER": str(tmp_path / "folder"), "OUT": str(tmp_path / "out.jsonl")}
    try:
        got = batch(*[places.get(argument, argument) for argument in arguments])
    except SystemExit as error:
        got = error.code
    assert got == status
    assert message in capsys.readouterr().err
    assert status == 0 or not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("engine", ["ray", "vllm"])
def test_what_is_not_installed_is_named(clips, tmp_path, capsys, monkeypatch, engine):
    monkeypatch.setitem(sys.modules, engine, None)
    options = ["--ray", "local"] if engine == "ray" else ["--engine", "vllm"]
    assert batch(clips, "-o", tmp_path / "out.jsonl", "--prompt", "?", *options, workers=()) == 1
    assert f"pip install 'videollama3[{engine}]'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- killed runs

NUM_ROWS = 30
NUM_KILLS = 3


def arguments(folder, output):
    options = ["--prompt", "What?", "--max-new-tokens", "48", "--max-batch-rows", "2", "--workers", "2"]
    return ["batch", str(folder), "-o", str(output), *options]


def command(folder, output):
    return [sys.executable, "-m", "videollama3", *arguments(folder, output)]


def num_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def session_members(session):
    """Processes that a run has started, and itself."""
    members = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split() if entry.name.isdecimal() else []
        except (FileNotFoundError, ProcessLookupError):
            continue
        # State, parent, group, session.
        if fields and int(fields[3]) == session and fields[0] != "Z":
            members.append(int(entry.name))
    return members


def wait_for_lines(process, path, count):
    while num_lines(path) < count:
        assert process.poll() is None, "ended before it was stopped"
        time.sleep(0.001)


def start_and_kill(folder, path, more_lines):
    """Starts a run and kills it, with SIGKILL and alone, when it has added so many lines."""
    before = num_lines(path)
    process = subprocess.Popen(
        command(folder, path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for_lines(process, path, before + more_lines)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return process.pid


@pytest.fixture(scope="module")
def many(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    names = sorted(path for path in clips.iterdir())
    for i in range(NUM_ROWS):
        (folder / f"{i:03d}{names[i % len(names)].suffix}").write_bytes(names[i % len(names)].read_bytes())
    return folder


@pytest.fixture(scope="module")
def expected(many, tmp_path_factory):
    """Results of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert main(arguments(many, output)) == 0
    return timeless(output)


def timeless(path):
    return [{k: v for k, v in line.items() if not k.endswith("_seconds")} for line in results(path)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds processes in /proc")
def test_a_run_that_is_killed_again_and_again_loses_and_repeats_nothing(many, expected, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    for number in range(NUM_KILLS):
        session = start_and_kill(many, output, 3)
        written = output.read_bytes()
        deadline = time.monotonic() + 120
        while session_members(session):
            assert time.monotonic() < deadline, "processes of a killed run are still there"
            time.sleep(0.1)
        # Nobody writes after the death of the run.
        assert output.read_bytes() == written
        if number % 2:
            # A line that was cut off, which a kill hits once in a long while.
            with output.open("ab") as file:
                file.write(b'{"index": 29, "id": "029.mp4", "ans')
    done_before = num_lines(output)
    assert 3 * NUM_KILLS <= done_before < NUM_ROWS
    capsys.readouterr()
    assert main(arguments(many, output)) == 0
    assert capsys.readouterr().err.startswith(f"{output}: {done_before} of {NUM_ROWS} rows done before\n")
    assert timeless(output) == expected
    assert [line["index"] for line in expected] == list(range(NUM_ROWS))
    assert sum("error" in line for line in expected) == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_interrupted_run_says_so_and_goes_on(many, expected, tmp_path):
    output = tmp_path / "out.jsonl"
    # Pytest in the background ignores Ctrl-C, and its children would.
    process = subprocess.Popen(
        command(many, output),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for_lines(process, output, 4)
    # As a terminal does: to the run and all its processes.
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert errors.endswith("interrupted\n")
    assert "Traceback" not in errors
    assert "row/s" not in errors  # no bar in a pipe
    assert main(arguments(many, output)) == 0
    assert timeless(output) == expected


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_progress_and_remaining_time_on_a_terminal(many, tmp_path):
    main_end, terminal = pty.openpty()
    # A terminal without a width shows no bar.
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with subprocess.Popen(command(many, tmp_path / "out.jsonl"), stdout=subprocess.PIPE, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                chunk = os.read(main_end, 65536)
            except OSError:
                # The terminal's other end is closed.
                break
            shown += chunk
    os.close(main_end)
    assert process.returncode == 0
    text = shown.decode()
    assert "answering:" in text
    # Rows, elapsed < remaining, and a rate.
    assert re.search(rf" \d+/{NUM_ROWS} \[\d\d:\d\d<\d\d:\d\d, +[\d.]+(row/s|s/row)\]", text), text[-2000:]
