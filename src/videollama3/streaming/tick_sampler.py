"""The training rule of sampling, one frame at a time.

Pictures with their times enter as they come; the picture of each tick leaves as soon as the tick is over. Choosing
from a whole file, where all times are known, is left to `processing/frame_sampling.py`; both give the same frames.

At 1 tick per second and 4 frames per second:

    time    0    .25  .5   .75  1    1.25 1.5  1.75 2
    frame   a    b    c    d    e    f    g    h    i
    leaves                      d, labelled 0.0     h, labelled 1.0
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any, Generic, TypeVar

from ..processing.frame_sampling import as_rate

Picture = TypeVar("Picture")
# Times that come as floats are read as the fraction that was meant: 1/3 rather than 0.333333333333333314829616256.
_MAX_DENOMINATOR = 1_000_000


@dataclasses.dataclass(frozen=True)
class Tick(Generic[Picture]):
    """One tick whose picture is known.

    Attributes:
        number: counted from the start of the stream.
        seconds: its label, the time at which it begins.
        picture: the last one shown before its end.
    """

    number: int
    seconds: float
    picture: Picture


class TickSampler(Generic[Picture]):
    """Keeps the last picture of the tick that is running.

    Args:
        fps: ticks per second.
        origin_seconds: time at which tick 0 begins; that of the first picture by default.
        label_seconds: label of tick 0; `origin_seconds` by default (they differ in files whose sound begins first).
        max_gap_seconds: when nothing is shown for longer, the ticks in between are left out instead of repeating
            the picture before; None repeats, as the rule for files says.
    """

    def __init__(
        self,
        *,
        fps: float | Fraction = 1,
        origin_seconds: float | Fraction | None = None,
        label_seconds: float | Fraction | None = None,
        max_gap_seconds: float | None = None,
    ) -> None:
        self.rate = as_rate(fps)
        self.origin = None if origin_seconds is None else as_time(origin_seconds)
        self._label = None if label_seconds is None else as_time(label_seconds)
        self._max_gap = None if max_gap_seconds is None else as_time(max_gap_seconds)
        self._time: Fraction | None = None
        self._first_slot: int | None = None
        self._slot = 0
        self._next = 0
        self._picture: Any = None
        self.skipped_ticks = 0

    @property
    def time(self) -> Fraction | None:
        """When the picture that is shown was shown first."""
        return self._time

    def begin(self, origin_seconds: Fraction, label_seconds: Fraction) -> None:
        """Sets where tick 0 of a sampler that has seen nothing begins, and its label."""
        self.origin, self._label = origin_seconds, label_seconds

    def push(self, picture: Picture, timestamp_seconds: float | Fraction) -> list[Tick[Picture]]:
        """Takes the next picture.

        Args:
            picture: anything.
            timestamp_seconds: when it is shown; later than the picture before.

        Returns:
            The ticks that ended before it, usually none or one.

        Raises:
            ValueError: when its time is not after that of the picture before, or before the origin.
        """
        time = as_time(timestamp_seconds)
        if self._time is not None and time <= self._time:
            raise ValueError(
                f"Expected a frame later than the one before, at {float(self._time):g} seconds, got one at "
                f"{float(time):g}."
            )
        if self.origin is None:
            self.origin = time
        if time < self.origin:
            raise ValueError(
                f"Expected frames from {float(self.origin):g} seconds on (the origin), got one at {float(time):g}."
            )
        slot = math.floor((time - self.origin) * self.rate)
        if self._first_slot is None:
            self._first_slot = slot
        # Where the first picture comes late, the ticks before it show that of its own tick.
        ticks = self._until(slot, time) if slot > self._first_slot else []
        self._time, self._slot, self._picture = time, slot, picture
        return ticks

    def finish(self, end_seconds: float | Fraction) -> list[Tick[Picture]]:
        """Says when the last picture ends; returns the ticks that are complete by then."""
        if self.origin is None:
            return []
        end = as_time(end_seconds)
        return self._until(math.floor((end - self.origin) * self.rate), end)

    def _until(self, slot: int, now: Fraction) -> list[Tick[Picture]]:
        """Ticks from the next one to the one before `slot`, all with the picture that is shown."""
        if self._time is None:
            return []
        last = slot
        if self._max_gap is not None and now - self._time > self._max_gap:
            # The tick that was running is over; those after it showed nothing.
            last = min(slot, self._slot + 1)
        ticks = [Tick(number, self.label(number), self._picture) for number in range(self._next, last)]
        self.skipped_ticks += max(0, slot - max(last, self._next))
        self._next = max(self._next, slot)
        return ticks

    def label(self, number: int) -> float:
        """The label of a tick in seconds, in the arithmetic of the rule for files."""
        assert self.origin is not None
        start = float(self.origin if self._label is None else self._label)
        # numpy.arange's: its rounding shows in the labels' text.
        return start + number * ((start + 1 / float(self.rate)) - start)

    def state(self) -> dict[str, Any]:
        """Everything but the picture, as JSON can hold it."""
        return {
            "fps": str(self.rate),
            "origin": _text(self.origin),
            "label": _text(self._label),
            "max_gap": _text(self._max_gap),
            "time": _text(self._time),
            "first_slot": self._first_slot,
            "slot": self._slot,
            "next": self._next,
            "skipped_ticks": self.skipped_ticks,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], picture: Picture | None) -> TickSampler[Picture]:
        """The sampler that `state` was taken of, with the picture that it showed."""
        sampler = cls(fps=Fraction(state["fps"]))
        sampler.origin, sampler._label = _fraction(state["origin"]), _fraction(state["label"])
        sampler._max_gap, sampler._time = _fraction(state["max_gap"]), _fraction(state["time"])
        sampler._first_slot, sampler._slot, sampler._next = state["first_slot"], state["slot"], state["next"]
        sampler.skipped_ticks = state["skipped_ticks"]
        sampler._picture = picture
        return sampler

    @property
    def picture(self) -> Picture | None:
        """The picture that is shown now."""
        return self._picture


def as_time(seconds: float | Fraction) -> Fraction:
    """A time as an exact fraction of seconds.

    Raises:
        ValueError: when it is not a finite number.
    """
    if isinstance(seconds, Fraction):
        return seconds
    if isinstance(seconds, bool) or not math.isfinite(seconds):
        raise ValueError(f"Expected a time in seconds as a finite number, got {seconds!r}.")
    return Fraction(float(seconds)).limit_denominator(_MAX_DENOMINATOR)


def _text(value: Fraction | None) -> str | None:
    return None if value is None else str(value)


def _fraction(text: str | None) -> Fraction | None:
    return None if text is None else Fraction(text)
