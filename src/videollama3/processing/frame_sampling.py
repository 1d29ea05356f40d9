"""Which frames of a video the model sees, and with which timestamps.

The presentation times of a video's frames enter, indices of the chosen frames and their labels in seconds
leave; reading times and pixels from a file is left to `video_reading.py`.

The rule is the one the released weights were trained with: ffmpeg's `fps` filter with `round=down`. Time is
cut into ticks of 1 / fps; each complete tick shows the last frame before its end, labelled with its start.
At 25 frames per second and fps 1 these are frames 24, 49, 74 ... labelled 0.0, 1.0, 2.0 ...
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

_MICROSECONDS = 1_000_000
# A video whose container and stream state no frame rate is taken to have this one.
_FALLBACK_RATE = Fraction(25)
# Rates that a fraction with a moderate denominator holds exactly enough.
_MIN_RATE, _MAX_RATE = 1e-5, 1e6


@dataclasses.dataclass(frozen=True)
class FrameTimes:
    """Presentation times of the frames of one video.

    Attributes:
        pts: int64 (frames,), non-decreasing, in units of `time_base`.
        end: time at which the last frame ends, in units of `time_base`.
        time_base: seconds per unit.
        container_start_us: start of the container, audio included, in microseconds.
        video_start_us: start of the video stream, in microseconds.
        average_rate: frames per second.
    """

    pts: npt.NDArray[np.int64]
    end: int
    time_base: Fraction
    container_start_us: int
    video_start_us: int
    average_rate: Fraction

    @classmethod
    def regular(cls, num_frames: int, rate: float | Fraction) -> FrameTimes:
        """Times of `num_frames` frames at a constant rate, from zero."""
        exact = as_rate(rate)
        return cls(
            pts=np.arange(num_frames, dtype=np.int64),
            end=num_frames,
            time_base=1 / exact,
            container_start_us=0,
            video_start_us=0,
            average_rate=exact,
        )

    @property
    def frame_rate(self) -> Fraction:
        """The average rate, or a guess where the file states none."""
        return self.average_rate if self.average_rate > 0 else _FALLBACK_RATE

    @property
    def is_regular(self) -> bool:
        """Whether every frame lies within half a period of where a constant rate would put it."""
        period = float(1 / (self.frame_rate * self.time_base))
        expected = _to_ticks(self.video_start_us, self.time_base) + np.arange(len(self.pts)) * period
        return bool(np.all(np.abs(self.pts - expected) <= period / 2))


@dataclasses.dataclass(frozen=True)
class SampledFrames:
    """Chosen frames of one video.

    Attributes:
        indices: int64 (chosen,), position of each chosen frame in presentation order; a frame repeats where
            nothing new was shown during a tick.
        timestamps: float64 (chosen,), label of each chosen frame in seconds.
    """

    indices: npt.NDArray[np.int64]
    timestamps: npt.NDArray[np.float64]

    def between(self, start: float | None, end: float | None) -> SampledFrames:
        """Only the frames with `start <= label <= end`."""
        keep = np.ones(len(self.indices), dtype=bool)
        if start is not None:
            keep &= self.timestamps >= start
        if end is not None:
            keep &= self.timestamps <= end
        return SampledFrames(self.indices[keep], self.timestamps[keep])

    def only(self, position: int) -> SampledFrames:
        """The one frame at a position."""
        return SampledFrames(self.indices[[position]], self.timestamps[[position]])


def as_rate(fps: float | Fraction) -> Fraction:
    """A frame rate as an exact fraction, as ffmpeg reads it.

    Raises:
        ValueError: when it is not a positive finite number of a sensible size.
    """
    if not _is_number(fps):
        raise ValueError(f"Expected fps as a positive number (frames per second), got {fps!r}.")
    if not math.isfinite(fps) or fps <= 0:
        raise ValueError(f"Expected fps as a positive finite number (frames per second), got {fps}.")
    if not _MIN_RATE <= fps <= _MAX_RATE:
        raise ValueError(f"Expected fps between {_MIN_RATE:g} and {_MAX_RATE:g} frames per second, got {fps}.")
    return Fraction(fps if isinstance(fps, Fraction) else float(fps)).limit_denominator(1_001_000)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, Fraction, np.integer, np.floating)) and not isinstance(value, bool)


def check_window(start_time: float | None, end_time: float | None) -> None:
    """Raises ValueError unless 0 <= start_time < end_time, as far as they are given."""
    for name, value in (("start_time", start_time), ("end_time", end_time)):
        if value is not None and not (_is_number(value) and math.isfinite(value) and value >= 0):
            raise ValueError(f"Expected {name} in seconds, zero or more, got {value!r}.")
    if start_time is not None and end_time is not None and start_time >= end_time:
        raise ValueError(f"Expected start_time < end_time, got {start_time} and {end_time} (seconds).")


def check_max_frames(max_frames: int) -> None:
    """Raises ValueError unless max_frames is a positive integer."""
    if isinstance(max_frames, bool) or not isinstance(max_frames, (int, np.integer)) or max_frames < 1:
        raise ValueError(f"Expected max_frames as a positive integer, got {max_frames!r}.")


def sample_frames(
    times: FrameTimes,
    *,
    fps: float,
    max_frames: int,
    start_time: float | None = None,
    end_time: float | None = None,
    by_index: bool = False,
) -> SampledFrames:
    """Chooses frames by the training rule.

    Args:
        times: presentation times of all frames.
        fps: ticks per second.
        max_frames: at most so many frames, spread evenly over the ticks when there are more.
        start_time: beginning of the window, seconds.
        end_time: end of the window, seconds.
        by_index: count frames instead of reading their times; the authors' rule for an animated gif, a
            folder of pictures, and windows of less than a second.

    Returns:
        At least one frame. A window without a complete tick, which the authors' rule leaves empty, yields
        frames by index.

    Raises:
        ValueError: for options out of range, and when the window holds no frame.
    """
    rate = as_rate(fps)
    check_max_frames(max_frames)
    check_window(start_time, end_time)
    if len(times.pts) == 0:
        raise ValueError("Expected a video with at least one frame, got none.")
    if by_index:
        return _sample_by_index(times, rate, max_frames, start_time, end_time)
    if start_time is not None and end_time is not None and end_time - start_time < 1:
        return _sample_short_window(times, rate, max_frames, start_time, end_time)
    kept, rel, end_rel, label_start = _trim(times, start_time, end_time)
    num_ticks = _tick(end_rel, times.time_base, rate)
    if num_ticks < 1:
        return _middle_frames(times, kept, 1, label_start)
    slots = _ticks(rel, times.time_base, rate)
    # Ticks count from the start of the window, or of the container: a video that begins later than its
    # container (audio first) shows the picture of its first tick in the ticks before.
    ticks = _evenly(num_ticks, max_frames)
    indices = kept[np.searchsorted(slots, np.maximum(ticks, slots[0]), side="right") - 1]
    # The authors' arithmetic (numpy.arange), whose rounding shows in the labels' text.
    step = (label_start + 1 / float(rate)) - label_start
    return SampledFrames(indices, label_start + ticks.astype(np.float64) * step)


def _trim(
    times: FrameTimes, start_time: float | None, end_time: float | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int, float]:
    """Frames inside the window: indices, times relative to the window, its end, label of its start.

    The authors also end a window at the container's duration, which some containers count from the start of
    the video and others from zero; we end it with the last frame.
    """
    if start_time is None and end_time is None:
        rel = times.pts - _to_ticks(times.container_start_us, times.time_base)
        end_rel = times.end - _to_ticks(times.container_start_us, times.time_base)
        return np.arange(len(rel)), rel, end_rel, _seconds(times.video_start_us)
    start = times.video_start_us if start_time is None else round(start_time * _MICROSECONDS)
    begin = max(times.video_start_us, start)
    offset = _to_ticks(begin, times.time_base)
    rel = times.pts - offset
    last_rel = times.end - offset
    length = last_rel if end_time is None else _to_ticks(round(end_time * _MICROSECONDS) - begin, times.time_base)
    if length <= 0 or last_rel <= 0:
        raise _outside(times, start_time, end_time)
    first = int(np.searchsorted(rel, 0, side="left"))
    if first == len(rel) or rel[first] >= length:
        # Nothing new is shown inside the window: the frame before is still on the screen.
        if first == 0:
            raise _outside(times, start_time, end_time)
        return np.array([first - 1]), np.zeros(1, dtype=np.int64), min(length, last_rel), _seconds(begin)
    last = len(rel) if end_time is None else int(np.searchsorted(rel, rel[first] + length, side="left"))
    end_rel = int(rel[last]) if last < len(rel) else last_rel
    return np.arange(first, last), rel[first:last], end_rel, _seconds(begin)


def _outside(times: FrameTimes, start_time: float | None, end_time: float | None) -> ValueError:
    return ValueError(
        f"Expected a window inside the video, got start_time={start_time}, end_time={end_time} for frames "
        f"from {float(times.pts[0] * times.time_base):.3f} to {float(times.end * times.time_base):.3f} seconds."
    )


def _sample_short_window(
    times: FrameTimes, rate: Fraction, max_frames: int, start_time: float, end_time: float
) -> SampledFrames:
    """A window of less than a second: the authors' count of frames, where counting tells the time."""
    if times.is_regular:
        return _sample_by_index(times, rate, max_frames, start_time, end_time)
    kept, _, _, label_start = _trim(times, start_time, end_time)
    num_ticks = math.floor((end_time - start_time) * rate)
    return _middle_frames(times, kept, min(num_ticks, max_frames), label_start)


