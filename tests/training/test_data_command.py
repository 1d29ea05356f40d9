"""`videollama3 data check` and `data show` as users run them."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import GOLDEN
from tests.media import numbered_picture, write_clip
from videollama3.cli import main
from videollama3.training.dataset_report import ModelSize, cost_picture, measure_cost


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two texts, a video that stands still after its first second, and an image; a bad row behind them."""
    folder = tmp_path_factory.mktemp("data")
    pictures = [numbered_picture(0)] * 25 + [numbered_picture(1)] * 75
    write_clip(folder / "a.mp4", 100, 25, pictures=pictures, options={"crf": "0", "preset": "ultrafast"})
    Image.fromarray(numbered_picture(3, 70, 84)).save(folder / "a.png")

    def qa(answer, **media):
        return {**media, "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": answer}]}

    good = [qa("one"), qa("second"), qa("3", video="a.mp4"), qa("4", image="a.png")]
    (folder / "good.json").write_text(json.dumps(good))
    (folder / "bad.json").write_text(
        json.dumps([*good, qa("", image="a.png"), qa("6", image="no.png"), qa("7", video="bad.json")])
    )
    return folder


def line(out, name):
    return next(text for text in out.splitlines() if text.startswith(name)).removeprefix(name).split()


def test_check_prints_the_budget_and_draws_it(rows, tmp_path, capsys):
    report = tmp_path / "report.png"
    assert main(["data", "check", str(rows / "good.json"), "-o", str(report)]) == 0
    captured = capsys.readouterr()
    assert "No --model was given" in captured.err
    out = captured.out
    assert "4 rows, 0 bad, 4 measured" in out
    assert "4 samples: 2 text, 1 video, 1 image" in out
    pruned = int(re.search(r"pruned: (\d+) of 84 tokens of videos", out)[1])
    # The third and the fourth frame keep one token of 21.
    assert 40 <= pruned < 60
    # "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n": 22 tokens beside answer and media.
    video = 22 + 1 + 4 * len("Time 0.0s:") + len(",,,\n") + 84 - pruned
    image = 22 + 1 + 30 + len("\n")
    assert line(out, "tokens")[0] == str(22 + len("one"))
    assert line(out, "tokens")[-1] == str(22 + len("one") + 22 + len("second") + video + image)
    assert line(out, "supervised tokens")[:4] == ["2", "3", "7", "7"]
    assert line(out, "frames and images")[-1] == "5"
    assert line(out, "patches")[-1] == str(4 * 84 + 30)
    assert line(out, "visual tokens")[-1] == str(84 + 30)
    assert line(out, "kept visual tokens")[-1] == str(84 + 30 - pruned)
    with Image.open(report) as picture:
        assert picture.size == (920, 780)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert (70, 110, 180) in colours


def test_check_lists_bad_rows_and_fails(rows, capsys):
    assert main(["data", "check", str(rows / "bad.json"), "--model", str(GOLDEN / "ckpt")]) == 1
    captured = capsys.readouterr()
    assert "7 rows, 3 bad, 4 measured" in captured.out
    errors = captured.err.splitlines()
    listed = [text for text in errors if text.startswith("bad.json row")]
    assert [text.split(":")[0] for text in listed] == ["bad.json row 4", "bad.json row 5", "bad.json row 6"]
    assert "an empty one" in listed[0]
    assert "no.png" in listed[1]
    assert "with a video stream" in listed[2]
    assert errors[-1] == "videollama3 data: Expected good rows only, got 3 bad of 7, listed above."


def test_check_measures_a_sample(rows, capsys):
    assert main(["data", "check", str(rows / "good.json"), "--sample", "2", "--media-root", str(rows)]) == 0
    out = capsys.readouterr().out
    assert "4 rows, 0 bad, 2 measured" in out
    assert "2 samples: 1 text, 1 video" in out


def test_limits_reach_the_dataset(rows, capsys):
    assert main(["data", "check", str(rows / "good.json"), "--max-length", "27"]) == 1
    err = capsys.readouterr().err
    assert "good.json row 1: Expected at most max_length=27 tokens after pruning, got 28" in err
    assert "got 3 bad of 4" in err


