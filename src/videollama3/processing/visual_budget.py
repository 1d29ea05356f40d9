"""To which size each picture is resized, so that a request stays within its visual-token budget.

Picture sizes enter, sizes in whole patches leave; resizing itself is left to `patches.py`. The rule is the
authors': all items of one request share one budget.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class ItemSize:
    """One image or video of a request.

    Attributes:
        num_frames: 1 for an image.
        height: of a picture, in pixels.
        width: of a picture, in pixels.
        merge: side of the block of patches that becomes one visual token.
    """

    num_frames: int
    height: int
    width: int
    merge: int


def target_sizes(
    items: list[ItemSize],
    *,
    patch_size: int = 14,
    min_tokens: int = 16,
    max_tokens: int = 16384,
    max_visual_tokens: int | None = None,
) -> list[tuple[int, int]]:
    """Sizes that the items of one request are resized to.

    Args:
        items: all images and videos of the request.
        patch_size: side of a patch, in pixels.
        min_tokens: a picture below this many tokens is enlarged, even beyond `max_tokens` (as the authors
            do); only when all items have one merge size.
        max_tokens: visual tokens of the whole request, before pruning.
        max_visual_tokens: a limit that holds whatever `min_tokens` says.

    Returns:
        (height, width) in pixels for each item, multiples of `patch_size * merge`, at least one of them.

    Raises:
        ValueError: when even one token per picture exceeds `max_visual_tokens`.
    """
    if not items:
        return []
    if max_visual_tokens is None:
        return _official_sizes(items, patch_size, min_tokens, max_tokens)
    if isinstance(max_visual_tokens, bool) or not isinstance(max_visual_tokens, int) or max_visual_tokens < 1:
        raise ValueError(f"Expected max_visual_tokens as a positive integer, got {max_visual_tokens!r}.")
    num_frames = sum(item.num_frames for item in items)
    if num_frames > max_visual_tokens:
        raise ValueError(
            f"Expected max_visual_tokens of at least {num_frames}, one for each picture of the request, got "
            f"{max_visual_tokens}: raise it, or lower max_frames."
        )
    sizes = _official_sizes(items, patch_size, min_tokens, min(max_tokens, max_visual_tokens))
    if _count(items, sizes, patch_size) <= max_visual_tokens:
        return sizes
    # More than `max_tokens`, as `min_tokens` asks for that: only the limit is left.
    sizes = _official_sizes(items, patch_size, 1, max_visual_tokens)
    return _shrink_to(items, sizes, patch_size, max_visual_tokens)


def _official_sizes(items: list[ItemSize], patch_size: int, min_tokens: int, max_tokens: int) -> list[tuple[int, int]]:
    if len({item.merge for item in items}) == 1:
        num_frames = sum(item.num_frames for item in items)
        factor = patch_size * items[0].merge
        return [_single_merge_size(item, factor, num_frames, min_tokens, max_tokens) for item in items]
    factors = [patch_size * item.merge for item in items]
    total = sum(
        item.num_frames * math.ceil(item.height / factor) * math.ceil(item.width / factor)
        for item, factor in zip(items, factors, strict=True)
    )
    if total > max_tokens:
        beta = math.sqrt(total / max_tokens)
        return [
            (
                _at_least_one(item.height / beta, factor, floor=True),
                _at_least_one(item.width / beta, factor, floor=True),
            )
            for item, factor in zip(items, factors, strict=True)
        ]
    return [
        (_at_least_one(item.height, factor, floor=False), _at_least_one(item.width, factor, floor=False))
        for item, factor in zip(items, factors, strict=True)
    ]


def _single_merge_size(
    item: ItemSize, factor: int, num_frames: int, min_tokens: int, max_tokens: int
) -> tuple[int, int]:
    max_pixels = max_tokens * factor * factor // num_frames
    min_pixels = min_tokens * factor * factor
    height = _at_least_one(item.height, factor, floor=False)
    width = _at_least_one(item.width, factor, floor=False)
    if height * width > max_pixels:
        beta = math.sqrt(item.height * item.width / max_pixels) if max_pixels else math.inf
        height = _at_least_one(item.height / beta, factor, floor=True)
        width = _at_least_one(item.width / beta, factor, floor=True)
    if height * width < min_pixels:
        beta = math.sqrt(min_pixels / (item.height * item.width))
        height = math.ceil(item.height * beta / factor) * factor
        width = math.ceil(item.width * beta / factor) * factor
    return height, width


def _at_least_one(pixels: float, factor: int, *, floor: bool) -> int:
    count = math.floor(pixels / factor) if floor else round(pixels / factor)
    return max(count, 1) * factor


def _count(items: list[ItemSize], sizes: list[tuple[int, int]], patch_size: int) -> int:
    return sum(
        item.num_frames * (height // (patch_size * item.merge)) * (width // (patch_size * item.merge))
        for item, (height, width) in zip(items, sizes, strict=True)
    )


def _shrink_to(
    items: list[ItemSize], sizes: list[tuple[int, int]], patch_size: int, max_visual_tokens: int
) -> list[tuple[int, int]]:
    """Takes rows or columns off the largest items until the limit holds (sides held at one factor did not)."""
    sizes = list(sizes)
    while (excess := _count(items, sizes, patch_size) - max_visual_tokens) > 0:
        tokens = [_count([item], [size], patch_size) for item, size in zip(items, sizes, strict=True)]
        i = max(range(len(items)), key=lambda k: tokens[k] // items[k].num_frames)
        factor = patch_size * items[i].merge
        long, short = max(sizes[i]) // factor, min(sizes[i]) // factor
        step = max(1, min(long - 1, excess // (short * items[i].num_frames)))
        shrunk = (long - step) * factor
        sizes[i] = (shrunk, sizes[i][1]) if sizes[i][0] >= sizes[i][1] else (sizes[i][0], shrunk)
    return sizes
