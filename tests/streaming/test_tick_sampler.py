"""Pictures one at a time give what the rule for whole files gives."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videollama3.processing.frame_sampling import FrameTimes, sample_frames
from videollama3.streaming.tick_sampler import TickSampler, as_time


def run(pts, end, time_base, fps, origin=Fraction(0)):
    sampler = TickSampler(fps=fps, origin_seconds=origin)
    ticks = []
    for number, time in enumerate(pts):
        ticks += sampler.push(number, time * time_base)
    return ticks + sampler.finish(end * time_base)


@given(
    steps=st.lists(st.integers(1, 900), min_size=2, max_size=60),
    start=st.integers(0, 500),
    fps=st.sampled_from([0.5, 1, 2, 3, 7.5]),
    last=st.integers(1, 900),
)
@settings(max_examples=150, deadline=None)
def test_equals_the_rule_for_files(steps, start, fps, last):
    time_base = Fraction(1, 300)
    pts = np.cumsum([start, *steps])
    end = int(pts[-1]) + last
    times = FrameTimes(pts, end, time_base, 0, 0, Fraction(25))
    ticks = run(pts.tolist(), end, time_base, fps)
    if not ticks:
        # Not one tick is complete: the rule for files shows something anyway.
        assert end * time_base * Fraction(fps) < 1
        return
    expected = sample_frames(times, fps=fps, max_frames=10**6)
    assert [tick.picture for tick in ticks] == expected.indices.tolist()
    assert [tick.seconds for tick in ticks] == expected.timestamps.tolist()


def test_float_times_of_thirds_and_of_ntsc_are_what_was_meant():
    for period, rate in ((Fraction(1, 3), 3), (Fraction(1001, 30000), Fraction(30000, 1001))):
        sampler = TickSampler(fps=rate, origin_seconds=0)
        ticks = [tick for number in range(40) for tick in sampler.push(number, float(number * period))]
        assert [tick.picture for tick in ticks] == list(range(39))
        assert as_time(float(7 * period)) == 7 * period


def test_a_long_gap_is_left_out_when_asked_and_counted():
    sampler = TickSampler(fps=1, max_gap_seconds=5)
    assert sampler.push("a", 10.0) == []
    assert [tick.seconds for tick in sampler.push("b", 12.5)] == [10.0, 11.0]
    ticks = sampler.push("c", 100.0)
    assert [(tick.seconds, tick.picture) for tick in ticks] == [(12.0, "b")]
    assert sampler.skipped_ticks == 87
    assert [(tick.seconds, tick.picture) for tick in sampler.finish(101.2)] == [(100.0, "c")]


def test_a_gap_repeats_the_picture_by_default():
    sampler = TickSampler(fps=1)
    sampler.push("a", 0.0)
    assert [tick.picture for tick in sampler.push("b", 4.0)] == ["a"] * 4


def test_times_that_go_back_or_are_none_are_refused():
    sampler = TickSampler(fps=1, origin_seconds=2)
    with pytest.raises(ValueError, match="from 2 seconds on"):
        sampler.push("a", 1.0)
    sampler.push("a", 3.0)
    with pytest.raises(ValueError, match="later than the one before, at 3 seconds, got one at 3"):
        sampler.push("b", 3.0)
    with pytest.raises(ValueError, match="finite number, got nan"):
        sampler.push("b", float("nan"))


def test_state_goes_on_from_json():
    whole, first = TickSampler(fps=2), TickSampler(fps=2)
    for sampler in (whole, first):
        sampler.push("a", 0.25)
        sampler.push("b", 0.9)
    second = TickSampler.from_state(first.state(), first.picture)
    assert whole.push("c", 2.0) == second.push("c", 2.0)
    assert whole.finish(3.0) == second.finish(3.0)
