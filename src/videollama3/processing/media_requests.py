"""From planned images and videos of requests to the tensors that the model takes.

Planned media and pixel settings enter; patches, grids, merge sizes and the pruning mask leave, with a record
per item for building the prompt. A request is one conversation (one row of a batch): its items share one
visual-token budget, and a batch gives the same tensors as its rows alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from .patches import keep_mask, normalization_table, normalize_patches, patchify, resize_picture
from .planned_media import PlannedMedia, SampledVideoMetadata
from .video_reading import Progress, UnexpectedFrameError
from .visual_budget import ItemSize, target_sizes

PixelDtype = Literal["float32", "uint8"]


@dataclasses.dataclass(frozen=True)
class PixelSettings:
    """How pictures of one modality become patches; the fields of a preprocessor configuration.

    Attributes:
        patch_size: side of a patch in pixels.
        merge_size: side of a block of patches that becomes one visual token.
        min_tokens: a picture below this many visual tokens is enlarged.
        max_tokens: visual tokens of a whole request, before pruning.
        do_resize: whether pictures are resized at all.
        resample: Pillow's number of the filter (3 = bicubic).
        do_rescale: whether grey levels are multiplied by `rescale_factor`; pictures given as numbers 0..1 are so
            already, whatever it says.
        rescale_factor: 1 / 255.
        do_normalize: whether mean is subtracted and std divided out.
        image_mean: per channel.
        image_std: per channel.
        use_token_compression: whether tokens that barely differ from the previous frame are pruned.
        compression_threshold: see `patches.keep_mask`.
        compression_min_tokens: kept in every frame.
    """

    patch_size: int
    merge_size: int
    min_tokens: int
    max_tokens: int
    do_resize: bool
    resample: int
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    use_token_compression: bool = False
    compression_threshold: float = 0.1
    compression_min_tokens: int = 1

    @property
    def table(self) -> npt.NDArray[np.float32]:
        """Value of each grey level in each channel, as the model sees it."""
        return normalization_table(
            do_rescale=self.do_rescale,
            rescale_factor=self.rescale_factor,
            do_normalize=self.do_normalize,
            image_mean=list(self.image_mean),
            image_std=list(self.image_std),
        )


@dataclasses.dataclass(frozen=True)
class EncodedMedia:
    """One image or video, ready for the model.

    Attributes:
        kind: image or video.
        patches: uint8 or float32 (patches, 3 * patch_size**2).
        grid_thw: frames, rows and columns in patches.
        merge_size: side of a token's block.
        keep: bool (visual tokens,), True = kept.
        timestamps: float64 (frames,), seconds; None for an image.
        metadata: of a video.
    """

    kind: Literal["image", "video"]
    patches: npt.NDArray[np.float32] | npt.NDArray[np.uint8]
    grid_thw: tuple[int, int, int]
    merge_size: int
    keep: npt.NDArray[np.bool_]
    timestamps: npt.NDArray[np.float64] | None
    metadata: SampledVideoMetadata | None

    @property
    def kept_per_frame(self) -> list[int]:
        """Number of kept tokens in each frame."""
        counts: list[int] = self.keep.reshape(self.grid_thw[0], -1).sum(axis=1).tolist()
        return counts


def encode_request(
    items: Sequence[PlannedMedia],
    *,
    image: PixelSettings,
    video: PixelSettings,
    max_visual_tokens: int | None = None,
    pixel_dtype: PixelDtype = "float32",
    progress: Progress | None = None,
) -> list[EncodedMedia]:
    """Sizes, reads, cuts and prunes all media of one request.

    Args:
        items: images and videos of the request, in order of appearance.
        image: settings of images.
        video: settings of videos.
        max_visual_tokens: limit for the request that holds whatever the minimum per picture says.
        pixel_dtype: float32 normalised values, or raw uint8.
        progress: called with (frames read, frames of the request).

    Returns:
        One record per item, in the same order.
    """
    if pixel_dtype not in ("float32", "uint8"):
        raise ValueError(f"Expected pixel_dtype 'float32' or 'uint8', got {pixel_dtype!r}.")
    items = list(items)
    if pixel_dtype == "uint8":
        _check_raw_pixels(image, video)
    while True:
        settings = [_settings_of(item, image if item.kind == "image" else video) for item in items]
        sizes = _sizes(items, settings, max_visual_tokens)
        done = 0
        total = sum(item.num_frames for item in items)
        encoded: list[EncodedMedia] = []
        try:
            for item, setting, size in zip(items, settings, sizes, strict=True):
                encoded.append(_encode(item, setting, size, pixel_dtype, _shift(progress, done, total)))
                done += item.num_frames
            return encoded
        except UnexpectedFrameError as error:
            # The packets of this file did not tell the truth: learn its times by decoding, size anew.
            failed = len(encoded)
            replan = items[failed].replan
            if replan is None:
                raise ValueError(f"{error} The file is damaged.") from error
            items[failed] = replan()


def _settings_of(item: PlannedMedia, settings: PixelSettings) -> PixelSettings:
    """Pictures are grey levels from here on: those that came as numbers 0..1 become so again."""
    if not item.was_scaled or (settings.do_rescale and settings.rescale_factor == 1 / 255):
        return settings
    return dataclasses.replace(settings, do_rescale=True, rescale_factor=1 / 255)


def _check_raw_pixels(image: PixelSettings, video: PixelSettings) -> None:
    """The model normalises raw pixels by one mean and std: nothing else can be asked for them."""
    usual = all(
        settings.do_rescale and settings.do_normalize and abs(settings.rescale_factor - 1 / 255) < 1e-9
        for settings in (image, video)
    )
    if not usual or (image.image_mean, image.image_std) != (video.image_mean, video.image_std):
        raise ValueError(
            "Expected do_rescale by 1 / 255, do_normalize, and one image_mean and image_std for images and videos "
            "with pixel_dtype='uint8', where the model does this; got other settings: use pixel_dtype='float32'."
        )


@dataclasses.dataclass(frozen=True)
class ItemEstimate:
    """What one image or video will cost.

    Attributes:
        name: how errors call it.
        kind: image or video.
        num_frames: 1 for an image.
        height: of a resized picture in pixels.
        width: likewise.
        num_patches: of all its frames.
        num_visual_tokens: after the merge, before pruning; the prompt holds at most so many.
    """

    name: str
    kind: Literal["image", "video"]
    num_frames: int
    height: int
    width: int
    num_patches: int
    num_visual_tokens: int


@dataclasses.dataclass(frozen=True)
class RequestEstimate:
    """What a request will cost before pruning.

    Attributes:
        items: its images and videos.
        values_per_patch: channels * patch_size**2.
    """

    items: tuple[ItemEstimate, ...]
    values_per_patch: int

    @property
    def num_patches(self) -> int:
        """Patches that the vision encoder will see."""
        return sum(item.num_patches for item in self.items)

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens before pruning."""
        return sum(item.num_visual_tokens for item in self.items)

    def pixel_bytes(self, pixel_dtype: PixelDtype = "float32") -> int:
        """Size of the pixel tensors."""
        return self.num_patches * self.values_per_patch * (4 if pixel_dtype == "float32" else 1)

    def processor_bytes(self, pixel_dtype: PixelDtype = "float32") -> int:
        """About how much memory preparing the request takes: the raw patches, and the tensors made of them."""
        raw = self.pixel_bytes("uint8")
        return raw if pixel_dtype == "uint8" else raw + self.pixel_bytes("float32")


