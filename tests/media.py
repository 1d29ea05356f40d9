"""Generated clips whose frame numbers can be read from their pixels."""

from fractions import Fraction

import av
import numpy as np

BITS = 12
CELL = 16


def numbered_picture(number, height=96, width=208, background=40):
    """uint8 (height, width, 3): the number in binary as bright and dark cells along the top, plus texture."""
    picture = np.full((height, width, 3), background, dtype=np.uint8)
    rows, columns = np.mgrid[0:height, 0:width]
    picture[..., 1] = (rows * 2 + number * 3) % 200
    picture[..., 2] = (columns + number * 5) % 200
    for bit in range(BITS):
        value = 230 if number >> bit & 1 else 20
        picture[: 2 * CELL, bit * CELL : (bit + 1) * CELL] = value
    return picture


def read_number(picture):
    """The number in a decoded picture (of the size it was made with)."""
    number = 0
    for bit in range(BITS):
        cell = picture[4 : 2 * CELL - 4, bit * CELL + 4 : (bit + 1) * CELL - 4]
        number |= int(cell.mean() > 125) << bit
    return number


def write_clip(
    path,
    num_frames=50,
    rate=25,
    *,
    codec="libx264",
    pix_fmt="yuv420p",
    options=None,
    pts=None,
    time_base=None,
    start=0,
    pictures=None,
    height=96,
    width=208,
    container_format=None,
    container_options=None,
):
    """Encodes a numbered clip.

    Args:
        pts: presentation times in units of `time_base` instead of a constant rate.
        start: offset of the first frame, in frames.
        pictures: other pictures than numbered ones.
    """
    rate = Fraction(rate).limit_denominator(1001)
    with av.open(str(path), "w", format=container_format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        base = Fraction(time_base) if time_base else 1 / rate
        stream.codec_context.time_base = base
        for i in range(num_frames):
            pixels = pictures[i] if pictures is not None else numbered_picture(i, height, width)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.time_base = base
            frame.pts = int(pts[i]) if pts is not None else i + start
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return str(path)
