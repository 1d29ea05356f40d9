"""Reading chosen frames of a video file with PyAV.

A path or byte stream with sampling options enters; first a plan leaves (frame times, chosen frames, picture
size), then the chosen frames one by one as RGB. Which frames are chosen is left to `frame_sampling.py`,
resizing to `patches.py`.

Times come from demuxing alone, which costs a small part of decoding; while decoding, every frame's time is
compared with the plan, and where a file's packets do not tell the truth `UnexpectedFrameError` asks for a
plan made by decoding (`plan_video(..., by_decoding=True)`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, BinaryIO

import av
import av.error
import av.stream
import numpy as np
import numpy.typing as npt

from .frame_sampling import FrameTimes, SampledFrames, sample_frames
from .media_sources import Pixels, describe

Progress = Callable[[int, int], None]
# Demuxers that draw any text file as a video, chosen by a file name's ending.
_TEXT_FORMATS = frozenset({"tty", "bin", "xbin", "adf", "idf"})


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
        by_decoding: whether `times` were learnt by decoding.
    """

    source: str | BinaryIO
    name: str
    times: FrameTimes
    sampled: SampledFrames
    height: int
    width: int
    rotation: int
    by_decoding: bool

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
) -> VideoPlan:
    """Learns the frame times of a video and chooses frames.

    Args:
        source: local path or seekable stream.
        name: how to call it in errors.
        fps: ticks per second.
        max_frames: at most so many frames.
        start_time: beginning of the window, seconds.
        end_time: end of the window, seconds.
        by_decoding: learn times by decoding everything instead of demuxing.

    Raises:
        ValueError: when the file is not a readable video or the options do not fit it.
    """
    with _open(source, name) as (container, stream):
        # The authors count an animated gif's frames at 25 per second instead of reading their times.
        by_index = container.format.name == "gif"
        first = _first_frame(container, stream, name)
        rotation = round(first.rotation / 90) % 4
        height, width = (first.height, first.width) if rotation % 2 == 0 else (first.width, first.height)
    times = None
    if not by_decoding:
        times = _times_by_demuxing(source, name)
    if times is None:
        by_decoding = True
        times = _times_by_decoding(source, name)
    if by_index:
        times = dataclasses.replace(times, average_rate=Fraction(25), video_start_us=0)
    try:
        sampled = sample_frames(
            times, fps=fps, max_frames=max_frames, start_time=start_time, end_time=end_time, by_index=by_index
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return VideoPlan(source, name, times, sampled, height, width, rotation, by_decoding)


def read_frames(plan: VideoPlan, progress: Progress | None = None) -> Iterator[Pixels]:
    """Decodes the chosen frames in order.

    Args:
        plan: from `plan_video`; its source must not have changed.
        progress: called with (frames delivered, frames chosen) after each.

    Yields:
        uint8 (height, width, 3) RGB, 0..255, one per chosen frame; the same array again where the plan
        repeats a frame.

    Raises:
        UnexpectedFrameError: when decoded times differ from the plan's.
        ValueError: when the file breaks off.
    """
    total = len(plan.sampled.indices)
    delivered = 0
    with _open(plan.source, plan.name) as (container, stream):
        frames = _decode(container, stream, plan.name)
        index = -1
        for wanted in plan.sampled.indices:
            while index < wanted:
                frame = next(frames, None)
                index += 1
                if frame is None:
                    raise UnexpectedFrameError(
                        f"{plan.name}: frame {wanted} of {len(plan.times.pts)} could not be decoded."
                    )
                if not plan.by_decoding and frame.pts != plan.times.pts[index]:
                    raise UnexpectedFrameError(
                        f"{plan.name}: frame {index} has time {frame.pts}, its packet said {plan.times.pts[index]}."
                    )
                if index == wanted:
                    pixels = _to_rgb(frame, plan.rotation)
            yield pixels
            delivered += 1
            if progress is not None:
                progress(delivered, total)


@contextlib.contextmanager
def _open(source: str | BinaryIO, name: str) -> Iterator[tuple[Any, Any]]:
    if not isinstance(source, str):
        source.seek(0)
    try:
        # A relative path with a colon would be taken for a protocol.
        container = av.open(os.path.abspath(source) if isinstance(source, str) else source, mode="r")
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(
            f"Expected {name} as a whole video file, got {describe(source)!r}, which could not be opened: "
            f"{error.strerror}."
        ) from error
    with container:
        if container.format.name in _TEXT_FORMATS:
            raise ValueError(f"Expected {name} as a video file, got {describe(source)!r}, which is text.")
        stream = _video_stream(container, source, name)
        stream.thread_type = "AUTO"
        yield container, stream


def _video_stream(container: Any, source: str | BinaryIO, name: str) -> Any:
    """The first video stream that is not the cover picture of an audio file."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    kinds = sorted({stream.type for stream in container.streams if stream.type != "video"})
    if container.streams.video:
        kinds.append("a cover picture")
    found = f"{' and '.join(kinds)} only" if kinds else "no stream"
    raise ValueError(f"Expected {name} with a video stream, got {describe(source)!r}, which has {found}.")


def _decode(container: Any, stream: Any, name: str) -> Iterator[Any]:
    try:
        yield from container.decode(stream)
    except av.error.FFmpegError as error:
        raise ValueError(f"Expected {name} as a whole video file, but decoding failed: {error.strerror}.") from error


def _first_frame(container: Any, stream: Any, name: str) -> Any:
    frame = next(_decode(container, stream, name), None)
    if frame is None:
        raise ValueError(f"Expected {name} with at least one frame, got none.")
    return frame


def _to_rgb(frame: Any, rotation: int) -> Pixels:
    pixels: Pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, rotation)) if rotation else pixels


def _times_by_demuxing(source: str | BinaryIO, name: str) -> FrameTimes | None:
    """Frame times from packets; None when packets cannot be trusted to be frames."""
    pts: list[int] = []
    durations: list[int] = []
    num_packets = 0
    trustworthy = True
    num_whole = 0
    with _open(source, name) as (container, stream):
        for packet in _demux(container, stream, name):
            num_packets += 1
            num_whole += not packet.is_corrupt
            if packet.is_discard:
                # Outside the file's own edit list: decoded for the sake of others, never shown.
                continue
            if packet.pts is None or packet.is_corrupt:
                trustworthy = False
                continue
            pts.append(packet.pts)
            durations.append(packet.duration or 0)
        if "mp4" in container.format.name.split(","):
            _check_whole(stream, num_packets, num_whole, pts, name)
        if not trustworthy:
            return None
        order = np.argsort(np.array(pts, dtype=np.int64), kind="stable")
        times = np.array(pts, dtype=np.int64)[order]
        if len(times) == 0 or np.any(np.diff(times) <= 0):
            return None
        return _frame_times(container, stream, times, durations[int(order[-1])])


def _demux(container: Any, stream: Any, name: str) -> Iterator[Any]:
    try:
        for packet in container.demux(stream):
            if packet.size > 0:
                yield packet
    except av.error.FFmpegError as error:
        raise ValueError(f"Expected {name} as a whole video file, but reading failed: {error.strerror}.") from error


def _check_whole(stream: Any, num_packets: int, num_whole: int, pts: list[int], name: str) -> None:
    """Raises where an mp4 (or a relative, whose header lists every frame) breaks off."""
    # Fewer packets than announced may also be the work of an edit list; then they fill the announced duration.
    shown = max(pts) - (stream.start_time or 0) + _frame_period(stream) if pts else 0
    is_short = bool(stream.duration) and shown + _frame_period(stream) <= stream.duration
    if num_whole < num_packets or (num_packets < stream.frames and is_short):
        raise ValueError(
            f"Expected {name} as a whole video file, got {num_whole} of the {max(stream.frames, num_packets)} frames "
            "that it announces: the file is truncated."
        )


def _times_by_decoding(source: str | BinaryIO, name: str) -> FrameTimes:
    duration = 0
    with _open(source, name) as (container, stream):
        period = _frame_period(stream)
        guess = _BestEffortTime()
        times: list[int] = []
        for frame in _decode(container, stream, name):
            value = guess.next(frame.pts, frame.dts)
            # A missing or backward time continues from the frame before.
            previous = times[-1] if times else None
            expected = (stream.start_time or 0) if previous is None else previous + period
            times.append(expected if value is None or (previous is not None and value < previous) else value)
            duration = getattr(frame, "duration", None) or 0
        if not times:
            raise ValueError(f"Expected {name} with at least one frame, got none.")
        return _frame_times(container, stream, np.array(times, dtype=np.int64), duration)


class _BestEffortTime:
    """ffmpeg's choice between the two times of a decoded frame, for containers that store only one.

    An avi with B-frames gives presentation times that run back and forth; the decoding times, which a decoder
    passes on in order, are then the better ones.
    """

    def __init__(self) -> None:
        self.last_pts = self.last_dts = -math.inf
        self.faulty_pts = self.faulty_dts = 0

    def next(self, pts: int | None, dts: int | None) -> int | None:
        """Time of the next frame, None when it has none."""
        if dts is not None:
            self.faulty_dts += dts <= self.last_dts
            self.last_dts = dts
        elif pts is not None:
            self.last_dts = pts
        if pts is not None:
            self.faulty_pts += pts <= self.last_pts
            self.last_pts = pts
        elif dts is not None:
            self.last_pts = dts
        return pts if pts is not None and (dts is None or self.faulty_pts <= self.faulty_dts) else dts


def _frame_period(stream: Any) -> int:
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    return max(1, round(1 / (rate * stream.time_base)))


def _frame_times(container: Any, stream: Any, times: npt.NDArray[np.int64], last_duration: int) -> FrameTimes:
    time_base = Fraction(stream.time_base)
    start = stream.start_time if stream.start_time is not None else int(times[0])
    video_start_us = math.floor(start * time_base * 1_000_000 + Fraction(1, 2))
    container_start_us = container.start_time if container.start_time is not None else video_start_us
    return FrameTimes(
        pts=times,
        end=int(times[-1]) + (last_duration or _frame_period(stream)),
        time_base=time_base,
        container_start_us=int(container_start_us),
        video_start_us=video_start_us,
        average_rate=Fraction(stream.average_rate or stream.guessed_rate or 25),
    )
