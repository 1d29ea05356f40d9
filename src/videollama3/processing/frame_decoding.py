"""Decoding only what chosen frames need: seek to their groups of pictures, skip what nothing depends on.

The packets of a stream and the times of chosen frames enter, decoded frames leave in order of presentation.
Opening files and turning frames into pictures is left to `video_reading.py`.

A frame depends on packets between the last keyframe at or before it and its own packet, in file order; inside
that span, frames that no other refers to can be left out. For a stream whose packets in file order are

    I0 P3 B1 B2 | I4 P7 B5 B6 | I8 ...        (numbers are presentation times, B frames refer to none)

and chosen frames 2 and 7, the packets I0 P3 B2 and I4 P7 are decoded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import av.error
import numpy as np
import numpy.typing as npt

from .video_file import Deadline, read_packets

# Codecs in which "refers to none" is told by each frame itself; in others a frame marked so may still be
# referred to by a higher temporal layer.
_CODECS_WITH_SKIPPABLE_FRAMES = frozenset({"h264", "mpeg4", "mpeg2video", "mpeg1video"})
# Passing over this many packets costs about as much as a seek.
_PACKETS_WORTH_A_SEEK = 50


class DecodingError(Exception):
    """A span did not give the frames that its packets announced: decode the stream from its start."""


# First slice type at which decoding may start exactly: IDR pictures of H.264, IRAP pictures of HEVC. Containers
# also mark others, for instance the beginning of an intra refresh, after which pictures are right only later.
_CLEAN_SLICES = {"h264": frozenset({5}), "hevc": frozenset(range(16, 24))}
_SLICES = {"h264": frozenset(range(1, 6)), "hevc": frozenset(range(32))}


def starts_clean(data: memoryview, codec: str, extradata: bytes | None) -> bool:
    """Whether decoding from this keyframe's packet gives exact pictures.

    Args:
        data: the packet.
        codec: name of the codec.
        extradata: the stream's; its first byte tells NAL units with lengths (1) from those with start codes.
    """
    if codec not in _CLEAN_SLICES:
        return True
    lengths = bool(extradata) and extradata is not None and extradata[0] == 1
    length_size = 4 if not lengths or extradata is None else (extradata[4 if codec == "h264" else 21] & 3) + 1
    for header in _nal_headers(data, length_size if lengths else None):
        nal_type = header & 0x1F if codec == "h264" else header >> 1 & 0x3F
        if nal_type in _SLICES[codec]:
            return nal_type in _CLEAN_SLICES[codec]
    return False


def _nal_headers(data: memoryview, length_size: int | None) -> Iterator[int]:
    """First byte of each NAL unit of a packet."""
    position = 0
    if length_size is not None:
        while position + length_size < len(data):
            yield data[position + length_size]
            position += length_size + int.from_bytes(data[position : position + length_size], "big")
        return
    raw = bytes(data)
    while (position := raw.find(b"\x00\x00\x01", position)) >= 0 and position + 3 < len(raw):
        yield raw[position + 3]
        position += 3


@dataclasses.dataclass(frozen=True)
class PacketTable:
    """Packets of one video stream, in file order.

    Attributes:
        pts: int64 (packets,), presentation times in units of the stream's time base.
        dts: int64 (packets,), decoding times; equal to `pts` where the container has none.
        is_keyframe: bool (packets,), whether decoding may start there.
    """

    pts: npt.NDArray[np.int64]
    dts: npt.NDArray[np.int64]
    is_keyframe: npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Span:
    """Packets to decode in one go.

    Attributes:
        first: index of a keyframe packet.
        last: index of the last packet needed.
        wanted: presentation times of the chosen frames among them.
    """

    first: int
    last: int
    wanted: frozenset[int]


def plan_spans(table: PacketTable, wanted: Sequence[int]) -> list[Span]:
    """Finds the packets that chosen frames depend on.

    Args:
        table: all packets, with unique presentation times.
        wanted: presentation times of the chosen frames, ascending.

    Returns:
        Spans in file order that do not overlap; each can be decoded on its own.
    """
    position = {int(pts): index for index, pts in enumerate(table.pts)}
    keyframes = np.flatnonzero(table.is_keyframe)
    spans: list[Span] = []
    for pts in wanted:
        index = position[int(pts)]
        first = _start(table, keyframes, index)
        if spans and first <= spans[-1].last:
            spans[-1] = Span(spans[-1].first, max(spans[-1].last, index), spans[-1].wanted | {int(pts)})
        else:
            spans.append(Span(first, index, frozenset({int(pts)})))
    return spans


def _start(table: PacketTable, keyframes: npt.NDArray[np.int64], index: int) -> int:
    """The last keyframe at or before a packet, both in file order and in time; 0 where there is none."""
    candidate = int(np.searchsorted(keyframes, index, side="right")) - 1
    while candidate >= 0 and table.pts[keyframes[candidate]] > table.pts[index]:
        # A frame shown before the keyframe that it follows in the file refers to the group before.
        candidate -= 1
    return int(keyframes[candidate]) if candidate >= 0 else 0


def decode_spans(
    container: Any, stream: Any, table: PacketTable, spans: Sequence[Span], *, deadline: Deadline
) -> Iterator[Any]:
    """Decodes the chosen frames.

    Args:
        container: an opened PyAV container at its start.
        stream: its video stream.
        table: the stream's packets.
        spans: of those from `plan_spans`, in their order.
        deadline: checked at every packet.

    Yields:
        The chosen frames in order of presentation.

    Raises:
        DecodingError: when packets or frames are not those of the table; frames yielded so far are right.
    """
    codec = stream.codec_context
    can_skip = codec.name in _CODECS_WITH_SKIPPABLE_FRAMES
    packets = _Packets(container, stream, table, deadline)
    for number, span in enumerate(spans):
        if number:
            codec.flush_buffers()
        frames = _SpanFrames(table, span)
        for index, packet in packets.between(span.first, span.last):
            if can_skip:
                codec.skip_frame = "DEFAULT" if int(table.pts[index]) in span.wanted else "NONREF"
            frames.add(_decode(codec, packet))
            yield from frames.ready()
        frames.add(_decode(codec, None))
        yield from frames.all()


def _decode(codec: Any, packet: Any) -> Sequence[Any]:
    try:
        frames: Sequence[Any] = codec.decode(packet)
    except av.error.FFmpegError as error:
        raise DecodingError(f"decoding failed: {error}") from error
    return frames


class _SpanFrames:
    """The wanted ones among the decoded frames of a span.

    A frame is handed out when everything it may refer to has come out sound, which can be shown after it: in

        I0 P8 B4 B2      (numbers are presentation times)

    frame 2 waits for frame 8.
    """

    def __init__(self, table: PacketTable, span: Span) -> None:
        pts = table.pts[span.first : span.last + 1]
        latest = np.maximum.accumulate(pts)
        self._first = int(pts[0]) if span.first else None
        self._wanted = span.wanted
        # (time, time of the last frame shown among those before it in the file)
        self._pending = sorted((int(t), int(last)) for t, last in zip(pts, latest, strict=True) if t in span.wanted)
        self._found: dict[int, Any] = {}
        self._last = -math.inf

    def add(self, frames: Sequence[Any]) -> None:
        """Takes what the decoder gave."""
        for frame in frames:
            if frame.pts is None or frame.pts <= self._last:
                raise DecodingError(f"a frame of time {frame.pts} came after one of time {self._last}")
            if frame.is_corrupt:
                raise DecodingError(f"the frame at {frame.pts} came out damaged")
            if frame.pts == self._first and not frame.key_frame:
                raise DecodingError(f"the frame at {frame.pts} is no keyframe")
            self._last = frame.pts
            if frame.pts in self._wanted:
                self._found[frame.pts] = frame

    def ready(self) -> Iterator[Any]:
        """Wanted frames, in order, that can be handed out."""
        while self._pending and self._pending[0][0] in self._found and self._pending[0][1] <= self._last:
            yield self._found.pop(self._pending.pop(0)[0])

    def all(self) -> Iterator[Any]:
        """The rest of the wanted frames, after the last packet."""
        for time, _ in self._pending:
            if time not in self._found:
                raise DecodingError(f"the frame at {time} did not come out of its group of pictures")
            yield self._found.pop(time)


class _Packets:
    """Walks through a stream's packets by their index in the table, seeking where that saves reading."""

    def __init__(self, container: Any, stream: Any, table: PacketTable, deadline: Deadline) -> None:
        self._deadline = deadline
        self._container = container
        self._stream = stream
        self._table = table
        self._position = {
            (int(pts), int(dts)): index for index, (pts, dts) in enumerate(zip(table.pts, table.dts, strict=True))
        }
        self._next = 0
        self._demuxed = read_packets(container, stream)

    def between(self, first: int, last: int) -> Iterator[tuple[int, Any]]:
        """Packets `first` to `last`, both included.

        Raises:
            DecodingError: when the container gives other packets.
        """
        if first - self._next >= _PACKETS_WORTH_A_SEEK:
            self._seek(first)
        while self._next <= last:
            packet = self._read()
            if packet is None:
                raise DecodingError(f"packet {self._next} of {len(self._table.pts)} was not there on a second reading")
            index = self._index(packet)
            if index > self._next and index > first:
                raise DecodingError(f"packet {index} came where packet {self._next} was expected")
            self._next = index + 1
            if index >= first:
                yield index, packet

    def _read(self) -> Any:
        self._deadline.check()
        try:
            return next(self._demuxed, None)
        except av.error.FFmpegError as error:
            raise DecodingError(f"reading failed: {error}") from error

    def _seek(self, first: int) -> None:
        try:
            self._container.seek(int(self._table.dts[first]), stream=self._stream, backward=True, any_frame=False)
        except av.error.FFmpegError as error:
            raise DecodingError(f"seeking failed: {error}") from error
        self._demuxed = read_packets(self._container, self._stream)
        # Where the seek has landed shows with the first packet; anything up to `first` is right.
        self._next = first

    def _index(self, packet: Any) -> int:
        dts = packet.pts if packet.dts is None else packet.dts
        index = self._position.get((packet.pts, dts))
        if index is None:
            raise DecodingError(f"a packet with times {packet.pts}, {packet.dts} was not there on the first reading")
        return index
