"""A picture of what the model sees of a video: its sampled, resized frames with pruned tokens dimmed.

uint8 patches, grid, mask and times of one video enter (from the video processor), a PIL image leaves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Pixels = npt.NDArray[np.uint8]

_CAPTION_HEIGHT = 16
_MARGIN = 6
_MAX_SHEET_WIDTH = 2400
_DIMMED = 0.25


def frames_from_patches(patches: Pixels, grid_thw: tuple[int, int, int], merge_size: int) -> Pixels:
    """Undoes patchifying.

    Args:
        patches: uint8 (frames * rows * columns, 3 * patch**2), in merge-block order.
        grid_thw: frames, rows and columns in patches.
        merge_size: side of a block.

    Returns:
        uint8 (frames, rows * patch, columns * patch, 3).
    """
    frames, rows, columns = grid_thw
    patch = math.isqrt(patches.shape[1] // 3)
    blocks = patches.reshape(
        frames, rows // merge_size, columns // merge_size, merge_size, merge_size, 3, patch, patch
    )
    # frame, block row, patch row, pixel row, block column, patch column, pixel column, channel
    return blocks.transpose(0, 1, 3, 6, 2, 4, 7, 5).reshape(frames, rows * patch, columns * patch, 3)


def dim_pruned(frames: Pixels, keep: npt.NDArray[np.bool_], token_side: int) -> Pixels:
    """Darkens the squares of pruned tokens.

    Args:
        frames: uint8 (frames, height, width, 3).
        keep: bool (frames * token rows * token columns,), True = kept.
        token_side: side of a token's square in pixels.

    Returns:
        uint8 of the same shape.
    """
    count, height, width, _ = frames.shape
    mask = keep.reshape(count, height // token_side, width // token_side)
    mask = mask.repeat(token_side, axis=1).repeat(token_side, axis=2)[..., None]
    return np.where(mask, frames, (frames * _DIMMED).astype(np.uint8))


def contact_sheet(frames: Pixels, captions: Sequence[str]) -> Image.Image:
    """Arranges frames in rows with a caption under each.

    Args:
        frames: uint8 (frames, height, width, 3).
        captions: one line per frame.

    Returns:
        An RGB image at most about 2400 pixels wide.
    """
    count, height, width, _ = frames.shape
    columns = max(1, min(count, math.ceil(math.sqrt(count * (height + _CAPTION_HEIGHT) / width))))
    scale = min(1.0, (_MAX_SHEET_WIDTH / columns - _MARGIN) / width)
    cell_width, cell_height = max(1, int(width * scale)), max(1, int(height * scale))
    step_x, step_y = cell_width + _MARGIN, cell_height + _CAPTION_HEIGHT + _MARGIN
    sheet = Image.new("RGB", (columns * step_x + _MARGIN, math.ceil(count / columns) * step_y + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    for i, (frame, caption) in enumerate(zip(frames, captions, strict=True)):
        x, y = _MARGIN + i % columns * step_x, _MARGIN + i // columns * step_y
        picture = Image.fromarray(frame)
        sheet.paste(picture if scale == 1.0 else picture.resize((cell_width, cell_height)), (x, y))
        draw.text((x, y + cell_height + 1), caption, fill="black", font=font)
    return sheet
