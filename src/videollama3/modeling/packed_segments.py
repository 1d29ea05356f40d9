"""Layout of a packed batch of frames and images: where each segment starts and where each patch sits.

Grid sizes enter (from the processor, on any device), host-side records leave that say how patches are
grouped for attention; computing attention itself is left to `packed_attention.py`.

A segment is one frame or one image, the unit within which vision attention runs. Patches of a segment are
in merge-block order; with 2 rows x 4 columns and merge size 2 the patches arrive as

    row 0:  0 1 | 4 5
    row 1:  2 3 | 6 7

so that every run of merge_size**2 patches becomes one visual token.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Grid:
    """One image or video: `num_frames` segments of `height` x `width` patches, merged `merge` x `merge`."""

    num_frames: int
    height: int
    width: int
    merge: int

    @property
    def patches_per_frame(self) -> int:
        """Patches of one segment."""
        return self.height * self.width

    @property
    def num_patches(self) -> int:
        """Patches of all segments."""
        return self.num_frames * self.height * self.width

    @property
    def num_tokens(self) -> int:
        """Visual tokens after the merge, before pruning."""
        return self.num_patches // self.merge**2


def read_grids(grid_thw: torch.Tensor, merge_sizes: torch.Tensor) -> list[Grid]:
    """Reads and checks the grids of a batch; the one place where grid tensors reach the host.

    Args:
        grid_thw: int64 (items, 3), frames, rows and columns in patches.
        merge_sizes: int64 (items,).

    Returns:
        One `Grid` per item.

    Raises:
        ValueError: naming the item, when a grid is not positive or not a multiple of its merge size; when
            there is no item.
    """
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.shape[0] == 0:
        raise ValueError(f"Expected grid_thw of shape (items, 3) with at least one item, got {tuple(grid_thw.shape)}.")
    if merge_sizes.ndim != 1 or merge_sizes.shape[0] != grid_thw.shape[0]:
        raise ValueError(
            f"Expected one merge size for each of {grid_thw.shape[0]} items, got shape {tuple(merge_sizes.shape)}."
        )
    grids = []
    for item, ((frames, height, width), merge) in enumerate(zip(grid_thw.tolist(), merge_sizes.tolist(), strict=True)):
        if min(frames, height, width, merge) < 1 or height % merge or width % merge:
            raise ValueError(
                f"Expected item {item} to have a positive grid that is a multiple of its merge size, "
                f"got (frames, rows, columns) = ({frames}, {height}, {width}) with merge size {merge}."
            )
        grids.append(Grid(frames, height, width, merge))
    return grids


@dataclasses.dataclass(frozen=True)
class PackedSegments:
    """Segments of one encoder pass, reordered so that segments of equal length stand together.

    Attributes:
        groups: (number of segments, patches per segment), in packed order.
        gather: int64 (patches,), packed patch i is input patch `gather[i]`; None when nothing moves.
        scatter: int64 (patches,), the inverse of `gather`; None likewise.
        row_column: int64 (patches, 2), position of each packed patch on its grid.
        cu_seqlens: int32 (segments + 1,), cumulative lengths in packed order.
        max_seqlen: longest segment, in patches.
    """

    groups: list[tuple[int, int]]
    gather: torch.Tensor | None
    scatter: torch.Tensor | None
    row_column: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PackedSegments:
        """The same with its tensors on a device: accelerate moves what it hands to layers on other devices by this."""
        moved = {
            name: tensor.to(device, non_blocking=non_blocking)
            for name in ("gather", "scatter", "row_column", "cu_seqlens")
            if (tensor := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **moved)

    def in_order(self, hidden_TC: torch.Tensor) -> torch.Tensor:
        """Packed rows in the order of appearance: (patches, C) -> the same."""
        # Layers may lie on several devices, the last one on another than the first.
        return hidden_TC if self.scatter is None else hidden_TC[self.scatter.to(hidden_TC.device)]


def pack_segments(grids: list[Grid], device: torch.device) -> PackedSegments:
    """Groups the segments of a batch by length.

    Args:
        grids: items of the batch, in order of appearance.
        device: where the index tensors are needed.

    Returns:
        The packed layout of `sum(grid.num_patches)` patches.
    """
    order = sorted(range(len(grids)), key=lambda i: grids[i].patches_per_frame)
    starts = [0]
    for grid in grids:
        starts.append(starts[-1] + grid.num_patches)
    gather = scatter = None
    if order != list(range(len(grids))):
        gather = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in order])
        scatter = torch.empty_like(gather)
        scatter[gather] = torch.arange(gather.numel())
        gather, scatter = gather.to(device), scatter.to(device)
    groups: list[tuple[int, int]] = []
    lengths: list[int] = []
    for i in order:
        count, length = grids[i].num_frames, grids[i].patches_per_frame
        lengths += [length] * count
        if groups and groups[-1][1] == length:
            groups[-1] = (groups[-1][0] + count, length)
        else:
            groups.append((count, length))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return PackedSegments(
        groups=groups,
        gather=gather,
        scatter=scatter,
        row_column=torch.cat([_row_column(grids[i]) for i in order]).to(device),
        cu_seqlens=cu_seqlens.to(device),
        max_seqlen=max(lengths),
    )


def _row_column(grid: Grid) -> torch.Tensor:
    """Positions of an item's patches in merge-block order: int64 (frames * rows * columns, 2)."""
    blocks_h, blocks_w, merge = grid.height // grid.merge, grid.width // grid.merge, grid.merge
    rows = torch.arange(grid.height).view(blocks_h, 1, merge, 1)
    columns = torch.arange(grid.width).view(1, blocks_w, 1, merge)
    shape = (blocks_h, blocks_w, merge, merge)
    frame = torch.stack([rows.expand(shape).flatten(), columns.expand(shape).flatten()], dim=-1)
    return frame.repeat(grid.num_frames, 1)


