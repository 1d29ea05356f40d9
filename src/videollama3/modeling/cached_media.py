"""Which media of a conversation a cache holds already, when `generate` goes on from it.

The whole conversation's ids, the cache's length and media enter; the media of what is still to be read leave.
"""

from __future__ import annotations

from typing import Any

import torch

_KINDS = ("image", "video")


def media_after_cache(
    media: dict[str, Any], input_ids: torch.Tensor, *, num_cached: int, token_ids: dict[str, int]
) -> dict[str, Any]:
    """Leaves out media whose visual tokens the cache holds.

    Args:
        media: the model's media tensors, of the whole conversations or of what follows the cache; may be none.
        input_ids: int64 (batch, sequence), cached part included.
        num_cached: tokens of each row that the cache holds.
        token_ids: placeholder of image and video.

    Returns:
        The media tensors of what follows the cache; None in place of those of a kind of which none follows.

    Raises:
        ValueError: when the media are neither those of the whole nor those of the rest, or the cache ends inside one.
    """
    result = dict(media)
    for kind in _KINDS:
        where = input_ids == token_ids[kind]
        totals, cached = where.sum(dim=1).tolist(), where[:, :num_cached].sum(dim=1).tolist()
        patches, tokens = _sizes(media, kind)
        given, whole, rest = sum(tokens), sum(totals), sum(totals) - sum(cached)
        if given == rest:
            continue
        if given != whole:
            raise ValueError(
                f"Expected with past_key_values of {num_cached} tokens either the {kind}s of the whole conversation "
                f"({whole} visual tokens) or those that follow ({rest}), got {kind}s of {given} visual tokens: pass "
                "the processor's tensors of the whole conversation on."
            )
        _select(result, kind, _follows(totals, cached, tokens, kind), patches)
    return result


def _names(kind: str) -> tuple[str, str, str]:
    return "pixel_values" if kind == "image" else "pixel_values_videos", f"{kind}_grid_thw", f"{kind}_merge_sizes"


def _sizes(media: dict[str, Any], kind: str) -> tuple[list[int], list[int]]:
    """Patches and, as far as they are kept, visual tokens of each item."""
    _, grid_name, merge_name = _names(kind)
    grids = media.get(grid_name)
    if grids is None:
        return [], []
    patches = grids.prod(dim=1)
    tokens = (patches // media[merge_name] ** 2).tolist()
    mask = media.get("video_compression_mask") if kind == "video" else None
    if mask is not None:
        tokens = [int(part.sum()) for part in mask.split(tokens)]
    return patches.tolist(), tokens


def _follows(totals: list[int], cached: list[int], tokens: list[int], kind: str) -> list[bool]:
    """Whether each item comes after the cache; items stand in order of the rows."""
    flags: list[bool] = []
    sizes = iter(tokens)
    for total, held in zip(totals, cached, strict=True):
        seen = 0
        while seen < total:
            size = next(sizes)
            if seen < held < seen + size:
                raise ValueError(f"Expected past_key_values that end between {kind}s, got some that end inside one.")
            flags.append(seen >= held)
            seen += size
    return flags


def _select(result: dict[str, Any], kind: str, flags: list[bool], patches: list[int]) -> None:
    pixels, *names = _names(kind)
    mask = "video_compression_mask"
    parts = {pixels: result[pixels].split(patches)}
    if kind == "video" and result.get(mask) is not None:
        grids = result["video_grid_thw"]
        parts[mask] = result[mask].split((grids.prod(dim=1) // result["video_merge_sizes"] ** 2).tolist())
    for name, values in parts.items():
        chosen = [part for part, follows in zip(values, flags, strict=True) if follows]
        result[name] = torch.cat(chosen) if chosen else None
    for name in names:
        chosen = result[name][torch.tensor(flags, device=result[name].device)]
        result[name] = chosen if len(chosen) else None
