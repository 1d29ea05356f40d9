"""The command as a user runs it: a real process, real files."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.conftest import GOLDEN
from tests.media import numbered_picture, write_clip
from videollama3.cli import main


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("media") / "clip.mp4", 75, 25)


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "videollama3", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        timeout=200,
        check=False,
    )


def test_ask_without_a_model_says_who_answers(clip):
    result = run("ask", clip, "What?", "--max-new-tokens", 4, "--max-frames", 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("\n")
    assert "the demonstrator answers" in result.stderr
    assert "%|" not in result.stderr  # no progress bar in a pipe


def test_ask_an_official_checkpoint_about_several_media(clip, capsys):
    picture = GOLDEN / "media" / "img3_40x30.png"
    arguments = ["ask", clip, str(picture), "What?", "--model", str(GOLDEN / "ckpt"), "--max-new-tokens", "3"]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert first.err == ""
    assert main([*arguments, "--attn", "eager", "--dtype", "float32", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == first.out


def test_the_answer_is_that_of_generate(clip, processor, model, capsys):
    conversation = [{"role": "user", "content": [{"type": "video", "video": clip, "fps": 2}, "Which?"]}]
    inputs = processor(
        conversation=conversation, add_system_prompt=True, add_generation_prompt=True, return_tensors="pt"
    )
    new = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(new, skip_special_tokens=True)
    assert main(["ask", clip, "Which?", "--model", str(GOLDEN / "ckpt"), "--max-new-tokens", "5", "--fps", "2"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == expected.rstrip("\n")


def test_inspect_prints_tokens_and_draws_what_the_model_sees(tmp_path, capsys):
    pictures = [numbered_picture(1)] * 50 + [numbered_picture(2)] * 25
    path = write_clip(tmp_path / "still.mp4", 75, 25, pictures=pictures, options={"crf": "0", "preset": "ultrafast"})
    sheet = tmp_path / "sheet.png"
    assert main(["inspect", path, "-o", str(sheet)]) == 0
    out, err = capsys.readouterr()
    assert err == "No --model was given: sizes and tokens are those of the released models.\n"
    assert "3.00 s, 25 frames per second, 208 x 96" in out
    assert "sampled 3 frames, each 196 x 84 pixels = 21 visual tokens" in out
    lines = [line.split() for line in out.splitlines() if line.split()[0].isdigit()]
    assert [line[1:3] for line in lines] == [["0.0s", "24"], ["1.0s", "49"], ["2.0s", "74"]]
    kept = [int(line[3]) for line in lines]
    assert kept[0] == 21
    assert kept[1] == 1
    assert kept[2] > 1
    assert f"total: {sum(kept)} of 63 visual tokens kept" in out
    drawn = np.asarray(Image.open(sheet).convert("RGB"))
    # Two columns: the second frame repeats the first with all but its first token dimmed to a quarter.
    first = drawn[6 : 6 + 84, 6 : 6 + 196].astype(int)
    second = drawn[6 : 6 + 84, 6 + 202 : 6 + 202 + 196].astype(int)
    assert np.array_equal(first[:28, :28], second[:28, :28])
    assert np.array_equal((first[28:] * 0.25).astype(int), second[28:])


def test_inspect_says_beforehand_what_a_video_costs(clip, tmp_path, capsys, monkeypatch):
    from videollama3.processing import video_reading

    def refuse(*arguments, **options):
        raise AssertionError("a plan decodes nothing")

    monkeypatch.setattr(video_reading, "decode_spans", refuse)
    sheet = tmp_path / "sheet.png"
    assert main(["inspect", clip, "--plan", "--fps", "2", "--max-frames", "5", "-o", str(sheet)]) == 0
    assert capsys.readouterr().out == (
        f"{clip}: 5 frames, each 196 x 84 pixels after resizing\n"
        "patches for the vision encoder: 420\n"
        "visual tokens before pruning:   105\n"
        "pixel tensor as float32         0.9 MiB\n"
        "pixel tensor as uint8           0.2 MiB\n"
    )
    assert not sheet.exists()


def test_the_plan_keeps_a_token_budget(clip, capsys):
    assert main(["inspect", clip, "--plan", "--max-visual-tokens", "30"]) == 0
    planned = capsys.readouterr().out
    assert main(["inspect", clip, "--max-visual-tokens", "30"]) == 0
    seen = capsys.readouterr().out
    # 3 frames of 4 x 2 tokens: the largest grid of the clip's shape.
    assert "visual tokens before pruning:   24\n" in planned
    assert " of 24 visual tokens kept" in seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "no.mp4", "q"], "at an existing path, got 'no.mp4': no such file"),
        (["inspect", "no.mp4"], "at an existing path, got 'no.mp4': no such file"),
        (["inspect", "CLIP", "--fps", "nan"], "fps as a positive finite number"),
        (["inspect", "CLIP", "--max-frames", "0"], "max_frames as a positive integer, got 0"),
        (["inspect", "CLIP", "--start", "2", "--end", "1"], "start_time < end_time, got 2.0 and 1.0"),
        (["inspect", "CLIP", "--start", "9"], "a window inside the video, got start_time=9.0"),
        (["inspect", str(GOLDEN / "README.md")], "as a whole video file"),
        (["inspect", "CLIP", "--max-visual-tokens", "2"], "max_visual_tokens of at least 3"),
    ],
)
def test_failed_work_is_one_line_and_status_1(clip, capsys, arguments, message):
    assert main([clip if argument == "CLIP" else argument for argument in arguments]) == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if "the demonstrator answers" not in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"videollama3 {arguments[0]}: ")
    assert message in errors[0]


def test_debug_shows_the_traceback(capsys):
    assert main(["inspect", "no.mp4", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["ask"], ["ask", "only-one"], ["ask", "a", "b", "--max-new-tokens", "0"]])
def test_bad_usage_is_status_2(arguments):
    assert run(*arguments).returncode == 2


def test_an_output_that_cannot_be_written_leaves_nothing(clip, tmp_path, capsys):
    target = tmp_path / "missing" / "sheet.png"
    assert main(["inspect", clip, "-o", str(target)]) == 1
    assert not target.parent.exists()
    assert "No such file or directory" in capsys.readouterr().err


def test_inspect_takes_a_folder_with_a_processor_alone(clip, processor, tmp_path, capsys):
    processor.save_pretrained(tmp_path / "processor")
    assert main(["inspect", clip, "--plan", "--model", str(tmp_path / "processor")]) == 0
    (tmp_path / "empty").mkdir()
    assert main(["inspect", clip, "--plan", "--model", str(tmp_path / "empty")]) == 1
    assert "Expected --model as a checkpoint folder or a Hub id" in capsys.readouterr().err