def _sample_by_index(
    times: FrameTimes, rate: Fraction, max_frames: int, start_time: float | None, end_time: float | None
) -> SampledFrames:
    """The authors' rule for sources that are counted instead of timed."""
    frame_rate = times.frame_rate
    origin = _seconds(times.video_start_us)
    num_frames = len(times.pts)
    end = origin + float(num_frames / frame_rate)
    if (start_time is not None and start_time >= end) or (end_time is not None and end_time <= origin):
        raise ValueError(
            f"Expected a window inside the video, got start_time={start_time}, end_time={end_time} for "
            f"{num_frames} frames at {float(frame_rate):g} per second, from {origin:.3f} to {end:.3f} seconds."
        )
    first, last = 0, num_frames - 1
    # As with the authors, both ends move the grid, and one end only drops frames.
    if start_time is not None and end_time is not None:
        first = max(int((start_time - origin) * frame_rate) - 1, 0)
        last = max(min(int((end_time - origin) * frame_rate) - 1, num_frames - 1), first)
        return _spread(np.arange(first, last + 1), frame_rate, rate, max_frames, origin)
    sampled = _spread(np.arange(num_frames), frame_rate, rate, max_frames, origin)
    inside = sampled.between(start_time, end_time)
    # A window between two labels still shows something: the label nearest to it.
    return inside if len(inside.indices) else sampled.only(-1 if start_time is not None else 0)


