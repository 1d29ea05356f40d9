"""Layout of packed segments: grids read and checked, order of patches, chunks."""

import re

import pytest
import torch

from videollama3.modeling.packed_segments import Grid, chunk_grids, pack_segments, read_grids

CPU = torch.device("cpu")


def test_grids_are_read_with_their_counts():
    grids = read_grids(torch.tensor([[3, 4, 6], [1, 5, 7]]), torch.tensor([2, 1]))
    assert grids == [Grid(3, 4, 6, 2), Grid(1, 5, 7, 1)]
    assert [(g.patches_per_frame, g.num_patches, g.num_tokens) for g in grids] == [(24, 72, 18), (35, 35, 35)]


@pytest.mark.parametrize(
    ("grid_thw", "merge_sizes", "message"),
    [
        ([1, 2, 3], [1], "Expected grid_thw of shape (items, 3) with at least one item, got (3,)."),
        ([[1, 2]], [1], "Expected grid_thw of shape (items, 3) with at least one item, got (1, 2)."),
        ([[1, 2, 3]], [1, 2], "Expected one merge size for each of 1 items, got shape (2,)."),
        ([[1, 2, 3]], 1, "Expected one merge size for each of 1 items, got shape ()."),
        (
            [[1, 2, 3], [2, 4, 5]],
            [1, 2],
            "Expected item 1 to have a positive grid that is a multiple of its merge size, "
            "got (frames, rows, columns) = (2, 4, 5) with merge size 2.",
        ),
        (
            [[0, 2, 3]],
            [1],
            "Expected item 0 to have a positive grid that is a multiple of its merge size, "
            "got (frames, rows, columns) = (0, 2, 3) with merge size 1.",
        ),
        (
            [[1, 2, 3]],
            [0],
            "Expected item 0 to have a positive grid that is a multiple of its merge size, "
            "got (frames, rows, columns) = (1, 2, 3) with merge size 0.",
        ),
    ],
)
def test_grids_that_contradict_themselves_are_named(grid_thw, merge_sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_grids(torch.tensor(grid_thw), torch.tensor(merge_sizes))


def test_no_item_is_an_error():
    message = "Expected grid_thw of shape (items, 3) with at least one item, got (0, 3)."
    with pytest.raises(ValueError, match=re.escape(message)):
        read_grids(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, dtype=torch.long))


def test_positions_follow_merge_blocks():
    # 2 rows x 4 columns, merge 2: block by block, as drawn in the module's docstring.
    segments = pack_segments([Grid(1, 2, 4, 2)], CPU)
    assert segments.row_column.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert segments.gather is None
    assert segments.scatter is None


def test_positions_restart_with_every_frame_and_run_row_by_row_without_merge():
    segments = pack_segments([Grid(2, 2, 3, 1)], CPU)
    frame = [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert segments.row_column.tolist() == frame * 2


def test_segments_move_to_a_device():
    """accelerate moves what it hands to a layer on another device by this method."""
    segments = pack_segments([Grid(1, 4, 4, 2), Grid(1, 2, 2, 1)], torch.device("cpu"))
    moved = segments.to("meta")
    tensors = (moved.gather, moved.scatter, moved.row_column, moved.cu_seqlens)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.groups, moved.max_seqlen) == (segments.groups, segments.max_seqlen)
    still = pack_segments([Grid(1, 2, 2, 1)], torch.device("cpu"))
    assert still.to("meta").gather is None


def test_segments_of_equal_length_stand_together():
    # Lengths 12, 6, 8, 6: the two items of 6 become one group although an item stands between them.
    grids = [Grid(1, 3, 4, 1), Grid(2, 2, 3, 1), Grid(1, 2, 4, 2), Grid(1, 3, 2, 1)]
    segments = pack_segments(grids, CPU)
    assert segments.groups == [(3, 6), (1, 8), (1, 12)]
    assert segments.cu_seqlens.tolist() == [0, 6, 12, 18, 26, 38]
    assert segments.cu_seqlens.dtype == torch.int32
    assert segments.max_seqlen == 12
    assert segments.gather.tolist() == [*range(12, 24), *range(32, 38), *range(24, 32), *range(12)]
    packed = torch.arange(38)[segments.gather]
    assert packed[segments.scatter].tolist() == list(range(38))
    # The 8 patches with merge 2 keep their block order after the move.
    assert segments.row_column[18:26].tolist()[:4] == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_chunks_take_whole_segments_and_keep_their_order():
    grids = [Grid(5, 2, 3, 1), Grid(1, 4, 5, 1), Grid(2, 2, 2, 2)]
    assert chunk_grids(grids, 13) == [
        [Grid(2, 2, 3, 1)],
        [Grid(2, 2, 3, 1)],
        [Grid(1, 2, 3, 1)],
        [Grid(1, 4, 5, 1)],  # longer than a chunk: alone
        [Grid(2, 2, 2, 2)],
    ]
    assert chunk_grids(grids, 1000) == [grids]


@pytest.mark.parametrize("max_patches", [1, 7, 16, 30, 41])
def test_chunks_lose_no_patch(max_patches):
    grids = [Grid(4, 2, 3, 1), Grid(1, 4, 5, 1), Grid(3, 2, 4, 2)]
    chunks = chunk_grids(grids, max_patches)
    for chunk in chunks:
        assert sum(g.num_patches for g in chunk) <= max_patches or (len(chunk) == 1 and chunk[0].num_frames == 1)
    frames = [(g.height, g.width, g.merge) for chunk in chunks for g in chunk for _ in range(g.num_frames)]
    assert frames == [(g.height, g.width, g.merge) for g in grids for _ in range(g.num_frames)]
