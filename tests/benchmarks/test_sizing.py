"""Sizing is arithmetic: checked by hand here, and the page shows what the script prints."""

import dataclasses
import importlib
import math
import sys

import pytest

from tests.benchmarks.test_models_and_gpu_run import BENCHMARKS

DOCS = BENCHMARKS.parent / "docs"


@pytest.fixture(scope="module")
def sizing():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("sizing")
    sys.path.remove(str(BENCHMARKS))


def test_the_page_shows_what_the_script_prints(sizing):
    page = (DOCS / "serving.md").read_text(encoding="utf-8")
    assert sizing.report(sizing.Inputs()) in page, "run python benchmarks/sizing.py and put what it prints there"


def test_figures_by_hand(sizing):
    small, large = sizing.both(sizing.Inputs(kept=1.0, answer=0)).values()
    # docs/memory.md: 28 layers x 2 x 4 heads x 128 x 2 bytes; the 2B has half the heads.
    assert (small.cache_per_token, large.cache_per_token) == (28_672, 57_344)
    # 60 frames of 264 tokens, four patches each; 220 tokens of text and 13 before each frame.
    assert (large.visual, large.patches) == (60 * 264, 60 * 264 * 4)
    assert large.tokens == 60 * 264 + 220 + 60 * 13
    assert large.weights == pytest.approx(15.23e9 + 0.86e9, rel=2e-3)
    # 1,000,000 / 86,400 clips a second at 3.67 seconds and 70 %.
    assert large.cores == small.cores == 61
    assert large.held == int((80e9 * 0.9 - large.weights - large.prefill_peak) // (large.tokens * 57_344))


def test_measured_costs_take_the_place_of_assumed_ones(sizing):
    inputs = sizing.Inputs(encoder_us=10.0, prefill_us=20.0, step_ms=64.0, batch=32, clips=86_400, load=1.0)
    _, large = sizing.both(inputs).values()
    assert large.encoder == pytest.approx(10e-6 * large.patches)
    assert large.prefill == pytest.approx(20e-6 * (large.tokens - inputs.answer))
    assert large.decode == pytest.approx(0.064 * 64 / 32)
    # One clip a second: as many cards as seconds of a card per clip.
    assert large.cards == math.ceil(large.clip_seconds)
    assert "| microseconds of the encoder per patch | 10.0 | given on the command line |" in sizing.report(inputs)
    assert "assumed" in sizing.report(inputs)


def test_less_pruning_costs_prefill_and_cache_only(sizing):
    half, whole = (sizing.both(dataclasses.replace(sizing.Inputs(), kept=kept))["7B"] for kept in (0.5, 1.0))
    assert whole.encoder == half.encoder
    assert whole.prefill > 1.8 * half.prefill
    assert whole.held < 0.6 * half.held


def test_a_card_that_is_too_small_is_said(sizing):
    with pytest.raises(ValueError, match=r"weights \(16\.1 GB\) and one request \(1\.9 GB\) in 14\.4 usable GB"):
        sizing.both(sizing.Inputs(memory_gb=16.0))


def test_the_command(sizing, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sizing.py", "--prefill-us", "30"])
    sizing.main()
    assert capsys.readouterr().out == sizing.report(sizing.Inputs(prefill_us=30.0)) + "\n"
