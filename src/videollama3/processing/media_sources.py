"""Turning what a user hands over (path, URL, bytes, file object, picture) into bytes on disk or pixels.

References to media enter; local paths, byte streams and uint8 RGB pictures leave. Decoding video is left to
`video_reading.py`.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
_DOWNLOAD_TIMEOUT_SECONDS = 60
# Larger files are for the caller to fetch, to a disk of their choice.
MAX_DOWNLOAD_BYTES = 32 * 2**30


def open_source(source: Any, *, what: str, max_seconds: float = 3600.0) -> str | BinaryIO:
    """Resolves a reference to a local path or a seekable binary stream.

    Args:
        source: a path, an http(s), file or data URL, bytes, or a binary file object.
        what: how to call it in errors, for instance "video 2".
        max_seconds: a download takes at most so long.

    Returns:
        A path that exists, or a stream.

    Raises:
        FileNotFoundError: for a path that does not exist.
        TypeError: for an object that is none of these.
        ValueError: for an empty stream, a broken data URL, a download that breaks off or is larger than
            `MAX_DOWNLOAD_BYTES`, or takes too long.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _nonempty(io.BytesIO(bytes(source)), what)
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, str):
        return _open_string(source, what, max_seconds)
    if hasattr(source, "read") and hasattr(source, "seek") and not isinstance(source, io.TextIOBase):
        return _nonempty(source, what)
    raise TypeError(
        f"Expected {what} as a path, URL, bytes or binary file object, got {type(source).__name__}: {source!r:.80}."
    )


def describe(source: Any) -> str:
    """A short name of a source for error messages."""
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, str):
        return source if len(source) <= 200 else source[:100] + "..."
    name = getattr(source, "name", None)
    return str(name) if isinstance(name, str) else f"<{type(source).__name__}>"


def _open_string(source: str, what: str, max_seconds: float) -> str | BinaryIO:
    scheme = source.split(":", 1)[0].lower() if re.match(r"^[a-zA-Z][a-zA-Z0-9+.-]+:", source) else ""
    if scheme in ("http", "https"):
        return _nonempty(_download(source, what, max_seconds), what, describe(source))
    if scheme == "data":
        return _nonempty(_decode_data_url(source, what), what)
    path = unquote(urlsplit(source).path) if scheme == "file" else os.path.expanduser(source)
    if not os.path.exists(path):
        raise FileNotFoundError(f"Expected {what} at an existing path, got {describe(path)!r}: no such file.")
    if not os.path.isfile(path) and not os.path.isdir(path):
        raise ValueError(
            f"Expected {what} as a file or a folder, got {describe(path)!r}, which is a device or a pipe."
        )
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise ValueError(f"Expected {what} with content, got {describe(path)!r}: the file is empty.")
    return path


def _download(url: str, what: str, max_seconds: float) -> BinaryIO:
    # Not through huggingface_hub's session: a user's media server is no Hub, and HF_HUB_OFFLINE not about it.
    file = _TemporaryDownload()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "videollama3"})
        with _web_opener().open(request, timeout=_DOWNLOAD_TIMEOUT_SECONDS) as response:
            _copy(response, file.file, max_seconds)
        return file  # type: ignore[return-value] # has what readers use of a binary file
    except urllib.error.HTTPError as error:
        error.close()
        kind = FileNotFoundError if error.code == 404 else ValueError
        raise kind(
            f"Expected {what} at a URL that answers, got {describe(url)!r}: {error.code} {error.reason}."
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"Expected {what} at a URL that answers, got {describe(url)!r}: {error}.") from error


def _copy(response: http.client.HTTPResponse, file: BinaryIO, max_seconds: float) -> None:
    """Writes what a server sends, as it comes; ValueError where that is too much, too slow, or not all."""
    declared = response.length
    end = time.monotonic() + max_seconds
    received = 0
    chunk = b""
    while True:
        if max(received, declared or 0) > MAX_DOWNLOAD_BYTES:
            raise ValueError(
                f"it has {declared or 'more'} bytes, and at most {MAX_DOWNLOAD_BYTES} are downloaded; fetch it "
                "yourself and give the path"
            )
        if time.monotonic() > end:
            raise ValueError(
                f"the download was not over after {max_seconds:g} seconds and {received} bytes; fetch it yourself and "
                "give the path, or raise the limit (`max_read_seconds` of a video)"
            )
        file.write(chunk)
        # Not in blocks of a fixed size: those of a server that sends a byte a minute would take for ever.
        if not (chunk := response.read1(2**20)):
            break
        received += len(chunk)
    if declared is not None and received < declared:
        raise ValueError(f"the download broke off after {received} of {declared} bytes")


class _TemporaryDownload:
    """A downloaded file on disk, gone as soon as nobody holds this object any more."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __del__
        self.read, self.seek, self.tell = self.file.read, self.file.seek, self.file.tell

    def __del__(self) -> None:
        self.file.close()


def _web_opener() -> urllib.request.OpenerDirector:
    """Follows redirects to http and https only: urllib's own opener also knows ftp, file and data."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _decode_data_url(url: str, what: str) -> BinaryIO:
    header, separator, payload = url.partition(",")
    if not separator or not header.endswith(";base64"):
        raise ValueError(f"Expected {what} as a base64 data URL (data:...;base64,...), got {header[:60]!r}.")
    try:
        return io.BytesIO(base64.b64decode("".join(payload.split()), validate=True))
    except binascii.Error as error:
        raise ValueError(f"Expected {what} as valid base64, got data that is not: {error}.") from error