def test_rows_that_are_left_out_as_too_long_are_not_bad(rows, capsys):
    limits = ["--max-length", "27", "--overflow", "skip"]
    assert main(["data", "check", str(rows / "good.json"), *limits]) == 0
    captured = capsys.readouterr()
    assert "4 rows, 0 bad, 3 left out as too long, 1 measured" in captured.out
    assert "good.json row 1: Expected at most max_length=27 tokens" in captured.err
    assert main(["data", "show", str(rows / "good.json"), "--row", "1", *limits]) == 1
    assert "Expected a row that is trained on, got good.json row 1: Expected at most" in capsys.readouterr().err


def test_show_marks_what_is_learnt(rows, capsys):
    assert main(["data", "show", str(rows / "good.json"), "--row", "2", "--max-frames", "1", "--color", "never"]) == 0
    assert capsys.readouterr().out == (
        "<|im_start|>user\n"
        "Time 0.0s:<|video_pad|> x 21\n"
        "Q<|im_end|>\n"
        "<|im_start|>assistant\n"
        "[[3<|im_end|>]]\n"
        "\n"
        "message  role        tokens  visual  learnt\n"
        "      0  user            41      21       0\n"
        "      1  assistant       14       0       2\n"
        "  total                  55      21       2\n"
        "learnt tokens are in [[ ]]\n"
    )
    assert main(["data", "show", str(rows / "good.json"), "--row", "0", "--color", "always"]) == 0
    assert "<|im_start|>assistant\n\x1b[32mone<|im_end|>\x1b[0m\n" in capsys.readouterr().out
    assert main(["data", "show", str(rows / "good.json"), "--row", "0"]) == 0
    assert "\x1b" not in capsys.readouterr().out  # no terminal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "GOOD", "--row", "9"], "Expected --row from 0 to 3, got 9."),
        (["show", "BAD", "--row", "4"], "bad.json row 4: Expected an answer in message 1, got an empty one."),
        (["check", "no.json"], "Expected rows in 'no.json', got no such file."),
    ],
)
def test_failed_work_is_one_line_and_status_1(rows, capsys, arguments, message):
    places = {"GOOD": str(rows / "good.json"), "BAD": str(rows / "bad.json")}
    assert main(["data", *(places.get(argument, argument) for argument in arguments)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"videollama3 data: {message}"


def test_debug_shows_the_traceback(rows, capsys):
    assert main(["data", "check", "no.json", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_costs_by_hand():
    sample = {
        "input_ids": torch.zeros(40, dtype=torch.int64),
        "labels": torch.tensor([-100] * 35 + [1] * 5),
        "pixel_values": torch.zeros((12, 588), dtype=torch.uint8),
        "image_grid_thw": torch.tensor([[1, 3, 4]]),
        "image_merge_sizes": torch.tensor([1]),
        "pixel_values_videos": torch.zeros((3 * 24, 588), dtype=torch.uint8),
        "video_grid_thw": torch.tensor([[3, 4, 6]]),
        "video_merge_sizes": torch.tensor([2]),
        "video_compression_mask": torch.tensor([True] * 6 + [False] * 9 + [True] * 3),
    }
    cost = measure_cost(sample, "mixed")
    assert (cost.tokens, cost.supervised, cost.frames, cost.patches) == (40, 5, 4, 84)
    assert (cost.visual_tokens, cost.kept_tokens, cost.video_tokens) == (30, 21, 18)
    assert cost.pruned_share == 0.5
    assert cost.pixel_bytes == 84 * 588
    size = ModelSize(hidden_size=8, num_layers=3, vision_hidden_size=4, vision_num_layers=5, vocab_size=100)
    assert size.checkpoint_bytes(cost) == 2 * (40 * 8 * 3 + 84 * 4 * 5)
    assert size.logits_bytes(cost) == 2 * 4 * 5 * 100
    assert np.asarray(cost_picture([cost], size)).shape == (780, 920, 3)
