"""Generated media with moving content: sizes and lengths enter, paths of cached files leave.

Files lie in the system's folder for temporary files and are made once; what they are used for is left to the
scripts.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

_VERSION = 2
_RATE = 25


def clip(*, seconds: int, width: int, height: int) -> Path:
    """An H.264 clip (25 frames per second) of a scrolling texture, a moving square and some noise."""
    path = _cache() / f"clip_{seconds}s_{width}x{height}.mp4"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}.mp4")
        _encode(part, seconds * _RATE, width, height)
        part.replace(path)
    return path


def photos(sizes: Sequence[tuple[int, int]]) -> list[Path]:
    """JPEG pictures of (width, height)."""
    paths = []
    for i, (width, height) in enumerate(sizes):
        path = _cache() / f"photo_{i}_{width}x{height}.jpg"
        if not path.exists():
            Image.fromarray(_texture(width, height, seed=i)).save(path, quality=90)
        paths.append(path)
    return paths


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"videollama3-benchmark-media-{_VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _texture(width: int, height: int, seed: int) -> npt.NDArray[np.uint8]:
    """uint8 (height, width, 3): smooth colours with detail at several scales."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), dtype=np.float32)
    for cells, weight in ((4, 90), (16, 60), (64, 30)):
        coarse = rng.random((cells, cells, 3), dtype=np.float32)
        levels = Image.fromarray((coarse * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(levels, dtype=np.float32) * (weight / 180)
    return np.clip(total, 0, 255).astype(np.uint8)


def _encode(path: Path, num_frames: int, width: int, height: int) -> None:
    # The texture is wider than the picture, which slides over it and back.
    texture = _texture(2 * width, height, seed=width)
    rng = np.random.default_rng(height)
    noise = rng.integers(0, 8, (8, height, width, 1), dtype=np.uint8)
    side = height // 4
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_RATE, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # PyAV's default, threads by slice, would cut each picture into slices, as files from elsewhere are not.
        stream.codec_context.thread_type = "FRAME"
        for number in range(num_frames):
            offset = abs((number * 2) % (2 * width) - width)
            picture = np.minimum(texture[:, offset : offset + width], 247) + noise[number % len(noise)]
            top, left = (number * 3) % (height - side), (number * 5) % (width - side)
            picture[top : top + side, left : left + side] = (number * 7) % 256
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
