"""Times that never go back, whatever a source's clock does."""

from fractions import Fraction
from types import SimpleNamespace

import av.error
import pytest

from videollama3.streaming.capture import SourceClock

STREAM = SimpleNamespace(time_base=Fraction(1, 10), average_rate=Fraction(10), guessed_rate=None)


def frame(pts, dts=None):
    return SimpleNamespace(pts=pts, dts=dts, duration=1)


def times(clock, *values):
    """By frame; None for those left out."""
    frames = [frame(pts) for pts in values]
    found = {id(one): float(time) for one, time in clock.timed(frames, STREAM)}
    return [found.get(id(one)) for one in frames]


def test_times_of_a_believed_clock_are_its_own():
    clock = SourceClock(10)
    clock.opened(away_seconds=0, may_jump=False)
    assert times(clock, 3, 4, 4, 2, 900) == [0.3, 0.4, None, None, 90.0]
    assert clock.num_unordered == 2
    assert clock.end == Fraction(901, 10)


def test_a_clock_that_is_set_anew_goes_on_after_the_frame_before():
    clock = SourceClock(10)
    clock.opened(away_seconds=0, may_jump=True)
    # One wrong time far ahead, back again, and later the source's clock begins at zero.
    assert times(clock, 500, 501, 90000, 503, 504, 0, 1) == [50.0, 50.1, 50.2, 50.3, 50.4, 50.5, 50.6]
    assert clock.num_jumps == 1
    assert clock.num_unordered == 0


def test_one_damaged_time_leaves_out_no_frame_after_it():
    clock = SourceClock(10)
    clock.opened(away_seconds=0, may_jump=True)
    assert times(clock, 500, 501, 560, 503, 504) == [50.0, 50.1, 50.2, 50.3, 50.4]
    assert clock.num_jumps == clock.num_unordered == 0


def test_a_pause_of_the_source_keeps_its_times():
    clock = SourceClock(10)
    clock.opened(away_seconds=0, may_jump=True)
    assert times(clock, 500, 501, 560, 561, 590) == [50.0, 50.1, 56.0, 56.1, 59.0]
    assert clock.num_jumps == clock.num_unordered == 0


def test_frames_that_come_slowly_do_not_wait_for_the_next():
    clock = SourceClock(10)
    clock.opened(away_seconds=0, may_jump=True)
    read = []

    def slow():
        for pts in (0, 20, 40, 60):
            read.append(pts)
            yield frame(pts)

    # The first step alone is one that could be damage.
    assert [(one.pts, len(read)) for one, _ in clock.timed(slow(), STREAM)] == [(0, 1), (20, 3), (40, 3), (60, 4)]


def test_a_source_that_breaks_off_gives_the_frame_that_waited():
    clock = SourceClock(10)
    clock.opened(away_seconds=0, may_jump=True)

    def breaks_off():
        yield frame(500)
        yield frame(560)
        raise av.error.TimeoutError(110, "timed out")

    seen = []
    with pytest.raises(av.error.TimeoutError):
        seen.extend(float(time) for _, time in clock.timed(breaks_off(), STREAM))
    assert seen == [50.0, 56.0]


def test_a_clock_may_be_believed_all_the_same():
    clock = SourceClock(None)
    clock.opened(away_seconds=0, may_jump=True)
    assert times(clock, 500, 90000, 501) == [50.0, 9000.0, None]


def test_a_source_opened_again_goes_on_after_the_time_that_it_was_away():
    clock = SourceClock(10)
    clock.opened(away_seconds=0, may_jump=True)
    assert times(clock, 100, 101) == [10.0, 10.1]
    clock.opened(away_seconds=2.0, may_jump=True)
    assert times(clock, 30, 31) == [12.1, 12.2]
    clock.opened(away_seconds=0, may_jump=True)
    assert times(clock, 7) == [12.3]


def test_frames_without_a_time_follow_by_the_rate():
    clock = SourceClock(10)
    clock.opened(away_seconds=0, may_jump=False)
    assert times(clock, 5, None, None) == [0.5, 0.6, 0.7]
    assert [float(time) for _, time in clock.timed([frame(None, dts=9)], STREAM)] == [0.9]
