"""Reading chosen frames of a video file with PyAV.

A path or byte stream with sampling options enters; first a plan leaves (frame times, chosen frames, picture
size), then the chosen frames one by one as RGB. Which frames are chosen is left to `frame_sampling.py`, what
must be decoded for them to `frame_decoding.py`, resizing to `patches.py`.

Times come from demuxing alone. While decoding, every frame is checked against the plan; where seeking does not
give what the packets announced the file is decoded from its start, and where even that differs
`UnexpectedFrameError` asks for a plan made by decoding (`plan_video(..., by_decoding=True)`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from .frame_decoding import DecodingError, PacketTable, decode_spans, plan_spans
from .frame_sampling import FrameTimes, SampledFrames, sample_frames
from .frame_timing import times_by_decoding, times_by_demuxing
from .media_sources import Pixels
from .read_ahead import read_ahead
from .video_file import Deadline, ReadingLimits, decode_frames, first_frame, open_video

Progress = Callable[[int, int], None]
# Decoded frames waiting for conversion; a 4K frame is 12 MB.
_FRAMES_AHEAD = 2


class UnexpectedFrameError(RuntimeError):
    """Decoding gave other frames than the file's packets announced."""


@dataclasses.dataclass(frozen=True)
class VideoPlan:
    """What will be read of one video.

    Attributes:
        source: local path or seekable stream.
        name: how to call it in errors.
        times: presentation times of all its frames.
        sampled: the chosen ones.
        height: of a frame as shown (after rotation), in pixels.
        width: likewise.
        rotation: quarter turns counterclockwise that the container asks for.
        packets: all packets; None where `times` were learnt by decoding.
        limits: what reading may cost.
    """

    source: str | BinaryIO
    name: str
    times: FrameTimes
    sampled: SampledFrames
    height: int
    width: int
    rotation: int
    packets: PacketTable | None
    limits: ReadingLimits

    @property
    def by_decoding(self) -> bool:
        """Whether `times` were learnt by decoding."""
        return self.packets is None

    @property
    def duration_seconds(self) -> float:
        """From the start of the first frame to the end of the last."""
        return float((self.times.end - int(self.times.pts[0])) * self.times.time_base)


