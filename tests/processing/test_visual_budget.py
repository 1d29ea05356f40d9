"""Target sizes: against the authors' numbers, and the promise of `max_visual_tokens`."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import GOLDEN
from videollama3.processing.visual_budget import ItemSize, target_sizes

OFFICIAL = json.loads((GOLDEN / "target_sizes_official.json").read_text())


def _item(entry, merge):
    if entry[0] == "image":
        return ItemSize(1, entry[1], entry[2], merge)
    return ItemSize(entry[1], entry[2], entry[3], merge)


def _items(record):
    return [_item(entry, merge) for entry, merge in zip(record["items"], record["merge_sizes"], strict=True)]


def num_tokens(items, sizes):
    """Visual tokens of each item, after checking that its size is whole tokens."""
    counts = []
    for item, (height, width) in zip(items, sizes, strict=True):
        factor = 14 * item.merge
        assert height % factor == width % factor == 0
        assert min(height, width) >= factor
        counts.append(item.num_frames * (height // factor) * (width // factor))
    return counts


def test_official_sizes():
    assert len(OFFICIAL) == 149
    differ = [
        (record["items"], sizes)
        for record in OFFICIAL
        if (sizes := [list(size) for size in target_sizes(_items(record))]) != record["target_hw"]
    ]
    # A picture one pixel high is taken for its own transpose by the authors (a guess at the channel axis).
    assert differ == [([["image", 1, 400]], [[14, 406]])]


def test_a_thin_picture_is_not_lost():
    (size,) = target_sizes([ItemSize(1, 1, 5000, 1)])
    assert size == (14, 4998)
    (size,) = target_sizes([ItemSize(1, 1, 5000, 1)], max_visual_tokens=100)
    assert size == (14, 1400)
    (size,) = target_sizes([ItemSize(1, 5000, 1, 2)], max_visual_tokens=7)
    assert size == (196, 28)


def test_small_pictures_are_enlarged():
    assert target_sizes([ItemSize(1, 7, 9, 1)], min_tokens=16) == [(56, 70)]
    assert target_sizes([ItemSize(1, 7, 9, 1)], min_tokens=1) == [(14, 14)]


def test_items_of_one_request_share_the_budget():
    alone = target_sizes([ItemSize(1, 1400, 700, 1)], max_tokens=1000)
    both = target_sizes([ItemSize(1, 1400, 700, 1)] * 2, max_tokens=1000)
    assert alone == [(616, 308)]
    assert both == [(434, 210), (434, 210)]


def test_the_limit_outranks_the_minimum_per_picture():
    video = ItemSize(40, 96, 208, 2)
    # 16 tokens for each of 40 frames are 640.
    assert num_tokens([video], target_sizes([video], max_tokens=200)) == [40 * 18]
    (count,) = num_tokens([video], target_sizes([video], max_visual_tokens=200))
    assert 100 < count <= 200


def test_a_loose_limit_changes_nothing():
    for record in OFFICIAL:
        items = _items(record)
        assert target_sizes(items, max_visual_tokens=10_000_000) == target_sizes(items)


ITEMS = st.lists(
    st.builds(
        ItemSize,
        num_frames=st.integers(1, 40),
        height=st.integers(1, 3000),
        width=st.integers(1, 3000),
        merge=st.sampled_from([1, 2]),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("limit", [100, 128, 140])
def test_a_limit_between_the_budget_and_the_least_of_all_pictures_is_used_up(limit):
    """The demonstrator's budget of 16 tokens gives way to 16 for each picture, but not to a limit of the user's."""
    video = ItemSize(8, 240, 320, 2)
    (least,) = num_tokens([video], target_sizes([video], max_tokens=16))
    assert least == 160
    (count,) = num_tokens([video], target_sizes([video], max_tokens=16, max_visual_tokens=limit))
    assert limit / 2 < count <= limit


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ITEMS, st.integers(0, 3000))
def test_max_visual_tokens_is_a_promise(items, spare):
    limit = sum(item.num_frames for item in items) + spare
    sizes = target_sizes(items, max_visual_tokens=limit)
    assert sum(num_tokens(items, sizes)) <= limit


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ITEMS)
def test_the_tightest_limit_gives_one_token_per_picture(items):
    limit = sum(item.num_frames for item in items)
    assert num_tokens(items, target_sizes(items, max_visual_tokens=limit)) == [item.num_frames for item in items]


def test_no_items():
    assert target_sizes([]) == []
    assert target_sizes([], max_visual_tokens=3) == []


def test_a_limit_below_one_token_per_picture():
    message = "Expected max_visual_tokens of at least 13, one for each picture of the request, got 12: raise it, or lower max_frames."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        target_sizes([ItemSize(12, 90, 160, 2), ItemSize(1, 40, 30, 1)], max_visual_tokens=12)


@pytest.mark.parametrize("limit", [0, -1, 2.5, True, "9"])
def test_a_limit_that_is_no_count(limit):
    message = f"Expected max_visual_tokens as a positive integer, got {limit!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        target_sizes([ItemSize(1, 40, 30, 1)], max_visual_tokens=limit)
