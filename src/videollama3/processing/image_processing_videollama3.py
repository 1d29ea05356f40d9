"""Images -> patches of their own resolution.

Images in any form enter, `pixel_values`, `image_grid_thw` and `image_merge_sizes` leave; conversations are
left to `processing_videollama3.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers.feature_extraction_utils import BatchFeature

from .media_requests import PixelDtype, encode_request, to_image_tensors
from .pixel_processor_videollama3 import VideoLlama3PixelProcessor
from .planned_media import plan_image
from .visual_budget import ItemSize, target_sizes


class VideoLlama3ImageProcessor(VideoLlama3PixelProcessor):
    """Turns images into patches by the authors' size rule; needs neither torchvision nor a GPU."""

    _auto_class = "AutoImageProcessor"
    model_input_names: ClassVar[list[str]] = ["pixel_values", "image_grid_thw", "image_merge_sizes"]
    nested_key = "image_processor"
    config_files = ("preprocessor_config.json",)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """The same as `preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: Any,
        *,
        merge_size: int | None = None,
        min_tokens: int | None = None,
        max_tokens: int | None = None,
        max_visual_tokens: int | None = None,
        do_resize: bool | None = None,
        do_rescale: bool | None = None,
        do_normalize: bool | None = None,
        pixel_dtype: PixelDtype | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Processes one request's images, or several requests' (a list of lists).

        Args:
            images: one image or a list (one request, one shared token budget), or a list of lists (one
                request each). For forms of an image see `media_sources.load_picture`.
            merge_size: side of a block of patches that becomes one visual token.
            min_tokens: a picture below this many visual tokens is enlarged.
            max_tokens: visual tokens of one request.
            max_visual_tokens: a limit per request that also outranks `min_tokens`.
            do_resize: whether pictures are resized.
            do_rescale: whether grey levels are rescaled.
            do_normalize: whether they are normalised.
            pixel_dtype: "float32" or "uint8".
            return_tensors: "pt" or None (both give torch tensors).

        Returns:
            `pixel_values` (patches, 3 * patch_size**2), `image_grid_thw` (images, 3), `image_merge_sizes` (images,).

        Raises:
            ValueError: for a picture that cannot be read, naming it.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"Expected return_tensors='pt' (torch), got {return_tensors!r}.")
        settings = self.settings(
            merge_size=merge_size,
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            do_resize=do_resize,
            do_rescale=do_rescale,
            do_normalize=do_normalize,
        )
        encoded = []
        count = 0
        for request in image_rows(images):
            planned = []
            for source in request:
                planned.append(plan_image(source, name=f"image {count}"))
                count += 1
            encoded += encode_request(
                planned,
                image=settings,
                video=settings,
                max_visual_tokens=max_visual_tokens,
                pixel_dtype=pixel_dtype or self.pixel_dtype,
            )
        if not encoded:
            raise ValueError("Expected at least one image, got none.")
        return BatchFeature(to_image_tensors(encoded))

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are stored."""
        # The official class name: the name of this class is also one of transformers' own.
        return {**super().to_dict(), "image_processor_type": "Videollama3ImageProcessor"}

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Patches (before the merge) of one image alone in its request, from its size in pixels."""
        options = images_kwargs or {}
        settings = self.settings(
            **{name: options.get(name) for name in ("merge_size", "patch_size", "min_tokens", "max_tokens")}
        )
        ((target_height, target_width),) = target_sizes(
            [ItemSize(1, height, width, settings.merge_size)],
            patch_size=settings.patch_size,
            min_tokens=settings.min_tokens,
            max_tokens=settings.max_tokens,
            max_visual_tokens=options.get("max_visual_tokens"),
        )
        return (target_height // settings.patch_size) * (target_width // settings.patch_size)


def image_rows(images: Any) -> list[list[Any]]:
    """Brings one image, a list of images, or a list of lists of images to rows of images."""
    if not isinstance(images, (list, tuple)):
        return [[images]]
    if any(isinstance(row, (list, tuple)) for row in images):
        return [list(row) if isinstance(row, (list, tuple)) else ([] if row is None else [row]) for row in images]
    return [[image for image in images if image is not None]]