def _middle_frames(times: FrameTimes, kept: npt.NDArray[np.int64], count: int, label_start: float) -> SampledFrames:
    """The frames in the middle of `count` equal parts of a window, at least one, labelled with their times."""
    count = min(max(count, 1), len(kept))
    pick = (2 * np.arange(count) + 1) * len(kept) // (2 * count)
    shown = times.pts[kept[pick]].astype(np.float64) * float(times.time_base)
    return SampledFrames(kept[pick], np.maximum(shown, label_start))


def _spread(
    candidates: npt.NDArray[np.int64], frame_rate: Fraction, rate: Fraction, max_frames: int, origin: float
) -> SampledFrames:
    length = len(candidates)
    if length / frame_rate < max_frames:
        segment = max(1, min(frame_rate // rate, length))
        indices = candidates[np.arange(segment // 2, length, segment)]
    else:
        indices = candidates[np.linspace(0, length - 1, max_frames, dtype=np.int64)]
    indices = indices[_evenly(len(indices), max_frames)]
    return SampledFrames(indices, origin + indices / float(frame_rate))


def _evenly(count: int, limit: int) -> npt.NDArray[np.int64]:
    """All of `count` positions, or `limit` of them spread evenly."""
    if count <= limit:
        return np.arange(count, dtype=np.int64)
    return np.linspace(0, count - 1, limit, dtype=np.int64)


def _ticks(rel: npt.NDArray[np.int64], time_base: Fraction, rate: Fraction) -> npt.NDArray[np.int64]:
    factor = time_base * rate
    # Python integers where int64 products could overflow.
    if len(rel) and max(abs(int(rel[0])), abs(int(rel[-1]))) * factor.numerator >= 2**62:
        return np.array([_tick(int(value), time_base, rate) for value in rel], dtype=np.int64)
    return rel * factor.numerator // factor.denominator


def _tick(rel: int, time_base: Fraction, rate: Fraction) -> int:
    return math.floor(rel * time_base * rate)


def _to_ticks(microseconds: int, time_base: Fraction) -> int:
    """Microseconds in units of `time_base`, rounded half away from zero as ffmpeg does."""
    exact = Fraction(microseconds, _MICROSECONDS) / time_base
    rounded = math.floor(abs(exact) + Fraction(1, 2))
    return rounded if exact >= 0 else -rounded


def _seconds(microseconds: int) -> float:
    return microseconds / _MICROSECONDS
