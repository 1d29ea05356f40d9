"""Reading chosen frames of a video file with PyAV.

A path or byte stream with sampling options enters; first a plan leaves (frame times, chosen frames, picture
size), then the chosen frames one by one as RGB. Which frames are chosen is left to `frame_sampling.py`, what
must be decoded for them to `frame_decoding.py`, resizing to `patches.py`.

Times come from demuxing alone. While decoding, every frame is checked against the plan; where seeking does not
give what the packets announced the file is decoded from its start, and where even that differs
`UnexpectedFrameError` asks for a plan made by decoding (`plan_video(..., by_decoding=True)`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Generator
from fractions import Fraction
from typing import Any, BinaryIO

import av.error
import numpy as np
import numpy.typing as npt
import torch.utils.data
from av.video.reformatter import VideoReformatter

from .frame_decoding import DecodingError, PacketTable, Span, decode_spans, plan_spans
from .frame_sampling import FrameTimes, SampledFrames, sample_frames
from .frame_timing import times_by_decoding, times_by_demuxing
from .media_sources import Pixels
from .read_ahead import ReadAhead
from .video_file import Deadline, ReadingLimits, check_pixels, decode_frames, first_frame, open_video

Progress = Callable[[int, int], None]
Prepare = Callable[[Pixels], Pixels]
# Decoded frames that wait for conversion, and pictures that wait for those of other decoders.
_FRAMES_AHEAD = 2
_BYTES_AHEAD = 96 * 2**20
_MAX_DECODERS = 8
# Of this process; see `limit_decoders`.
_decoder_limit = _MAX_DECODERS


def limit_decoders(count: int) -> None:
    """Lets this process decode a file with at most `count` decoders: for one of many that share a machine."""
    global _decoder_limit
    _decoder_limit = max(1, min(count, _MAX_DECODERS))


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
        with open_video(source, name=name, limits=limits) as (container, stream):
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


def read_frames(
    plan: VideoPlan, progress: Progress | None = None, prepare: Prepare | None = None
) -> Generator[Pixels, None, None]:
    """Decodes the chosen frames in order, each once, while the caller works on those before.

    Args:
        plan: from `plan_video`; its source must not have changed.
        progress: called with (frames delivered, frames chosen) after each.
        prepare: what to do with each picture first, for instance resizing it; may run in several threads.

    Yields:
        uint8 (height, width, 3) RGB, 0..255, one per chosen frame, or what `prepare` made of it; the same array
        again where the plan repeats a frame.

    Raises:
        UnexpectedFrameError: when decoded times differ from the plan's.
        ValueError: when the file breaks off.
        TimeoutError: when it takes longer than the limit.
    """
    total = len(plan.sampled.indices)
    with contextlib.closing(_read_chosen(plan, prepare or _as_it_is)) as pictures:
        current, pixels = -1, None
        for delivered, wanted in enumerate(plan.sampled.indices.tolist(), start=1):
            if wanted != current or pixels is None:
                current, pixels = wanted, next(pictures)
            yield pixels
            if progress is not None:
                progress(delivered, total)


def _as_it_is(picture: Pixels) -> Pixels:
    return picture


def _read_chosen(plan: VideoPlan, prepare: Prepare) -> Generator[Pixels, None, None]:
    """The picture of every chosen frame, ascending, by seeking where that works."""
    wanted = np.unique(plan.sampled.indices)
    deadline = Deadline(plan.limits.max_seconds, plan.name)
    done = 0
    if plan.packets is not None:
        try:
            with contextlib.closing(_read_by_seeking(plan, plan.packets, wanted, prepare, deadline)) as pictures:
                for picture in pictures:
                    yield picture
                    done += 1
            return
        except DecodingError:
            # The pictures so far are right; the rest is decoded without skipping anything.
            pass
    frames = ReadAhead(_decode_linearly(plan, wanted[done:], deadline), depth=_FRAMES_AHEAD)
    yield from _to_pictures(plan, frames, prepare)


def _read_by_seeking(
    plan: VideoPlan, packets: PacketTable, wanted: npt.NDArray[np.int64], prepare: Prepare, deadline: Deadline
) -> Generator[Pixels, None, None]:
    """The wanted pictures, spans of packets taking turns on as many decoders as there are processors.

    With two decoders, A reads spans 0, 2, 4 ... and B spans 1, 3, 5 ... of the same file.
    """
    spans = plan_spans(packets, plan.times.pts[wanted].tolist())
    count = min(_num_decoders(plan.source), len(spans))
    if count == 1:
        frames = ReadAhead(_decode_part(plan, packets, spans, deadline), depth=_FRAMES_AHEAD)
        yield from _to_pictures(plan, frames, prepare)
        return
    depth = max(1, _BYTES_AHEAD // (3 * plan.height * plan.width * count))
    with contextlib.ExitStack() as decoders:
        parts = []
        for i in range(count):
            pictures = _to_pictures(plan, _decode_part(plan, packets, spans[i::count], deadline), prepare)
            parts.append(decoders.enter_context(contextlib.closing(ReadAhead(pictures, depth=depth))))
        for number, span in enumerate(spans):
            yield from itertools.islice(parts[number % count], len(span.wanted))


def _decode_part(
    plan: VideoPlan, packets: PacketTable, spans: list[Span], deadline: Deadline
) -> Generator[Any, None, None]:
    with open_video(plan.source, name=plan.name, limits=plan.limits) as (container, stream):
        yield from decode_spans(container, stream, packets, spans, deadline=deadline)


def _num_decoders(source: str | BinaryIO) -> int:
    # Streams have one position, and the workers of a dataloader share the processors.
    if not isinstance(source, str) or torch.utils.data.get_worker_info() is not None:
        return 1
    return min(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _decoder_limit
    )


def _decode_linearly(plan: VideoPlan, wanted: npt.NDArray[np.int64], deadline: Deadline) -> Generator[Any, None, None]:
    """The wanted frames, decoding everything before them and checking every time."""
    remaining = iter(wanted.tolist())
    target = next(remaining, None)
    index = -1
    with open_video(plan.source, name=plan.name, limits=plan.limits) as (container, stream):
        for index, frame in enumerate(decode_frames(container, stream, name=plan.name, deadline=deadline)):
            if target is None:
                return
            if index >= len(plan.times.pts) or (not plan.by_decoding and frame.pts != plan.times.pts[index]):
                announced = plan.times.pts[index] if index < len(plan.times.pts) else "nothing"
                raise UnexpectedFrameError(
                    f"{plan.name}: frame {index} has time {frame.pts}, its packet said {announced}."
                )
            if index == target:
                yield frame
                target = next(remaining, None)
    if target is not None:
        raise UnexpectedFrameError(f"{plan.name}: frame {target} of {len(plan.times.pts)} could not be decoded.")


def _to_pictures(
    plan: VideoPlan, frames: Generator[Any, None, None] | ReadAhead[Any], prepare: Prepare
) -> Generator[Pixels, None, None]:
    # One converter for all frames keeps its tables.
    converter = VideoReformatter()
    with contextlib.closing(frames):
        for frame in frames:
            yield prepare(_to_rgb(converter, frame, plan))


def _to_rgb(converter: Any, frame: Any, plan: VideoPlan) -> Pixels:
    check_pixels(frame, name=plan.name, limits=plan.limits)
    try:
        pixels: Pixels = converter.reformat(frame, format="rgb24").to_ndarray()
    except av.error.FFmpegError as error:
        raise ValueError(
            f"Expected {plan.name} in colours that can be converted to RGB, but converting the frame at {frame.pts} "
            f"failed: {error.strerror}."
        ) from error
    return np.ascontiguousarray(np.rot90(pixels, plan.rotation)) if plan.rotation else pixels
