"""Options of a processor's call: which there are, and one flat record of what was given.

Keywords enter, plain or in groups, by the names of images, videos or both; a dictionary without None leaves. What
they mean is left to those who read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig

from .video_processing_videollama3 import PER_VIDEO_OPTIONS

_TEXT_OPTIONS = (
    "padding",
    "padding_side",
    "truncation",
    "max_length",
    "pad_to_multiple_of",
    "return_tensors",
    "return_attention_mask",
    "return_mm_token_type_ids",
    "return_assistant_tokens_mask",
    "add_special_tokens",
)
IMAGE_SETTINGS = ("merge_size", "min_tokens", "max_tokens", "do_resize", "do_rescale", "do_normalize")
VIDEO_SETTINGS = (
    *IMAGE_SETTINGS,
    "use_token_compression",
    "compression_threshold",
    "compression_min_tokens",
)
_REQUEST_OPTIONS = ("max_visual_tokens", "pixel_dtype", "return_metadata", "progress")
_GROUPS = ("text_kwargs", "images_kwargs", "videos_kwargs", "common_kwargs", "processor_kwargs")
OPTIONS = {*_TEXT_OPTIONS, *VIDEO_SETTINGS, *PER_VIDEO_OPTIONS, *_REQUEST_OPTIONS}
GENERATION_OPTIONS = frozenset(GenerationConfig().to_dict())
# What other processors of transformers call it.
_OURS = {"num_frames": "max_frames", "max_pixels": "max_tokens", "min_pixels": "min_tokens", "size": "max_tokens"}


def read_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """One flat record of what a call asks for.

    Args:
        given: keywords of the call; `images_kwargs` and its like may group them. None counts as nothing.

    Raises:
        TypeError: for options that there are not.
        ValueError: for another `return_tensors` than "pt".
    """
    options: dict[str, Any] = {}
    for group in _GROUPS:
        group_options = dict(given.get(group) or {})
        if group == "images_kwargs":
            group_options = {f"image_{key}" if key in IMAGE_SETTINGS else key: v for key, v in group_options.items()}
        if group == "videos_kwargs":
            group_options = {f"video_{key}" if key in VIDEO_SETTINGS else key: v for key, v in group_options.items()}
        options.update(group_options)
    options.update({key: value for key, value in given.items() if key not in _GROUPS})
    options = {key: value for key, value in options.items() if value is not None}
    if options.get("do_convert_rgb") is True:
        # They always are.
        del options["do_convert_rgb"]
    known = {*OPTIONS, *(f"image_{key}" for key in IMAGE_SETTINGS), *(f"video_{key}" for key in VIDEO_SETTINGS)}
    unknown = [f"{key} (here {_OURS[key]})" if key in _OURS else key for key in sorted(set(options) - known)]
    if unknown:
        raise TypeError(f"Expected options among {', '.join(sorted(OPTIONS))}; got {', '.join(unknown)}.")
    if options.get("return_tensors") not in (None, "pt"):
        raise ValueError(f"Expected return_tensors='pt' (torch) or None, got {options['return_tensors']!r}.")
    return options


def pick(options: Mapping[str, Any], names: Sequence[str], prefix: str) -> dict[str, Any]:
    """Settings of images or of videos: those with the prefix first, then those for both."""
    return {name: options.get(prefix + name, options.get(name)) for name in names}
