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
from videollama3.random_checkpoint import build_random
from videollama3.training.dataset_report import cost_picture, measure_cost
from videollama3.training.step_memory import ModelSize, StepMemory


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
    size = ModelSize(
        hidden_size=8,
        intermediate_size=16,
        num_layers=3,
        vision_hidden_size=4,
        vision_intermediate_size=8,
        vision_num_layers=5,
        vocab_size=100,
    )
    assert np.asarray(cost_picture([cost], StepMemory(size))).shape == (780, 920, 3)


@pytest.fixture
def recipe(rows, tmp_path):
    """The good rows trained on, the bad ones held out, in rows of at most 200 tokens."""
    model, processor = build_random()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    settings = {
        "model": {"path": str(tmp_path / "model"), "prune": False},
        "data": {"train": [str(rows / "good.json")], "max_length": 200},
        "rates": {"projector": 1e-3, "llm": 1e-3},
        "batch": {"samples_per_update": 4},
        "output": {"folder": str(tmp_path / "out")},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    return tmp_path / "recipe.yaml", model


def test_check_of_a_recipe_reads_as_it_does_and_says_what_a_step_holds(rows, recipe, capsys):
    path, model = recipe
    assert main(["data", "check", str(path)]) == 0
    captured = capsys.readouterr()
    out = captured.out
    assert "No --model" not in captured.err
    assert "4 rows, 0 bad, 4 measured" in out
    assert "pruned: 0 of 84" in out
    tokens = int(line(out, "tokens")[-1])
    assert "packed: 2 rows of at most 200 tokens; an update of one process has 2" in out
    packed = out[out.index("per packed row") :]
    assert line(packed, "samples")[-1] == "4"
    assert line(packed, "tokens")[-1] == str(tokens)
    assert float(line(packed, "tokens")[3]) <= 200
    count = sum(weights.numel() for weights in model.parameters())
    trained = count - sum(weights.numel() for weights in model.model.vision_model.parameters())
    mib = [f"{times * number / 2**20:.0f}" for times, number in ((4, count), (4, trained), (8, trained))]
    assert "held all the time, MiB: weights {}, gradients {}, moments {}".format(*mib) in out
    assert "Moments are counted" not in out
    assert not (path.parent / "out").exists()

    # Settings behind it count, the rows held out are looked at too, and bad ones fail.
    muon = ["schedule.optimizer=muon"]
    held_out = f"data.eval=[{rows / 'bad.json'}]"
    assert main(["data", "check", str(path), "model.prune=true", "data.max_length=400", held_out, *muon]) == 1
    captured = capsys.readouterr()
    assert "Moments are counted as AdamW has them; those of muon may be fewer." in captured.out
    assert "packed: 1 rows of at most 400 tokens" in captured.out
    assert "pruned: 0 of 84" not in captured.out
    assert "held out: 7 rows, 3 bad, 4 measured" in captured.out
    assert captured.err.splitlines()[-1] == "videollama3 data: Expected good rows only, got 3 bad of 11, listed above."


def test_show_reads_a_recipes_rows_too(recipe, capsys):
    path, _ = recipe
    assert main(["data", "show", str(path), "data.max_frames=1", "--row", "2"]) == 0
    assert "Time 0.0s:<|video_pad|> x 21" in capsys.readouterr().out


def test_recipes_of_the_package_are_checked_by_name(rows, recipe, capsys):
    settings = [f"model.path={recipe[0].parent / 'model'}", f"data.train=[{rows / 'good.json'}]", "output.folder=none"]
    assert main(["data", "check", "stage4", *settings]) == 0
    out = capsys.readouterr().out
    # Images are merged 2 x 2 in stage 4, where this one takes 8 x 10 patches to have 16 tokens at least.
    assert line(out, "visual tokens")[-1] == str(84 + 20)
    assert "together with the largest step: about" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RECIPE", "--max-length", "9"], "(data.max_length=..., model.path=...), got --max-length."),
        (["RECIPE", "--model", "x"], "got --model."),
        (
            ["RECIPE", "data.streaming=true", "schedule.max_steps=1", "batch.gradient_accumulation_steps=1"],
            "has an end",
        ),
        (["RECIPE", "data.max_lenght=9"], "did you mean max_length"),
        (["RECIPE", "data.train=[a"], "Expected the value of data.train in YAML, got '[a'"),
        (["GOOD", "data.max_length=9"], "Expected KEY=VALUE behind a recipe only, got 'data.max_length=9' behind"),
    ],
)
def test_what_does_not_go_together_is_refused(rows, recipe, capsys, arguments, message):
    places = {"RECIPE": str(recipe[0]), "GOOD": str(rows / "good.json")}
    assert main(["data", "check", *(places.get(argument, argument) for argument in arguments)]) == 1
    assert message in capsys.readouterr().err
