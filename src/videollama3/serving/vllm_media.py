"""Images and videos in the forms that vLLM hands over -> encoded media of one request.

Pictures, files and frames enter, with vLLM's wrappers around them; patches, masks and frame times leave, one
item at a time. Caching items and placing their tokens is left to `vllm_model.py`.

The media of a request share one budget of visual tokens, while vLLM stores each item for other requests to
reuse. So a request says of every item whether its companions changed its size: such an item has a name of its
own in vLLM's caches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from ..processing.call_options import read_options
from ..processing.conversations import MediaReference
from ..processing.media_requests import EncodedMedia
from ..processing.media_sources import open_source
from ..processing.planned_media import PlannedMedia, is_frame_list
from ..processing.processing_videollama3 import VideoLlama3Processor

# What the metadata of decoded frames may say beside what transformers' record knows.
_FRAME_OPTIONS = ("timestamps", "do_sample_frames", "max_frames", "start_time", "end_time", "max_visual_tokens")


@dataclasses.dataclass(frozen=True)
class Medium:
    """One image or video as it was handed over.

    Attributes:
        kind: image or video.
        source: a file as bytes or path, a picture, or a video's frames.
        options: of a video, under the names of the processor's per-video options.
    """

    kind: Literal["image", "video"]
    source: Any
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def identity(self) -> object:
        """What two media must differ in to be told apart: content, and how a video is sampled."""
        return [self.kind, _content(self.source), dict(self.options)]


def _content(source: Any) -> object:
    if isinstance(source, (str, os.PathLike)):
        path = os.path.realpath(source)
        files = sorted(os.scandir(path), key=lambda file: file.name) if os.path.isdir(path) else [path]
        stats = [(os.fspath(file), os.stat(file)) for file in files]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    if isinstance(source, (list, tuple)):
        return [_content(part) for part in source]
    if isinstance(source, (bytearray, memoryview)):
        return bytes(source)
    return source


def read_images(data: Any) -> list[Medium | None]:
    """One image or a list, as `multi_modal_data` or vLLM's downloader gives them; None is kept.

    Args:
        data: pictures (PIL, array (height, width, 3), tensor), files (bytes, path, URL), or vLLM's pairs of a
            picture and its file, of which the file is read anew: vLLM has put transparent pictures on white,
            the weights have seen them with their transparency dropped.
    """
    if isinstance(data, (np.ndarray, torch.Tensor)) and data.ndim == 4:
        data = list(data)
    items = data if isinstance(data, list) else [data]
    return [
        None if item is None else Medium("image", _source(getattr(item, "original_bytes", item), "an image"))
        for item in items
    ]


def read_videos(data: Any) -> list[Medium | None]:
    """One video or a list; None is kept.

    Args:
        data: files (bytes, path, URL, folder of pictures), frames (list of pictures, array or tensor of
            (frames, height, width, 3)), or a pair of one of these and its options: for a file those of the
            processor (`fps`, `max_frames`, `start_time`, ...), for frames their metadata (`fps` of the source,
            `frames_indices`, `timestamps`).
    """
    if isinstance(data, (np.ndarray, torch.Tensor)) and data.ndim == 5:
        data = list(data)
    items = data if isinstance(data, list) and not is_frame_list(data) else [data]
    return [None if item is None else _video(item) for item in items]


def _video(item: Any) -> Medium:
    original = getattr(item, "original_bytes", None)
    if original is not None:
        item = item.media
    source, options = item if isinstance(item, tuple) else (item, None)
    if isinstance(source, np.ndarray) and source.ndim == 1:
        # A file that `vllm_plugin.EncodedVideoLoader` handed on.
        source = original if original is not None else source.tobytes()
    source, options = _source(source, "a video"), dict(options or {})
    if isinstance(source, (bytes, str, os.PathLike)):
        return Medium("video", source, options)
    known = {name: options.pop(name) for name in _FRAME_OPTIONS if name in options}
    return Medium("video", source, {**known, **({"video_metadata": options} if options else {})})


def _source(source: Any, what: str) -> Any:
    """URLs are fetched once, here: the name of a file elsewhere says nothing about its content."""
    if isinstance(source, str) and source.split(":", 1)[0].lower() in ("http", "https", "data"):
        with _as_bad_request():
            opened = open_source(source, what=what)
        assert not isinstance(opened, str)
        return opened.read()
    return source


@contextlib.contextmanager
def _as_bad_request() -> Iterator[None]:
    """VLLM answers a ValueError with status 400 and its message, everything else with 500."""
    try:
        yield
    except (OSError, TypeError) as error:
        raise ValueError(str(error)) from error


class RequestMedia:
    """The media of one request, planned together and read when asked for.

    Args:
        processor: of the checkpoint.
        media: in any order; the budget does not depend on it.
        options: of the processor's call, from vLLM's `mm_processor_kwargs`.
    """

    def __init__(self, processor: VideoLlama3Processor, media: Sequence[Medium], options: Mapping[str, Any]) -> None:
        self.processor = processor
        self.media = list(media)
        with _as_bad_request():
            self.options = read_options(options)

    @cached_property
    def changed_sizes(self) -> list[tuple[int, int] | None]:
        """Height and width in pixels of each item, where its companions changed them; else None."""
        if len(self.media) < 2:
            return [None] * len(self.media)
        with _as_bad_request():
            together = self._sizes(self._planned)
            alone = [self._sizes([planned])[0] for planned in self._planned]
        return [size if size != own else None for size, own in zip(together, alone, strict=True)]

    def encode(self, index: int) -> EncodedMedia:
        """Reads one item as this request sees it.

        Raises:
            ValueError: when it cannot be read or the options do not fit; the message names the item.
        """
        with _as_bad_request():
            if any(size is not None for size in self.changed_sizes):
                return self._encoded_together[index]
            return self.processor._encode_planned([self._planned[index]], self.options)[0]

    @cached_property
    def _encoded_together(self) -> list[EncodedMedia]:
        return self.processor._encode_planned(self._planned, self.options)

    @cached_property
    def _planned(self) -> list[PlannedMedia]:
        # One by one: a file that is named twice is sampled for each of its windows.
        seen = {"image": 0, "video": 0}
        planned = []
        for medium in self.media:
            reference = MediaReference(
                medium.kind, medium.source, dict(medium.options), f"{medium.kind} {seen[medium.kind]}"
            )
            planned += self.processor._plan_media([reference], self.options, "")
            seen[medium.kind] += 1
        return planned

    def _sizes(self, planned: Sequence[PlannedMedia]) -> list[tuple[int, int]]:
        return [(item.height, item.width) for item in self.processor._estimate_planned(planned, self.options).items]