def plan_video(
    source: str | BinaryIO,
    *,
    name: str,
    fps: float,
    max_frames: int,
    start_time: float | None = None,
    end_time: float | None = None,
    by_decoding: bool = False,
    limits: ReadingLimits | None = None,
) -> VideoPlan:
    """Learns the frame times of a video and chooses frames; decodes its first frame only, for the size.

    Args:
        source: local path or seekable stream.
        name: how to call it in errors.
        fps: ticks per second.
        max_frames: at most so many frames.
        start_time: beginning of the window, seconds.
        end_time: end of the window, seconds.
        by_decoding: learn times by decoding everything instead of demuxing.
        limits: what reading may cost.

    Raises:
        ValueError: when the file is not a readable video or the options do not fit it.
        TimeoutError: when it takes longer than the limit.
    """
    limits = limits or ReadingLimits()
    deadline = Deadline(limits.max_seconds, name)
    with open_video(source, name=name, limits=limits) as (container, stream):
        # The authors count an animated gif's frames at 25 per second instead of reading their times.
        by_index = container.format.name == "gif"
        first = first_frame(container, stream, name=name, deadline=deadline)
        rotation = round(first.rotation / 90) % 4
        height, width = (first.height, first.width) if rotation % 2 == 0 else (first.width, first.height)
    packets: PacketTable | None = None
    known = None
    if not by_decoding:
        with open_video(source, name=name, limits=limits) as (container, stream):
            known = times_by_demuxing(container, stream, name=name, deadline=deadline)
    if known is not None:
        times, packets = known
    else:
        with open_video(source, name=name, limits=limits, whole_speed=True) as (container, stream):
            times = times_by_decoding(container, stream, name=name, deadline=deadline)
    if by_index:
        times = dataclasses.replace(times, average_rate=Fraction(25), video_start_us=0)
    try:
        sampled = sample_frames(
            times, fps=fps, max_frames=max_frames, start_time=start_time, end_time=end_time, by_index=by_index
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    plan = VideoPlan(source, name, times, sampled, height, width, rotation, packets, limits)
    if plan.duration_seconds > limits.max_duration_seconds:
        raise ValueError(
            f"Expected {name} of at most {limits.max_duration_seconds:g} seconds, got {plan.duration_seconds:.0f}."
        )
    return plan


def read_frames(plan: VideoPlan, progress: Progress | None = None) -> Iterator[Pixels]:
    """Decodes the chosen frames in order, each once, while the caller works on the one before.

    Args:
        plan: from `plan_video`; its source must not have changed.
        progress: called with (frames delivered, frames chosen) after each.

    Yields:
        uint8 (height, width, 3) RGB, 0..255, one per chosen frame; the same array again where the plan
        repeats a frame.

    Raises:
        UnexpectedFrameError: when decoded times differ from the plan's.
        ValueError: when the file breaks off.
        TimeoutError: when it takes longer than the limit.
    """
    total = len(plan.sampled.indices)
    decoded = read_ahead(_decode_chosen(plan), depth=_FRAMES_AHEAD)
    try:
        # One converter for all frames keeps its tables.
        converter = VideoReformatter()
        current, pixels = -1, None
        for delivered, wanted in enumerate(plan.sampled.indices.tolist(), start=1):
            if wanted != current or pixels is None:
                current, frame = next(decoded)
                pixels = _to_rgb(converter, frame, plan.rotation)
            yield pixels
            if progress is not None:
                progress(delivered, total)
    finally:
        decoded.close()  # type: ignore[attr-defined]


def _decode_chosen(plan: VideoPlan) -> Iterator[tuple[int, Any]]:
    """(index, frame) of every chosen frame, ascending, by seeking where that works."""
    wanted = np.unique(plan.sampled.indices)
    deadline = Deadline(plan.limits.max_seconds, plan.name)
    done = 0
    if plan.packets is not None:
        spans = plan_spans(plan.packets, plan.times.pts[wanted].tolist())
        try:
            with open_video(plan.source, name=plan.name, limits=plan.limits, whole_speed=True) as (container, stream):
                for frame in decode_spans(container, stream, plan.packets, spans):
                    deadline.check()
                    yield int(wanted[done]), frame
                    done += 1
            return
        except DecodingError:
            # The frames so far are right; the rest is decoded without skipping anything.
            pass
    yield from _decode_linearly(plan, wanted[done:], deadline)


def _decode_linearly(plan: VideoPlan, wanted: npt.NDArray[np.int64], deadline: Deadline) -> Iterator[tuple[int, Any]]:
    """(index, frame) of the wanted frames, decoding everything before them and checking every time."""
    remaining = iter(wanted.tolist())
    target = next(remaining, None)
    index = -1
    with open_video(plan.source, name=plan.name, limits=plan.limits, whole_speed=True) as (container, stream):
        for index, frame in enumerate(decode_frames(container, stream, name=plan.name, deadline=deadline)):
            if target is None:
                return
            if index >= len(plan.times.pts) or (not plan.by_decoding and frame.pts != plan.times.pts[index]):
                announced = plan.times.pts[index] if index < len(plan.times.pts) else "nothing"
                raise UnexpectedFrameError(
                    f"{plan.name}: frame {index} has time {frame.pts}, its packet said {announced}."
                )
            if index == target:
                yield index, frame
                target = next(remaining, None)
    if target is not None:
        raise UnexpectedFrameError(f"{plan.name}: frame {target} of {len(plan.times.pts)} could not be decoded.")


def _to_rgb(converter: Any, frame: Any, rotation: int) -> Pixels:
    pixels: Pixels = converter.reformat(frame, format="rgb24").to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, rotation)) if rotation else pixels