def chunk_grids(grids: list[Grid], max_patches: int) -> list[list[Grid]]:
    """Splits a batch into consecutive chunks of whole segments of at most `max_patches` patches.

    A segment longer than `max_patches` becomes a chunk of its own. Consecutive chunks cover consecutive
    patches, so `pixel_values` can be split by their sums.
    """
    chunks: list[list[Grid]] = []
    room = 0
    for grid in grids:
        remaining = grid.num_frames
        while remaining:
            fit = room // grid.patches_per_frame
            if fit < 1:
                chunks.append([])
                room = max(max_patches, grid.patches_per_frame)
                fit = room // grid.patches_per_frame
            taken = min(fit, remaining)
            chunks[-1].append(dataclasses.replace(grid, num_frames=taken))
            room -= taken * grid.patches_per_frame
            remaining -= taken
    return chunks


# Patches of a frame that are compared first: frames that differ in these need no second look.
_PROBE_PATCHES = 16


def distinct_frames(
    pixel_values: torch.Tensor, grids: list[Grid]
) -> tuple[torch.Tensor, list[Grid], torch.Tensor | None]:
    """Drops every frame that is bit-identical to the one before it in its video.

    Paused video, slides and screen recordings repeat frames; a segment sees no other, so its tokens can be
    encoded once and read again. With one video of four frames, the second equal to the first, the third and
    the fourth other ones, three frames of L tokens remain and the rows to read are

        frame    0       1       2        3
        rows     0..L-1  0..L-1  L..2L-1  2L..3L-1

    Args:
        pixel_values: (T, values of a patch), all items in order of appearance.
        grids: one per item.

    Returns:
        `pixel_values` of the frames that remain, their grids, and int64 (visual tokens of all items,), the row
        of the remaining tokens to read for each; the arguments and None when no frame repeats.
    """
    items = pixel_values.split([grid.num_patches for grid in grids])
    repeats = [_repeats_previous(item, grid) for item, grid in zip(items, grids, strict=True)]
    if not any(any(flags) for flags in repeats):
        return pixel_values, grids, None
    kept_pixels, kept_grids, rows = [], [], []
    start = 0
    for item, grid, flags in zip(items, grids, repeats, strict=True):
        fresh = ~torch.tensor(flags)
        frames = item.reshape(grid.num_frames, grid.patches_per_frame, -1)
        kept_pixels.append(frames[fresh.to(item.device)].flatten(0, 1))
        kept_grids.append(dataclasses.replace(grid, num_frames=int(fresh.sum())))
        tokens_per_frame = grid.num_tokens // grid.num_frames
        first_rows = start + (fresh.cumsum(0) - 1) * tokens_per_frame
        rows.append((first_rows.unsqueeze(1) + torch.arange(tokens_per_frame)).flatten())
        start += kept_grids[-1].num_tokens
    return torch.cat(kept_pixels), kept_grids, torch.cat(rows).to(pixel_values.device)


def _repeats_previous(item: torch.Tensor, grid: Grid) -> list[bool]:
    """For each frame of an item, whether it equals the one before; a single frame costs nothing."""
    flags = [False] * grid.num_frames
    if grid.num_frames == 1:
        return flags
    frames = item.reshape(grid.num_frames, grid.patches_per_frame, -1)
    probe = frames[:, :: max(1, grid.patches_per_frame // _PROBE_PATCHES)]
    candidates = (probe[1:] == probe[:-1]).flatten(1).all(dim=1).nonzero().flatten().tolist()
    if candidates:
        # One frame at a time in memory, one answer for the host to wait for.
        equal = torch.stack([(frames[previous] == frames[previous + 1]).all() for previous in candidates])
        for previous, is_equal in zip(candidates, equal.tolist(), strict=True):
            flags[previous + 1] = is_equal
    return flags
