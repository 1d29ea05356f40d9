"""What the image and the video processor share: their settings, and how they are stored.

A preprocessor configuration of any layout enters (ours, official, native), typed settings leave; pixels are
handled by `media_requests.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import cached_file

from .media_requests import PixelDtype, PixelSettings

# Limits in pixels of a whole request, as transformers' own class and Qwen2-VL's take them.
PIXEL_LIMITS = ("size", "min_pixels", "max_pixels")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder")


class VideoLlama3PixelProcessor(BaseImageProcessor):
    """Settings common to images and videos.

    Args:
        patch_size: side of a patch in pixels.
        merge_size: side of a block of patches that becomes one visual token.
        min_tokens: a picture below this many visual tokens is enlarged.
        max_tokens: visual tokens of a whole request, before pruning.
        do_resize: whether pictures are resized.
        resample: Pillow's number of the filter (3 = bicubic).
        do_rescale: whether grey levels are multiplied by `rescale_factor`.
        rescale_factor: factor of grey levels.
        do_normalize: whether mean is subtracted and std divided out.
        image_mean: per channel.
        image_std: per channel.
        do_convert_rgb: kept for transformers' sake; pictures are always read as RGB.
        pixel_dtype: "float32" gives normalised values, "uint8" raw ones that the model normalises.
        kwargs: fields that other layouts carry; of these `size` (`shortest_edge`, `longest_edge`), `min_pixels` and
            `max_pixels` are translated into `min_tokens` and `max_tokens`.
    """

    # Where the settings stand: a key of processor_config.json, or files of their own.
    nested_key: ClassVar[str]
    config_files: ClassVar[tuple[str, ...]]
    fields: ClassVar[tuple[str, ...]] = (
        "patch_size",
        "merge_size",
        "min_tokens",
        "max_tokens",
        "do_resize",
        "resample",
        "do_rescale",
        "rescale_factor",
        "do_normalize",
        "image_mean",
        "image_std",
        "do_convert_rgb",
        "pixel_dtype",
    )

    def __init__(
        self,
        *,
        patch_size: int = 14,
        merge_size: int = 1,
        min_tokens: int = 16,
        max_tokens: int = 16384,
        do_resize: bool = True,
        resample: int = 3,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
        do_convert_rgb: bool = True,
        pixel_dtype: PixelDtype = "float32",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        limits = _token_limits(kwargs, patch_size, merge_size)
        min_tokens, max_tokens = limits.get("min_tokens", min_tokens), limits.get("max_tokens", max_tokens)
        for name, value in (
            ("patch_size", patch_size),
            ("merge_size", merge_size),
            ("min_tokens", min_tokens),
            ("max_tokens", max_tokens),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Expected {name} as a positive integer, got {value!r}.")
        self.patch_size = patch_size
        self.merge_size = merge_size
        self.min_tokens = min_tokens
        self.max_tokens = max_tokens
        self.do_resize = do_resize
        self.resample = int(resample)
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.do_convert_rgb = do_convert_rgb
        self.pixel_dtype: PixelDtype = pixel_dtype

    def settings(self, **overrides: Any) -> PixelSettings:
        """The settings as a record; `overrides` that are None leave the processor's own value."""
        values: dict[str, Any] = {
            "patch_size": self.patch_size,
            "merge_size": self.merge_size,
            "min_tokens": self.min_tokens,
            "max_tokens": self.max_tokens,
            "do_resize": self.do_resize,
            "resample": self.resample,
            "do_rescale": self.do_rescale,
            "rescale_factor": self.rescale_factor,
            "do_normalize": self.do_normalize,
            "image_mean": tuple(self.image_mean),
            "image_std": tuple(self.image_std),
        }
        values.update({key: value for key, value in overrides.items() if value is not None})
        return PixelSettings(**values)

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are stored."""
        output: dict[str, Any] = {name: getattr(self, name) for name in self.fields}
        if getattr(self, "auto_map", None):
            output["auto_map"] = self.auto_map
        return output

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds the processor from stored settings; keyword arguments that are settings override them."""
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        overrides = {name: kwargs.pop(name) for name in (*cls.fields, *PIXEL_LIMITS) if name in kwargs}
        # Translated first: limits of the caller, in pixels or in tokens, come after those that are stored.
        stored = {name: value for name, value in image_processor_dict.items() if name not in PIXEL_LIMITS}
        if "min_tokens" not in stored:
            sizes = stored.get("patch_size", 14), stored.get("merge_size", 1)
            stored |= _token_limits(image_processor_dict, *sizes)
        processor = cls(**{**stored, **overrides})
        return (processor, kwargs) if return_unused_kwargs else processor

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Finds the stored settings in a folder or Hub repository of any layout."""
        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
        for name in (*_HUB_ARGUMENTS, "_from_auto", "_from_pipeline", "user_agent", "trust_remote_code"):
            kwargs.pop(name, None)
        kwargs.pop("image_processor_filename", None)
        if os.path.isfile(pretrained_model_name_or_path):
            with open(pretrained_model_name_or_path, encoding="utf-8") as file:
                stored: dict[str, Any] = json.load(file)
            return stored.get(cls.nested_key, stored), kwargs
        for filename in ("processor_config.json", *cls.config_files):
            path = cached_file(
                pretrained_model_name_or_path, filename, _raise_exceptions_for_missing_entries=False, **hub
            )
            if path is None:
                continue
            with open(path, encoding="utf-8") as file:
                content: dict[str, Any] = json.load(file)
            if filename != "processor_config.json":
                return content, kwargs
            if cls.nested_key in content:
                return content[cls.nested_key], kwargs
        raise OSError(
            f"Expected processor_config.json with {cls.nested_key!r}, or one of {', '.join(cls.config_files)}, in "
            f"{str(pretrained_model_name_or_path)!r}, found none: save a processor there first."
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.to_dict(), indent=2)}"


def _token_limits(given: dict[str, Any], patch_size: int, merge_size: int) -> dict[str, int]:
    """Token limits from limits in pixels, where there are any."""
    size = given.get("size")
    edges = dict(size) if isinstance(size, Mapping) else {}
    token_pixels = (patch_size * merge_size) ** 2
    limits = {}
    for name, pixels, edge in (("min", "min_pixels", "shortest_edge"), ("max", "max_pixels", "longest_edge")):
        value = given.get(pixels) if given.get(pixels) is not None else edges.get(edge)
        if value is not None:
            limits[f"{name}_tokens"] = max(1, int(value) // token_pixels)
    return limits


__all__ = ["VideoLlama3PixelProcessor"]