def estimate_request(
    items: Sequence[PlannedMedia], *, image: PixelSettings, video: PixelSettings, max_visual_tokens: int | None = None
) -> RequestEstimate:
    """Says what a request will cost, from sizes alone; arguments as in `encode_request`."""
    settings = [image if item.kind == "image" else video for item in items]
    estimates = []
    for item, setting, (height, width) in zip(
        items, settings, _sizes(list(items), settings, max_visual_tokens), strict=True
    ):
        num_patches = item.num_frames * (height // setting.patch_size) * (width // setting.patch_size)
        estimates.append(
            ItemEstimate(
                name=item.name,
                kind=item.kind,
                num_frames=item.num_frames,
                height=height,
                width=width,
                num_patches=num_patches,
                num_visual_tokens=num_patches // setting.merge_size**2,
            )
        )
    return RequestEstimate(tuple(estimates), values_per_patch=3 * video.patch_size**2)


def _sizes(
    items: list[PlannedMedia], settings: list[PixelSettings], max_visual_tokens: int | None
) -> list[tuple[int, int]]:
    if not items:
        return []
    for item, setting in zip(items, settings, strict=True):
        factor = setting.patch_size * setting.merge_size
        if not setting.do_resize and (item.height % factor or item.width % factor):
            raise ValueError(
                f"Expected {item.name} with sides that are multiples of {factor} pixels, since do_resize is off, got "
                f"{item.height} x {item.width}."
            )
    wanted = [
        ItemSize(item.num_frames, item.height, item.width, setting.merge_size)
        for item, setting in zip(items, settings, strict=True)
    ]
    patch_size = settings[0].patch_size
    min_tokens = max(setting.min_tokens for setting in settings)
    max_tokens = min(setting.max_tokens for setting in settings)
    sizes = target_sizes(
        wanted,
        patch_size=patch_size,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        max_visual_tokens=max_visual_tokens,
    )
    for i, item in enumerate(items):
        if not settings[i].do_resize:
            sizes[i] = (item.height, item.width)
        elif item.max_visual_tokens is not None:
            (alone,) = target_sizes(
                [wanted[i]],
                patch_size=patch_size,
                min_tokens=min_tokens,
                max_tokens=max_tokens,
                max_visual_tokens=item.max_visual_tokens,
            )
            sizes[i] = min(sizes[i], alone, key=lambda size: size[0] * size[1])
    _check_limits(items, settings, sizes, max_visual_tokens)
    return sizes


def _check_limits(
    items: list[PlannedMedia],
    settings: list[PixelSettings],
    sizes: list[tuple[int, int]],
    max_visual_tokens: int | None,
) -> None:
    """Raises where pictures that may not be resized break a limit on visual tokens."""
    tokens = [
        item.num_frames * height * width // (setting.patch_size * setting.merge_size) ** 2
        for item, setting, (height, width) in zip(items, settings, sizes, strict=True)
    ]
    limits = [(item.name, count, item.max_visual_tokens) for item, count in zip(items, tokens, strict=True)]
    for name, count, limit in [*limits, ("the request", sum(tokens), max_visual_tokens)]:
        if limit is not None and count > limit:
            raise ValueError(
                f"Expected {name} within max_visual_tokens={limit}, got {count} visual tokens: turn do_resize on, or "
                "hand over smaller pictures."
            )


def _shift(progress: Progress | None, done: int, total: int) -> Progress | None:
    if progress is None:
        return None
    report = progress
    return lambda count, _: report(done + count, total)


def _encode(
    item: PlannedMedia,
    settings: PixelSettings,
    size: tuple[int, int],
    pixel_dtype: PixelDtype,
    progress: Progress | None,
) -> EncodedMedia:
    height, width = size
    rows, columns = height // settings.patch_size, width // settings.patch_size
    # Where a file is decoded in several threads, they resize too; what is left is resized by `patchify`.
    resize = functools.partial(resize_picture, height=height, width=width, resample=settings.resample)
    patches = patchify(
        item.pictures(progress, resize),
        num_frames=item.num_frames,
        height=height,
        width=width,
        patch_size=settings.patch_size,
        merge_size=settings.merge_size,
        resample=settings.resample,
    )
    table = settings.table
    num_tokens = len(patches) // settings.merge_size**2
    keep = np.ones(num_tokens, dtype=bool)
    if item.kind == "video" and settings.use_token_compression:
        keep = keep_mask(
            patches,
            num_frames=item.num_frames,
            merge_size=settings.merge_size,
            table=table,
            threshold=settings.compression_threshold,
            min_tokens=settings.compression_min_tokens,
        )
    return EncodedMedia(
        kind=item.kind,
        patches=patches if pixel_dtype == "uint8" else normalize_patches(patches, table),
        grid_thw=(item.num_frames, rows, columns),
        merge_size=settings.merge_size,
        keep=keep,
        timestamps=item.timestamps,
        metadata=item.metadata,
    )


def to_image_tensors(media: Sequence[EncodedMedia]) -> dict[str, torch.Tensor]:
    """Tensors of all images among `media`, in order; empty when there is none."""
    images = [item for item in media if item.kind == "image"]
    if not images:
        return {}
    return {
        "pixel_values": _concatenate(images),
        "image_grid_thw": torch.tensor([item.grid_thw for item in images], dtype=torch.int64),
        "image_merge_sizes": torch.tensor([item.merge_size for item in images], dtype=torch.int64),
    }


def to_video_tensors(media: Sequence[EncodedMedia]) -> dict[str, torch.Tensor]:
    """Tensors of all videos among `media`, in order; empty when there is none."""
    videos = [item for item in media if item.kind == "video"]
    if not videos:
        return {}
    return {
        "pixel_values_videos": _concatenate(videos),
        "video_grid_thw": torch.tensor([item.grid_thw for item in videos], dtype=torch.int64),
        "video_merge_sizes": torch.tensor([item.merge_size for item in videos], dtype=torch.int64),
        "video_compression_mask": torch.from_numpy(np.concatenate([item.keep for item in videos])),
    }


def _concatenate(media: Sequence[EncodedMedia]) -> torch.Tensor:
    # One item is handed over as it is: a clip's pixels are the largest tensor of a request.
    return torch.from_numpy(media[0].patches if len(media) == 1 else np.concatenate([m.patches for m in media]))
