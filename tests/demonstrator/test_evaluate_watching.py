"""What a model says while a clip runs is compared with what the clip shows."""

import json
import sys

import av
import numpy as np
import pytest
from demonstrator.build_model import build_model, build_processor
from demonstrator.evaluate_watching import Score, Watch, evaluate, main, make_watches, score, summarize
from demonstrator.make_tokenizer import make_tokenizer
from demonstrator.scenes import TICK_SECONDS

from demonstrator import evaluate_watching as evaluation
from videollama3.streaming import TimedMessage

APPEARS = Watch("a.mp4", "red circle", 2.0)
NEVER = Watch("b.mp4", "blue cross", None)


def said(*seconds, text="The red circle appears now."):
    return [TimedMessage(at, text, 0.9) for at in seconds]


@pytest.mark.parametrize(
    ("item", "messages", "expected"),
    [
        (APPEARS, said(2.0), Score(0.0, says_name=True, num_early=0, num_repeats=0)),
        (APPEARS, said(3.5), Score(1.5, says_name=True, num_early=0, num_repeats=0)),
        (APPEARS, said(0.5, 1.5, 2.5, 3.0, 3.5), Score(0.5, says_name=True, num_early=2, num_repeats=2)),
        (APPEARS, said(2.0, text="A Blue square."), Score(0.0, says_name=False, num_early=0, num_repeats=0)),
        (APPEARS, said(2.0, text="RED CIRCLE!"), Score(0.0, says_name=True, num_early=0, num_repeats=0)),
        (APPEARS, said(1.5), Score(None, says_name=False, num_early=1, num_repeats=0)),
        (APPEARS, [], Score(None, says_name=False, num_early=0, num_repeats=0)),
        (NEVER, said(0.0, 4.0), Score(None, says_name=False, num_early=2, num_repeats=0)),
        (NEVER, [], Score(None, says_name=False, num_early=0, num_repeats=0)),
    ],
)
def test_messages_are_scored(item, messages, expected):
    assert score(item, messages) == expected


def test_the_summary_counts_clips_and_messages():
    messages = [said(2.0), said(1.0, 1.5, 3.5, 4.0), [], said(3.0, 5.0), []]
    items = [APPEARS, APPEARS, APPEARS, NEVER, NEVER]
    assert summarize(items, list(map(score, items, messages))) == {
        "clips in which it appears": 3,
        "told": 2,
        "missed": 1,
        "mean delay in seconds": 0.75,
        "largest delay in seconds": 1.5,
        "told by name": 2,
        "messages before it appears": 2,
        "clips with one of these": 1,
        "messages repeated after it": 1,
        "clips in which it never appears": 2,
        "messages on these": 2,
        "of these with a message": 1,
    }
    assert summarize([NEVER], [score(NEVER, [])])["mean delay in seconds"] is None


def picture_at(path, seconds):
    """The last picture of the tick that begins at `seconds`."""
    with av.open(path) as container:
        shown = [frame for frame in container.decode(video=0) if frame.time < seconds + TICK_SECONDS - 1e-6]
    return shown[-1].to_ndarray(format="rgb24").astype(int)


def test_the_shape_is_first_seen_in_the_tick_that_is_named(tmp_path):
    watches = make_watches(tmp_path, num_clips=6)
    assert [watch.appears_seconds is None for watch in watches] == [False, True] * 3
    for watch in watches[::2]:
        before, after = (picture_at(watch.path, watch.appears_seconds - back) for back in (TICK_SECONDS, 0.0))
        # At least an eighth of the shorter side squared; noise and compression move pixels by less than 60.
        assert (np.abs(after - before).max(axis=2) > 60).sum() > 20, watch
    assert watches == make_watches(tmp_path, num_clips=6)


@pytest.fixture(scope="module")
def demonstrator():
    tokenizer = make_tokenizer(num_scenes=300)
    return build_model(tokenizer.get_vocab(), layers=1, vision_layers=1).eval(), build_processor(tokenizer)


def test_random_weights_watch_the_files(demonstrator, monkeypatch, tmp_path, capsys):
    """An untrained model that speaks after each tick is on time, and a false alarm before."""
    monkeypatch.setattr(evaluation, "MAX_NEW_TOKENS", 2)
    silent = evaluate(*demonstrator, num_clips=2, threshold=1.0)["summary"]
    assert silent["missed"] == 1
    assert silent["messages on these"] == silent["told"] == 0
    model, processor = demonstrator
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    report = tmp_path / "report.json"
    arguments = [str(tmp_path / "model"), "--clips", "2", "--threshold", "0", "-o", str(report)]
    monkeypatch.setattr(sys, "argv", ["evaluate_watching", *arguments])
    main()
    spoken = json.loads(report.read_text(encoding="utf-8"))
    assert spoken["summary"]["mean delay in seconds"] == 0
    assert spoken["summary"]["missed"] == 0
    appears, never = spoken["clips"]
    early = [message for message in appears["messages"] if message["seconds"] < appears["appears_seconds"]]
    assert spoken["summary"]["messages before it appears"] == len(early) == appears["appears_seconds"] / TICK_SECONDS
    assert spoken["summary"]["messages on these"] == len(never["messages"]) >= 3
    assert "mean delay in seconds" in capsys.readouterr().out
