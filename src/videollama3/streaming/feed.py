"""A file, URL or camera that runs beside the model and hands over the picture of each tick.

A source enters; its ticks are pushed into a session while the feed is iterated. Decoding runs in a thread with a
bounded queue; what happens when the model falls behind is chosen, and everything left out is counted. Opening and
decoding are left to `capture.py`, what the session makes of a tick to `session.py`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import av.error
import numpy as np
from av.video.reformatter import VideoReformatter

from ..processing.media_sources import Pixels
from ..processing.video_file import ReadingLimits, check_pixels
from .capture import DamageCount, Source, SourceClock, clock_may_jump, file_times, read_frames
from .tick_sampler import Tick, TickSampler

if TYPE_CHECKING:
    from .session import StreamingSession

_SECONDS_BETWEEN_LOOKS = 0.1
# A read that hangs ends by its own time limit; nobody waits for it longer than this.
_SECONDS_TO_STOP = 2.0
# So many labels of dropped ticks are remembered; all are counted.
_DROPPED_LABELS = 10_000
_END = object()


@dataclasses.dataclass(frozen=True)
class FeedOptions:
    """How a source is read.

    Attributes:
        realtime: deliver a file at its own pace, as if it were live; otherwise as fast as the model takes it.
        when_behind: "block": the source waits for the model. "drop": the oldest tick that waits is left out, and
            its time recorded.
        queue_ticks: so many ticks may wait for the model.
        reconnect_attempts: how often in a row a source that broke off, or cannot be opened yet, is opened again. The
            end of a URL or camera counts as breaking off.
        reconnect_seconds: pause before that.
        max_jump_seconds: where the clock of a URL, a camera or an mpegts file jumps by more, it was set anew, and the
            stream goes on after the frame before; None believes it.
        camera_format: libav's name of the capture device ("v4l2", "avfoundation", "dshow"); told by the system for
            sources like /dev/video0.
        max_open_seconds: opening and each read take at most so long.
        stop_after_seconds: end after so much of the source's time.
    """

    realtime: bool = False
    when_behind: Literal["block", "drop"] = "block"
    queue_ticks: int = 8
    reconnect_attempts: int = 0
    reconnect_seconds: float = 1.0
    max_jump_seconds: float | None = 10.0
    camera_format: str | None = None
    max_open_seconds: float = 30.0
    stop_after_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.when_behind not in ("block", "drop"):
            raise ValueError(f"Expected when_behind 'block' or 'drop', got {self.when_behind!r}.")
        if self.queue_ticks < 1:
            raise ValueError(f"Expected queue_ticks of at least 1, got {self.queue_ticks}.")
        if self.stop_after_seconds is not None and not self.stop_after_seconds > 0:
            raise ValueError(f"Expected stop_after_seconds above zero, got {self.stop_after_seconds}.")


@dataclasses.dataclass
class FeedReport:
    """What happened on the way.

    Attributes:
        num_ticks: handed to the session.
        num_dropped_ticks: left out because the model was behind.
        dropped_seconds: their labels, the latest 10,000.
        num_skipped_ticks: in gaps longer than the session's `max_gap_seconds`.
        num_corrupt: packets and frames that could not be decoded or came out damaged.
        num_unordered_frames: left out because their time was not after that of the frame before.
        num_clock_jumps: times the source's clock was set anew.
        num_reconnects: times the source was opened again.
    """

    num_ticks: int = 0
    num_dropped_ticks: int = 0
    dropped_seconds: collections.deque[float] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_DROPPED_LABELS)
    )
    num_skipped_ticks: int = 0
    num_corrupt: int = 0
    num_unordered_frames: int = 0
    num_clock_jumps: int = 0
    num_reconnects: int = 0


class Feed:
    """Iterating pushes ticks into the session and gives their labels in seconds; once.

    Args:
        session: takes the ticks.
        source: path, URL or camera device.
        options: how it is read.

    Attributes:
        report: counts, complete when the iteration has ended.
    """

    def __init__(self, session: StreamingSession, source: Any, options: FeedOptions) -> None:
        self.session = session
        self.report = FeedReport()
        self._name = source
        self._options = options
        self._limits = ReadingLimits(
            max_seconds=options.max_open_seconds, max_pixels=session.processor.video_processor.max_frame_pixels
        )
        self._source = Source(source, camera_format=options.camera_format, limits=self._limits)
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=options.queue_ticks)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        # Of the thread that reads.
        self._clock = SourceClock(options.max_jump_seconds)
        self._damage = DamageCount()
        self._broke_off_at: float | None = None
        self._begun: tuple[float, Fraction] | None = None
        self._converter = VideoReformatter()
        self._converted: tuple[Any, Pixels] | None = None

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[float]:
        if self._thread is not None:
            raise RuntimeError("Expected a feed that was not iterated before: open the source again.")
        sampler, first_label = self.session.new_sampler(), self.session.next_label_seconds
        self._thread = threading.Thread(
            target=self._capture, args=(sampler, first_label), name="videollama3-feed", daemon=True
        )
        self._thread.start()
        try:
            for tick in self._ticks():
                self.session.show([tick.picture], [tick.seconds])
                self.report.num_ticks += 1
                yield tick.seconds
        finally:
            self.close()

    def _ticks(self) -> Iterator[Tick[Pixels]]:
        while not self._stop.is_set():
            # With a limit, so that Ctrl-C and `close` are noticed everywhere.
            with contextlib.suppress(queue.Empty):
                item = self._queue.get(timeout=_SECONDS_BETWEEN_LOOKS)
                if item is _END:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item

    def close(self) -> None:
        """Ends the reading."""
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=_SECONDS_TO_STOP)

    # ------------------------------------------------------------------ the thread

    def _capture(self, sampler: TickSampler[Any], first_label: Fraction | None) -> None:
        last: Any = _END
        try:
            self._read(sampler, first_label)
        except BaseException as error:  # handed over, not swallowed
            last = error
        self._converted = None
        self._put(last)

    def _read(self, sampler: TickSampler[Any], first_label: Fraction | None) -> None:
        error = self._read_to_the_end(sampler, first_label)
        if self._stop.is_set():
            return
        limit = self._options.stop_after_seconds
        end = (
            self._clock.end if limit is None or sampler.origin is None else min(self._clock.end, _end(sampler, limit))
        )
        self._hand_over(sampler.finish(end))
        if isinstance(error, FileNotFoundError):
            raise error
        if error is not None:
            raise ValueError(f"Expected a source that can be read, got {self._name!r:.200}: {error}") from error

    def _read_to_the_end(self, sampler: TickSampler[Any], first_label: Fraction | None) -> Exception | None:
        """Opens the source as often as allowed; returns why it cannot be read further, None at its end."""
        failures = 0
        while True:
            error: Exception | None = None
            before = self._clock.last
            try:
                if self._read_once(sampler, first_label, is_again=failures > 0):
                    return None
            except (av.error.FFmpegError, OSError, ValueError) as caught:
                error = caught
            self._broke_off_at = time.monotonic()
            failures = 1 if self._clock.last != before else failures + 1
            is_over = error is None and not self._source.is_live
            if is_over or failures > self._options.reconnect_attempts:
                return error
            if self._stop.wait(self._options.reconnect_seconds):
                return None

    def _read_once(self, sampler: TickSampler[Any], first_label: Fraction | None, *, is_again: bool) -> bool:
        """Reads until the source ends; True when it was read as long as wanted."""
        with self._source.open() as (container, stream):
            self.report.num_reconnects += is_again
            may_jump = self._source.is_live or clock_may_jump(container)
            self._clock.opened(away_seconds=self._seconds_away(), may_jump=may_jump)
            if sampler.origin is None and not self._source.is_live:
                origin, label = file_times(container, stream)
                sampler.begin(origin, label if first_label is None else first_label)
            for frame, seconds in self._clock.timed(read_frames(container, stream, self._damage), stream):
                self._count()
                if sampler.origin is None:
                    sampler.begin(seconds, first_label or Fraction(0))
                if self._is_over(sampler, seconds) or not self._wait(seconds):
                    return True
                self._hand_over(sampler.push(frame, max(seconds, sampler.origin or seconds)))
                self.report.num_skipped_ticks = sampler.skipped_ticks
            self._count()
        return self._stop.is_set()

    def _count(self) -> None:
        self.report.num_corrupt = self._damage.num_corrupt
        self.report.num_unordered_frames = self._clock.num_unordered
        self.report.num_clock_jumps = self._clock.num_jumps

    def _seconds_away(self) -> float:
        """How long a live source was away; a file waits."""
        if self._broke_off_at is None or not self._source.is_live:
            return 0.0
        return time.monotonic() - self._broke_off_at

    def _is_over(self, sampler: TickSampler[Any], seconds: Fraction) -> bool:
        limit = self._options.stop_after_seconds
        return limit is not None and seconds >= _end(sampler, limit)

    def _wait(self, seconds: Fraction) -> bool:
        """Waits until a file's frame is due; False when the feed was closed meanwhile."""
        if not self._options.realtime or self._source.is_live:
            return not self._stop.is_set()
        now = time.monotonic()
        if self._begun is None:
            self._begun = (now, seconds)
        due = self._begun[0] + float(seconds - self._begun[1])
        return not self._stop.wait(max(0.0, due - now))

    def _hand_over(self, ticks: list[Tick[Any]]) -> None:
        for tick in ticks:
            if self._stop.is_set():
                return
            self._put(dataclasses.replace(tick, picture=self._to_rgb(tick.picture)))

    def _to_rgb(self, frame: Any) -> Pixels:
        """uint8 (height, width, 3); of a frame that several ticks show, once."""
        if self._converted is None or self._converted[0] is not frame:
            check_pixels(frame, name="the source", limits=self._limits)
            pixels: Any = self._converter.reformat(frame, format="rgb24").to_ndarray()
            turns = round(frame.rotation / 90) % 4
            self._converted = (frame, np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels)
        return self._converted[1]

    def _put(self, item: Any) -> None:
        """Queues an item by the chosen policy; gives up when the feed is closed."""
        drops = self._options.when_behind == "drop" and isinstance(item, Tick)
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=None if drops else _SECONDS_BETWEEN_LOOKS, block=not drops)
                return
            except queue.Full:
                if drops:
                    self._drop_oldest()

    def _drop_oldest(self) -> None:
        with contextlib.suppress(queue.Empty):
            self.report.dropped_seconds.append(self._queue.get_nowait().seconds)
            self.report.num_dropped_ticks += 1


def _end(sampler: TickSampler[Any], limit_seconds: float) -> Fraction:
    return (sampler.origin or Fraction(0)) + Fraction(limit_seconds)
