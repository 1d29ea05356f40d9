"""A file, URL or camera -> decoded frames and times that never go back, for as long as it runs.

A source enters, PyAV frames in order leave; packets that cannot be decoded are counted and passed over. Which frames
a tick shows is left to `tick_sampler.py`, opening it again and waiting for the model to `feed.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import av
import av.error

from ..processing.media_sources import open_source
from ..processing.video_file import METADATA_OPTIONS, ReadingLimits, check_pixels, open_video

# Of a source that runs by itself; no `file`: a stream from elsewhere must not name files of this machine.
_LIVE_PROTOCOLS = (
    "http",
    "https",
    "tcp",
    "tls",
    "udp",
    "rtp",
    "rtsp",
    "rtsps",
    "rtmp",
    "rtmps",
    "srt",
    "mmsh",
    "mmst",
)
_LIVE_WHITELIST = ",".join((*_LIVE_PROTOCOLS, "crypto", "httpproxy"))
_LIVE_URL = re.compile(rf"^({'|'.join(_LIVE_PROTOCOLS)})://", flags=re.IGNORECASE)
_CAMERA_FORMATS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}
# libav's mark of formats whose clock may be set anew on the way (AVFMT_TS_DISCONT): mpegts and its like.
_CLOCK_MAY_JUMP = 0x0200
_MICROSECONDS = 1_000_000
# A demuxer that fails so often in a row does not get further.
_MAX_READ_ERRORS = 100
# A frame so much after the one before comes after a pause of the source, or its time is damaged.
_SECONDS_FAR_AHEAD = Fraction(1)


class Source:
    """Something to read frames from; opened as often as needed.

    Args:
        source: path, URL, camera device, bytes or binary file object.
        camera_format: libav's name of the capture device; told by the system for /dev/video*.
        limits: of a frame's pixels, and of the time that opening and each read take.
    """

    def __init__(self, source: Any, *, camera_format: str | None, limits: ReadingLimits) -> None:
        self._source = os.fspath(source) if isinstance(source, os.PathLike) else source
        self._limits = limits
        self._is_url = isinstance(self._source, str) and _LIVE_URL.match(self._source) is not None
        if camera_format is None and isinstance(self._source, str) and self._source.startswith("/dev/video"):
            camera_format = _CAMERA_FORMATS.get(sys.platform)
        self._camera_format = camera_format

    @property
    def is_live(self) -> bool:
        """Whether it runs by itself (URL or camera): its time starts with the first frame seen."""
        return self._is_url or self._camera_format is not None

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[Any, Any]]:
        """The PyAV container and its video stream.

        Raises:
            ValueError: when it cannot be opened or has no video.
            FileNotFoundError: for a path that does not exist.
        """
        if self.is_live:
            with self._open_live() as opened:
                yield opened
            return
        local = open_source(self._source, what="the source", max_seconds=self._limits.max_seconds)
        if isinstance(local, str) and os.path.isdir(local):
            raise ValueError(f"Expected the source as a video, got the folder {local!r}: use show_video.")
        with open_video(local, name="the source", limits=self._limits) as opened:
            yield opened

    @contextlib.contextmanager
    def _open_live(self) -> Iterator[tuple[Any, Any]]:
        timeout = self._limits.max_seconds
        try:
            container = av.open(
                self._source,
                format=self._camera_format,
                options={"protocol_whitelist": _LIVE_WHITELIST} if self._is_url else {},
                timeout=(timeout, timeout),
                **METADATA_OPTIONS,
            )
        except (av.error.FFmpegError, OSError) as error:
            raise ValueError(f"it could not be opened: {error.strerror}") from error
        with container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ValueError("its format cannot be decoded")
            check_pixels(stream.codec_context, name="the source", limits=self._limits)
            # As for files: damaged frames are patched up the same way each time.
            stream.codec_context.thread_count = 1
            yield container, stream


def clock_may_jump(container: Any) -> bool:
    """Whether times of this format may be set anew on the way."""
    return bool(int(container.format.flags) & _CLOCK_MAY_JUMP)


def file_times(container: Any, stream: Any) -> tuple[Fraction, Fraction]:
    """Where tick 0 of a file begins, and its label, in seconds: the rule's own rounding.

    Ticks count from the start of the container, sound included, and are labelled from the start of the video.
    """
    base = Fraction(stream.time_base)
    start = Fraction(stream.start_time or 0) * base
    label = Fraction(_nearest(start * _MICROSECONDS), _MICROSECONDS)
    begin = label if container.start_time is None else Fraction(container.start_time, av.time_base)
    return _nearest(begin / base) * base, label


def _nearest(value: Fraction) -> int:
    """Rounded half away from zero, as ffmpeg does."""
    rounded = int(abs(value) + Fraction(1, 2))
    return rounded if value >= 0 else -rounded


class DamageCount:
    """How much of a source could not be decoded."""

    def __init__(self) -> None:
        self.num_corrupt = 0


def read_frames(container: Any, stream: Any, damage: DamageCount) -> Iterator[Any]:
    """Decoded frames in order of presentation; damaged ones are counted and left out.

    Raises:
        av.error.FFmpegError: when the source breaks off.
    """
    for packet in _packets(container, stream, damage):
        try:
            frames = stream.codec_context.decode(packet)
        except av.error.EOFError:
            return
        except av.error.FFmpegError:
            damage.num_corrupt += 1
            continue
        for frame in frames:
            if frame.is_corrupt:
                damage.num_corrupt += 1
            else:
                yield frame


def _packets(container: Any, stream: Any, damage: DamageCount) -> Iterator[Any]:
    """Packets, and None at the end to ask the decoder for what it holds back."""
    errors = 0
    while True:
        try:
            for packet in container.demux(stream):
                errors = 0
                if packet.size > 0:
                    yield packet
        except IndexError:
            # Damaged files announce further streams on the way. PyAV looks for them when all packets are read.
            pass
        except av.error.InvalidDataError:
            damage.num_corrupt += 1
            errors += 1
            if errors >= _MAX_READ_ERRORS:
                raise
            continue
        yield None
        return


class SourceClock:
    """Times of a source's frames on one scale that never goes back.

    Where a source was opened again, or a jump of its clock is not believed, the next frame follows the one before:

        source      10.0  10.1  |  3.0   3.1   (opened again after 2 seconds)
        here        10.0  10.1    12.1  12.2

    Args:
        max_jump_seconds: a clock that jumps by more, either way, was set anew; None believes it.
    """

    def __init__(self, max_jump_seconds: float | None) -> None:
        self._max_jump = max_jump_seconds
        self._may_jump = False
        self._shift = Fraction(0)
        self._away: Fraction | None = None
        self._step = Fraction(0)
        self.last: Fraction | None = None
        self.end = Fraction(0)
        self.num_jumps = 0
        self.num_unordered = 0

    def opened(self, *, away_seconds: float, may_jump: bool) -> None:
        """The source was opened, after it was away for so long; whether its clock may jump."""
        self._may_jump = may_jump
        self._away = Fraction(away_seconds).limit_denominator(1000)

    def timed(self, frames: Iterable[Any], stream: Any) -> Iterator[tuple[Any, Fraction]]:
        """Frames with their times; those whose time is not after the one before are left out and counted.

        Where a clock may jump, a frame far ahead waits for the next one: if that stands before it, its own time was
        damaged, and it follows the frame before. Believed, it would leave out all frames until its time is reached.
        Frames that come slowly but steadily do not wait.

        Raises:
            av.error.FFmpegError: what `frames` raises, after the frame that waited.
        """
        base, period = Fraction(stream.time_base), _period(stream)
        waiting: tuple[Any, Fraction] | None = None
        broken_off: av.error.FFmpegError | None = None
        remaining = iter(frames)
        while True:
            try:
                frame = next(remaining, None)
            except av.error.FFmpegError as error:
                frame, broken_off = None, error
            stamp = None if frame is None else frame.pts if frame.pts is not None else frame.dts
            raw = None if stamp is None else stamp * base
            if waiting is not None:
                is_damaged = raw is not None and raw < waiting[1]
                yield from self._in_order(waiting[0], None if is_damaged else waiting[1], base, period)
                waiting = None
            if frame is None:
                break
            if raw is not None and self._is_far_ahead(raw):
                waiting = frame, raw
            else:
                yield from self._in_order(frame, raw, base, period)
        if broken_off is not None:
            raise broken_off

    def _is_far_ahead(self, raw: Fraction) -> bool:
        if not self._may_jump or self._max_jump is None or self.last is None or self._away is not None:
            return False
        return raw + self._shift - self.last > max(_SECONDS_FAR_AHEAD, 2 * self._step)

    def _in_order(
        self, frame: Any, raw: Fraction | None, base: Fraction, period: Fraction
    ) -> Iterator[tuple[Any, Fraction]]:
        time = self._continued(raw, period)
        if self.last is not None and time <= self.last:
            self.num_unordered += 1
            return
        self._step = Fraction(0) if self.last is None else time - self.last
        self.last = time
        self.end = time + (frame.duration * base if getattr(frame, "duration", None) else period)
        yield frame, time

    def _continued(self, raw: Fraction | None, period: Fraction) -> Fraction:
        away, self._away = self._away, None
        if self.last is None:
            return raw or Fraction(0)
        if raw is None:
            return self.last + period
        if away is not None:
            self._shift = self.last + max(period, away) - raw
        elif self._may_jump and self._max_jump is not None and abs(raw + self._shift - self.last) > self._max_jump:
            self._shift = self.last + period - raw
            self.num_jumps += 1
        return raw + self._shift


def _period(stream: Any) -> Fraction:
    return 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)