def _nonempty(stream: BinaryIO, what: str, shown: str | None = None) -> BinaryIO:
    stream.seek(0, io.SEEK_END)
    size = stream.tell()
    stream.seek(0)
    if size == 0:
        raise ValueError(f"Expected {what} with content, got {shown or describe(stream)}: it is empty.")
    return stream


def load_picture(source: Any, *, what: str) -> Pixels:
    """Reads one picture as RGB.

    Args:
        source: a path, URL, bytes or file object of an image file; a PIL image; a numpy array or torch
            tensor, uint8 0..255 or float 0..1, of shape (height, width), (height, width, channels) or
            (channels, height, width) with 1, 3 or 4 channels.
        what: how to call it in errors.

    Returns:
        uint8 (height, width, 3), 0..255. Alpha is dropped; 16-bit pictures keep their upper 8 bits; an EXIF
        orientation is applied.

    Raises:
        ValueError: when it cannot be read as a picture.
    """
    if isinstance(source, Image.Image):
        return _load_pil(source, source, what)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return array_to_rgb(source, what=what)
    if (
        isinstance(source, str)
        and re.fullmatch(r"[A-Za-z0-9+/\s]{200,}={0,2}\s*", source)
        and not os.path.exists(source)
    ):
        source = f"data:;base64,{''.join(source.split())}"
    opened = open_source(source, what=what)
    if isinstance(opened, str) and os.path.isdir(opened):
        raise ValueError(f"Expected {what} as an image file, got the folder {opened!r}.")
    try:
        image = Image.open(opened)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"Expected {what} as an image file, got {describe(source)!r}: format not recognised."
        ) from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"Expected {what} as a whole image file, got {describe(source)!r}: {error}.") from error
    with image:
        return _load_pil(image, source, what)


def _load_pil(image: Image.Image, source: Any, what: str) -> Pixels:
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"Expected {what} as a whole image file, got {describe(source)!r}: {error}.") from error
    return _to_rgb(upright, what)


def _to_rgb(image: Image.Image, what: str) -> Pixels:
    if image.width < 1 or image.height < 1:
        raise ValueError(f"Expected {what} with at least one pixel, got size {image.width} x {image.height}.")
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"Expected {what} with 8 or 16 bits per channel, got 32-bit integers.")
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError(f"Expected {what} with 8 or 16 bits per channel, got floating point pixels (mode F).")
    if image.mode == "P" and "transparency" in image.info:
        # Pillow warns when it drops a palette's transparency in one step.
        image = image.convert("RGBA")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def array_to_rgb(array: npt.NDArray[Any] | torch.Tensor, *, what: str) -> Pixels:
    """One picture given as numbers -> uint8 (height, width, 3); see `load_picture`."""
    return frames_to_rgb(array[None], what=what)[0]


def frames_to_rgb(frames: npt.NDArray[Any] | torch.Tensor, *, what: str) -> Pixels:
    """Pictures given as one array or tensor -> uint8 (frames, height, width, 3).

    Args:
        frames: (frames, height, width), (frames, height, width, channels) or (frames, channels, height,
            width), uint8 0..255 or float 0..1, with 1, 3 or 4 channels. Where both layouts fit, numpy is
            read as channels last and torch as channels first.
        what: how to call it in errors.
    """
    first = isinstance(frames, torch.Tensor)
    if isinstance(frames, torch.Tensor):
        # numpy knows no bfloat16.
        values = (frames.float() if frames.dtype == torch.bfloat16 else frames).detach().cpu().numpy()
    else:
        values = np.asarray(frames)
    if values.ndim == 3:
        values = values[..., None]
    elif values.ndim == 4:
        is_last, is_first = values.shape[-1] in (1, 3, 4), values.shape[1] in (1, 3, 4)
        if is_first and (first or not is_last):
            values = values.transpose(0, 2, 3, 1)
        elif not is_last:
            raise ValueError(
                f"Expected {what} with 1, 3 or 4 channels first or last, got shape {tuple(frames.shape[1:])}."
            )
    else:
        raise ValueError(
            f"Expected {what} as (height, width[, channels]) pictures, got shape {tuple(frames.shape[1:])}."
        )
    if 0 in values.shape:
        raise ValueError(f"Expected {what} with at least one frame and one pixel, got shape {tuple(frames.shape)}.")
    values = values[..., :3]
    if values.shape[-1] == 1:
        values = np.repeat(values, 3, axis=-1)
    return np.ascontiguousarray(_to_uint8(values, what))


def is_scaled(source: Any) -> bool:
    """Whether a picture or several are given as numbers 0..1 instead of grey levels."""
    if isinstance(source, torch.Tensor):
        return source.dtype.is_floating_point
    return isinstance(source, np.ndarray) and np.issubdtype(source.dtype, np.floating)


def _to_uint8(values: npt.NDArray[Any], what: str) -> Pixels:
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if np.issubdtype(values.dtype, np.integer):
        low, high = values.min(), values.max()
        if low < 0 or high > 255:
            raise ValueError(
                f"Expected {what} as uint8 0..255 or float 0..1, got {values.dtype} from {low} to {high}."
            )
        return values.astype(np.uint8)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"Expected {what} as uint8 0..255 or float 0..1, got dtype {values.dtype}.")
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(
            f"Expected {what} as uint8 0..255 or float 0..1, got {values.dtype} from {low:g} to {high:g}."
        )
    return np.rint(values * 255.0).astype(np.uint8)
