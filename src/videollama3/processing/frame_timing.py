"""When the frames of a video file are shown.

An opened container enters, the times of its frames leave: from its packets where they tell the truth, which
costs a small part of decoding, and otherwise from decoded frames. Choosing frames is left to
`frame_sampling.py`.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from .frame_decoding import PacketTable, starts_clean
from .frame_sampling import FrameTimes
from .video_file import Deadline, decode_frames, demux_packets

_ALWAYS_BEFORE = np.iinfo(np.int64).min + 1


def times_by_demuxing(
    container: Any, stream: Any, *, name: str, deadline: Deadline
) -> tuple[FrameTimes, PacketTable] | None:
    """Frame times and packets of a whole file; None when its packets cannot be trusted to be frames.

    Raises:
        ValueError: when an mp4 breaks off.
    """
    codec = stream.codec_context
    rows: list[tuple[int, int, bool, bool, int]] = []
    num_packets = num_whole = 0
    trustworthy = True
    for packet in demux_packets(container, stream, name=name, deadline=deadline):
        num_packets += 1
        num_whole += not packet.is_corrupt
        pts = packet.pts
        if pts is None or packet.is_corrupt:
            # Discarded packets (outside the file's own edit list) are never shown and need no time.
            trustworthy = trustworthy and pts is None and packet.is_discard
            continue
        dts = pts if packet.dts is None else packet.dts
        is_start = packet.is_keyframe and starts_clean(memoryview(packet), codec.name, codec.extradata)
        rows.append((pts, dts, is_start, not packet.is_discard, packet.duration or 0))
    columns = np.array(rows, dtype=np.int64).reshape(-1, 5)
    shown = columns[:, 3].astype(bool)
    if "mp4" in container.format.name.split(","):
        _check_whole(stream, num_packets, num_whole, columns[shown, 0], name)
    if codec.has_b_frames and np.array_equal(columns[:, 0], columns[:, 1]):
        # Frames are shown in another order than they are stored in, and the container (avi) does not say which.
        trustworthy = False
    order = np.argsort(columns[shown, 0], kind="stable")
    times = columns[shown, 0][order]
    if not trustworthy or len(times) == 0 or np.any(np.diff(times) <= 0) or not _groups_follow(columns):
        return None
    frame_times = _frame_times(container, stream, times, int(columns[shown, 4][order[-1]]))
    table = PacketTable(pts=columns[:, 0].copy(), dts=columns[:, 1].copy(), is_keyframe=columns[:, 2].astype(bool))
    return frame_times, table


def _groups_follow(columns: npt.NDArray[np.int64]) -> bool:
    """Whether groups of pictures are shown in the order in which they are stored.

    What follows a keyframe in the file is shown after the keyframe before, and before the next one.
    """
    keyframes = columns[columns[:, 2].astype(bool), 0]
    if len(keyframes) == 0:
        return True
    group = np.cumsum(columns[:, 2])
    limits = np.concatenate([[_ALWAYS_BEFORE], [_ALWAYS_BEFORE], keyframes, [-_ALWAYS_BEFORE]])
    return bool(np.all(columns[:, 0] > limits[group]) and np.all(columns[:, 0] < limits[group + 2]))


def _check_whole(stream: Any, num_packets: int, num_whole: int, pts: npt.NDArray[np.int64], name: str) -> None:
    """Raises where an mp4 (or a relative, whose header lists every frame) breaks off."""
    # Fewer packets than announced may also be the work of an edit list; then they fill the announced duration.
    shown = int(pts.max()) - (stream.start_time or 0) + _frame_period(stream) if len(pts) else 0
    is_short = bool(stream.duration) and shown + _frame_period(stream) <= stream.duration
    if num_whole < num_packets or (num_packets < stream.frames and is_short):
        raise ValueError(
            f"Expected {name} as a whole video file, got {num_whole} of the {max(stream.frames, num_packets)} frames "
            "that it announces: the file is truncated."
        )


def times_by_decoding(container: Any, stream: Any, *, name: str, deadline: Deadline) -> FrameTimes:
    """Frame times of a whole file from its decoded frames."""
    duration = 0
    period = _frame_period(stream)
    guess = _BestEffortTime()
    times: list[int] = []
    for frame in decode_frames(container, stream, name=name, deadline=deadline):
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
    return max(1, round(1 / (_frame_rate(stream) * Fraction(stream.time_base))))


def _frame_rate(stream: Any) -> Fraction:
    # PyAV's own rationals, from 19 on, round what does not fit into 32 bits.
    return Fraction(stream.average_rate or stream.guessed_rate or 25)


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
        average_rate=_frame_rate(stream),
    )
