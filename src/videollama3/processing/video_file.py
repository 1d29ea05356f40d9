"""Opening a video file safely: its stream, its packets and its frames, under limits.

A path or byte stream of unknown content enters, PyAV objects leave, and every failure is one `ValueError` that
names the video. What packets and frames mean is left to `frame_timing.py` and `frame_decoding.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

import av
import av.error
import av.stream

from .media_sources import describe

# Demuxers that draw any text file as a video, chosen by a file name's ending.
_TEXT_FORMATS = frozenset({"tty", "bin", "xbin", "adf", "idf"})
# Demuxers whose files name other files or hosts, which they open at once: never tried.
_PLAYLIST_FORMATS = frozenset(
    {
        "hls",
        "applehttp",
        "concat",
        "concatf",
        "dash",
        "webm_dash_manifest",
        "imf",
        "sdp",
        "rtsp",
        "rtp",
        "sap",
        "vobsub",
    }
)
_FORMATS = ",".join(sorted({part for name in av.formats_available for part in name.split(",")} - _PLAYLIST_FORMATS))

# Titles are never shown, and in damaged files they are no text. From PyAV 19 on nothing has to be said.
METADATA_OPTIONS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}

# Codecs' own limit.
_MAX_SIDE = 2**16


@dataclasses.dataclass(frozen=True)
class ReadingLimits:
    """What reading one video may cost before it is refused.

    Attributes:
        max_seconds: time for opening, and again for decoding, on the clock.
        max_pixels: of one frame.
        max_duration_seconds: from its first frame to the end of its last.
    """

    max_seconds: float = 3600.0
    max_pixels: int = 8192 * 8192
    max_duration_seconds: float = 48 * 3600.0


class Deadline:
    """A point in time after which work on a video stops.

    Args:
        seconds: from now.
        name: how to call the video in the error.
    """

    def __init__(self, seconds: float, name: str) -> None:
        self._seconds = seconds
        self._name = name
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        """Raises TimeoutError when the time is over."""
        if time.monotonic() > self._end:
            raise TimeoutError(
                f"Expected to read {self._name} within {self._seconds:g} seconds, which are over: the file is "
                "damaged, or the limit (`max_read_seconds`) too low for it."
            )


@contextlib.contextmanager
def open_video(source: str | BinaryIO, *, name: str, limits: ReadingLimits) -> Iterator[tuple[Any, Any]]:
    """Opens a video and finds its stream.

    Args:
        source: local path or seekable stream.
        name: how to call it in errors.
        limits: what it may cost.

    Yields:
        The PyAV container and its video stream.

    Raises:
        ValueError: when it is no video that can be read.
    """
    if not isinstance(source, str):
        source.seek(0)
    try:
        container = av.open(
            # A relative path with a colon would be taken for a protocol.
            os.path.abspath(source) if isinstance(source, str) else source,
            mode="r",
            # A crafted file may name others: no protocol but the one that the file itself is read by.
            options={
                "protocol_whitelist": "file" if isinstance(source, str) else "none",
                "format_whitelist": _FORMATS,
            },
            timeout=(limits.max_seconds, limits.max_seconds),
            **METADATA_OPTIONS,
        )
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(
            f"Expected {name} as a whole video file, got {describe(source)!r}, which could not be opened: "
            f"{error.strerror}{' (playlists are refused)' if error.errno == errno.EINVAL else ''}."
        ) from error
    with container:
        if container.format.name in _TEXT_FORMATS:
            raise ValueError(f"Expected {name} as a video file, got {describe(source)!r}, which is text.")
        stream = _video_stream(container, source, name)
        codec = stream.codec_context
        if codec is None:
            raise ValueError(f"Expected {name} in a format that can be decoded, got an unknown one.")
        check_pixels(codec, name=name, limits=limits)
        # The same for sizes that change on the way; decoders count rows padded to 64 pixels.
        codec.options = {"max_pixels": str(limits.max_pixels + 64 * _MAX_SIDE)}
        # More threads cost a quarter more work, patch damaged frames up differently each time, and have crashed on
        # damaged data after a seek (FFmpeg 8.1, VP9). Several groups of pictures are decoded at a time instead.
        codec.thread_count = 1
        yield container, stream


def check_pixels(sized: Any, *, name: str, limits: ReadingLimits) -> None:
    """Raises ValueError when something with a width and a height (a codec, a frame) is larger than the limit."""
    if sized.width * sized.height > limits.max_pixels:
        raise ValueError(
            f"Expected {name} with at most {limits.max_pixels} pixels per frame, got {sized.width} x {sized.height}."
        )


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


def read_packets(container: Any, stream: Any) -> Iterator[Any]:
    """Packets of a stream in file order, without the empty one at the end."""
    try:
        for packet in container.demux(stream):
            if packet.size > 0:
                yield packet
    except IndexError:
        # Damaged files announce further streams on the way. PyAV looks for them when all packets are read.
        return


def demux_packets(container: Any, stream: Any, *, name: str, deadline: Deadline) -> Iterator[Any]:
    """Packets of a stream in file order, with errors that name the video."""
    try:
        for packet in read_packets(container, stream):
            deadline.check()
            yield packet
    except av.error.FFmpegError as error:
        raise ValueError(f"Expected {name} as a whole video file, but reading failed: {error.strerror}.") from error


def decode_frames(container: Any, stream: Any, *, name: str, deadline: Deadline) -> Iterator[Any]:
    """All frames of a stream, in order of presentation."""
    try:
        for packet in itertools.chain(read_packets(container, stream), [None]):
            for frame in stream.codec_context.decode(packet):
                deadline.check()
                yield frame
    except av.error.FFmpegError as error:
        if "webp" in container.format.name:
            raise ValueError(
                f"Expected {name} as a video, got an animated WebP, which FFmpeg does not decode: give mp4 or gif, "
                "or its frames as a list of pictures with timestamps."
            ) from error
        raise ValueError(f"Expected {name} as a whole video file, but decoding failed: {error.strerror}.") from error


def first_frame(container: Any, stream: Any, *, name: str, deadline: Deadline) -> Any:
    """The first frame; it tells the size and the rotation as they are shown."""
    frame = next(decode_frames(container, stream, name=name, deadline=deadline), None)
    if frame is None:
        raise ValueError(f"Expected {name} with at least one frame, got none.")
    return frame
