"""Pictures -> patches -> which visual tokens are kept.

uint8 RGB pictures enter one at a time, rows of patch values in merge-block order and the pruning mask leave.
Choosing the size is left to `visual_budget.py`, reading pictures to `media_sources.py` and
`video_reading.py`.

Patch order, drawn for 2 rows x 4 columns of patches and merge size 2: patches 0..3 are one block, and one
visual token after the merge.

    0 1 | 4 5
    2 3 | 6 7
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from PIL import Image

from .media_sources import Pixels

_PATCHES_PER_BLOCK = 256


def resize_picture(picture: Pixels, height: int, width: int, resample: int = Image.Resampling.BICUBIC) -> Pixels:
    """Pillow's antialiased resize on uint8: (h, w, 3) -> (height, width, 3); `resample` is Pillow's number."""
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling(resample)))


def patchify(
    pictures: Iterable[Pixels],
    *,
    num_frames: int,
    height: int,
    width: int,
    patch_size: int,
    merge_size: int,
    resample: int = Image.Resampling.BICUBIC,
) -> Pixels:
    """Resizes pictures and cuts them into patches, holding one full-size picture at a time.

    Args:
        pictures: `num_frames` pictures, uint8 (h, w, 3).
        num_frames: how many will come.
        height: target height in pixels, a multiple of `patch_size * merge_size`.
        width: target width, likewise.
        patch_size: side of a patch.
        merge_size: side of a block of patches.
        resample: Pillow's number of the resampling filter.

    Returns:
        uint8 (num_frames * rows * columns, 3 * patch_size**2), each row one patch as (channel, row, column).
    """
    rows, columns = height // patch_size, width // patch_size
    patches = np.empty((num_frames, rows * columns, 3 * patch_size**2), dtype=np.uint8)
    previous: Pixels | None = None
    count = 0
    for count, picture in enumerate(pictures, start=1):
        if count > num_frames:
            break
        if picture is previous:
            patches[count - 1] = patches[count - 2]
            continue
        _cut(resize_picture(picture, height, width, resample), patches[count - 1], patch_size, merge_size)
        previous = picture
    if count != num_frames:
        raise ValueError(f"Expected {num_frames} pictures, got {'more' if count > num_frames else count}.")
    return patches.reshape(num_frames * rows * columns, -1)


def _cut(picture: Pixels, out: Pixels, patch_size: int, merge_size: int) -> None:
    rows, columns = picture.shape[0] // patch_size, picture.shape[1] // patch_size
    block = picture.reshape(
        rows // merge_size, merge_size, patch_size, columns // merge_size, merge_size, patch_size, 3
    )
    # block row, patch row, pixel row, block column, patch column, pixel column, channel
    view = out.reshape(rows // merge_size, columns // merge_size, merge_size, merge_size, 3, patch_size, patch_size)
    np.copyto(view, block.transpose(0, 3, 1, 4, 6, 2, 5))


def normalization_table(
    *,
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: list[float],
    image_std: list[float],
) -> npt.NDArray[np.float32]:
    """Value of each grey level in each channel after rescaling and normalising: float32 (channels, 256)."""
    levels = np.arange(256, dtype=np.float64)
    if do_rescale:
        levels = levels * rescale_factor
    table = np.stack([levels.astype(np.float32)] * len(image_mean))
    if do_normalize:
        table = (table - np.array(image_mean, np.float32)[:, None]) / np.array(image_std, np.float32)[:, None]
    return table.astype(np.float32)


def normalize_patches(patches: Pixels, table: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Looks every value up in `normalization_table`: uint8 (n, 3 * p * p) -> float32 of the same shape."""
    channels = patches.reshape(len(patches), len(table), -1)
    if channels.shape[2] % 2:
        return np.stack([np.take(levels, channels[:, c]) for c, levels in enumerate(table)], 1).reshape(patches.shape)
    # Two neighbours at a time: half as many look-ups, in a table of 65536 pairs.
    pairs = np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
    pair_tables = [levels[pairs].view(np.float64)[:, 0] for levels in table]
    keys = channels.view(np.uint16)
    out = np.empty(keys.shape, dtype=np.float64)
    # By blocks: a look-up widens its indices to eight bytes each.
    for start in range(0, len(patches), _PATCHES_PER_BLOCK):
        block = slice(start, start + _PATCHES_PER_BLOCK)
        for channel, values in enumerate(pair_tables):
            out[block, channel] = np.take(values, keys[block, channel])
    return out.view(np.float32).reshape(patches.shape)


def keep_mask(
    patches: Pixels,
    *,
    num_frames: int,
    merge_size: int,
    table: npt.NDArray[np.float32],
    threshold: float,
    min_tokens: int,
) -> npt.NDArray[np.bool_]:
    """Which visual tokens differ from the same token of the previous frame (differential frame pruner).

    A token is kept when the mean absolute difference of its normalised values, times 255, exceeds
    `threshold`; with mean and std 0.5 and the default 0.1 that is more than 0.05 grey levels on average. The
    first frame is kept whole; a frame that would keep fewer than `min_tokens` keeps its first ones too.
    Differences are summed in integers, so the mask does not depend on a float precision.

    Args:
        patches: uint8 (num_frames * patches per frame, 3 * p * p) of one video.
        num_frames: of that video.
        merge_size: side of a token's block of patches.
        table: from `normalization_table`; its slope per grey level weighs each channel.
        threshold: in units of 1 / 255 of the normalised range.
        min_tokens: per frame.

    Returns:
        bool (num_frames * tokens per frame,), True = kept.
    """
    channels = len(table)
    tokens = patches.reshape(num_frames, -1, merge_size**2, channels, patches.shape[1] // channels)
    keep = np.ones(tokens.shape[:2], dtype=bool)
    values_per_token = merge_size**2 * patches.shape[1]
    # Value per grey level, times 255.
    slopes_255 = np.abs(table[:, 255].astype(np.float64) - table[:, 0])
    for frame in range(1, num_frames):
        now, before = tokens[frame], tokens[frame - 1]
        difference = np.maximum(now, before) - np.minimum(now, before)
        sums = difference.sum(axis=(1, 3), dtype=np.int64)
        mean_abs_difference_255 = sums @ slopes_255 / values_per_token
        keep[frame] = mean_abs_difference_255 > threshold
        if keep[frame].sum() < min_tokens:
            keep[frame, :min_tokens] = True
    return keep.reshape(-1)
