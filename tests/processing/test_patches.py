"""Patches, the resize before them, normalisation, and the pruning mask."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_transforms import normalize, rescale

from videollama3.processing.patches import (
    keep_mask,
    normalization_table,
    normalize_patches,
    patchify,
    resize_picture,
)

HALF = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
UNEQUAL = {**HALF, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}


def random_pictures(count, height, width, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def test_patch_order_by_hand():
    # 4 rows x 8 columns of pixels, patches of 2 x 2, so 2 x 4 patches:
    #     0 1 | 4 5
    #     2 3 | 6 7
    numbers = [[0, 1, 4, 5], [2, 3, 6, 7]]
    picture = np.zeros((4, 8, 3), dtype=np.uint8)
    for row in range(4):
        for column in range(8):
            patch = numbers[row // 2][column // 2]
            for channel in range(3):
                picture[row, column, channel] = 16 * patch + 4 * channel + 2 * (row % 2) + column % 2
    patches = patchify([picture], num_frames=1, height=4, width=8, patch_size=2, merge_size=2)
    # Each row one patch; in it channel, row, column, innermost last.
    one = [4 * channel + 2 * row + column for channel in range(3) for row in range(2) for column in range(2)]
    assert patches.tolist() == [[16 * patch + value for value in one] for patch in range(8)]


def test_patch_order_without_merge_is_row_by_row():
    # 3 rows x 2 columns of patches, one pixel each.
    picture = np.arange(18, dtype=np.uint8).reshape(3, 2, 3)
    patches = patchify([picture], num_frames=1, height=3, width=2, patch_size=1, merge_size=1)
    assert patches.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13, 14], [15, 16, 17]]


def test_frames_follow_each_other():
    pictures = random_pictures(3, 28, 56)
    arguments = {"height": 28, "width": 56, "patch_size": 14, "merge_size": 2}
    together = patchify(pictures, num_frames=3, **arguments)
    alone = [patchify([picture], num_frames=1, **arguments) for picture in pictures]
    assert together.shape == (3 * 2 * 4, 588)
    assert np.array_equal(together, np.concatenate(alone))


def test_a_repeated_picture_gives_the_same_patches():
    first, second = random_pictures(2, 30, 50)
    arguments = {"height": 28, "width": 56, "patch_size": 14, "merge_size": 2}
    patches = patchify(iter([first, first, second, second]), num_frames=4, **arguments).reshape(4, -1)
    assert np.array_equal(patches[0], patches[1])
    assert np.array_equal(patches[2], patches[3])
    assert not np.array_equal(patches[0], patches[2])


@pytest.mark.parametrize(("count", "got"), [(2, "2"), (4, "more"), (0, "0")])
def test_another_number_of_pictures(count, got):
    with pytest.raises(ValueError, match=f"^Expected 3 pictures, got {got}\\.$"):
        patchify(random_pictures(count, 14, 28), num_frames=3, height=14, width=28, patch_size=14, merge_size=1)


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, 1])
@pytest.mark.parametrize(("height", "width"), [(14, 98), (196, 28), (37, 53)])
def test_resize_equals_pillow(height, width, resample):
    (picture,) = random_pictures(1, 37, 53)
    expected = np.asarray(Image.fromarray(picture).resize((width, height), resample))
    assert np.array_equal(resize_picture(picture, height, width, resample), expected)


@pytest.mark.parametrize(
    "settings_", [HALF, UNEQUAL, {**HALF, "do_normalize": False}, {**UNEQUAL, "do_rescale": False}]
)
def test_normalisation_equals_transformers_for_every_grey_level(settings_):
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 3))[None]
    expected = (
        rescale(levels, settings_["rescale_factor"], input_data_format="channels_last")
        if settings_["do_rescale"]
        else levels
    )
    if settings_["do_normalize"]:
        mean, std = settings_["image_mean"], settings_["image_std"]
        expected = normalize(expected.astype(np.float32), mean, std, input_data_format="channels_last")
    table = normalization_table(**settings_)
    assert table.dtype == np.float32
    assert table.shape == (3, 256)
    assert np.array_equal(table, expected[0].T.astype(np.float32))


def test_normalisation_of_known_levels():
    table = normalization_table(**HALF)
    assert table[:, 0].tolist() == [-1.0] * 3
    assert table[:, 255].tolist() == [1.0] * 3
    assert table[0, 51] == np.float32(np.float32(0.2) - np.float32(0.5)) / np.float32(0.5)


@pytest.mark.parametrize("settings_", [HALF, UNEQUAL])
def test_normalised_patches_take_each_channel_from_its_own_row(settings_):
    patches = np.random.default_rng(1).integers(0, 256, (5, 3 * 4), dtype=np.uint8)
    table = normalization_table(**settings_)
    expected = [[table[column // 4, value] for column, value in enumerate(row)] for row in patches]
    got = normalize_patches(patches, table)
    assert got.dtype == np.float32
    assert np.array_equal(got, np.array(expected))


def naive_keep_mask(patches, num_frames, merge_size, table, threshold, min_tokens):
    """The rule in its own words, in float64."""
    channels = len(table)
    values = np.empty(patches.shape, dtype=np.float64)
    size = patches.shape[1] // channels
    for channel in range(channels):
        columns = slice(channel * size, (channel + 1) * size)
        values[:, columns] = table[channel].astype(np.float64)[patches[:, columns]]
    tokens = values.reshape(num_frames, -1, merge_size**2 * patches.shape[1])
    differences = [np.abs(tokens[frame] - tokens[frame - 1]).mean(axis=1) * 255 for frame in range(1, num_frames)]
    keep = [np.ones(tokens.shape[1], dtype=bool)]
    for difference in differences:
        kept = difference > threshold
        if kept.sum() < min_tokens:
            kept[:min_tokens] = True
        keep.append(kept)
    return np.concatenate(keep), np.concatenate([np.full(tokens.shape[1], np.inf), *differences])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    num_frames=st.integers(1, 5),
    merge_size=st.sampled_from([1, 2]),
    level=st.sampled_from([0.0, 0.02, 0.05, 0.3, 1.0]),
    threshold=st.sampled_from([0.0, 0.1, 0.5, 3.0]),
    min_tokens=st.integers(0, 3),
    table_settings=st.sampled_from([HALF, UNEQUAL]),
)
def test_keep_mask_against_the_rule_in_float64(
    seed, num_frames, merge_size, level, threshold, min_tokens, table_settings
):
    rng = np.random.default_rng(seed)
    tokens, values = 6, 12
    patches = np.repeat(rng.integers(0, 250, (1, tokens * merge_size**2, values), dtype=np.uint8), num_frames, axis=0)
    patches += (rng.random(patches.shape) < level).astype(np.uint8) * rng.integers(1, 6, patches.shape, dtype=np.uint8)
    patches = patches.reshape(-1, values)
    arguments = {
        "num_frames": num_frames,
        "merge_size": merge_size,
        "table": normalization_table(**table_settings),
        "threshold": threshold,
        "min_tokens": min_tokens,
    }
    expected, difference = naive_keep_mask(patches, **arguments)
    got = keep_mask(patches, **arguments)
    # The float32 table bends each grey step by up to 1e-7 of the range, so a token within 1e-4 of the threshold
    # may fall on either side in the reference; one grey level in one value of a token is 0.04 or more.
    assume(np.all((np.abs(difference - threshold) > 1e-4) | (difference == 0)))
    assert got.tolist() == expected.tolist()


def frames_with_steps(steps, values=20):
    """One token per frame of `values` equal levels; frame k is `steps[k]` brighter than the one before."""
    return np.cumsum([0, *steps]).astype(np.uint8)[:, None].repeat(3 * values, axis=1)


def test_the_threshold_itself_is_not_enough():
    # With mean and std 0.5 a grey level is 2 units, exactly; the mask compares with >.
    table = normalization_table(**HALF)
    patches = np.repeat(frames_with_steps([1, 2, 3]), 2, axis=0)  # two tokens per frame
    for threshold, kept in [
        (1.99, [1, 1, 1]),
        (2.0, [0, 1, 1]),
        (2.01, [0, 1, 1]),
        (4.0, [0, 0, 1]),
        (6.0, [0, 0, 0]),
    ]:
        mask = keep_mask(patches, num_frames=4, merge_size=1, table=table, threshold=threshold, min_tokens=0)
        assert mask.tolist() == [True, True, *np.repeat(np.array(kept, bool), 2)], threshold


def test_the_threshold_is_exact_for_a_plain_range_too():
    table = normalization_table(**{**HALF, "do_normalize": False})
    patches = frames_with_steps([1])
    mask = keep_mask(patches, num_frames=2, merge_size=1, table=table, threshold=1.0, min_tokens=0)
    assert mask.tolist() == [True, False]


def test_the_default_means_a_twentieth_of_a_grey_level():
    # 2352 values of a merged token: 117 changed by one level are 0.0497, 118 are 0.0502.
    table = normalization_table(**HALF)
    patches = np.full((2, 2, 4, 588), 100, dtype=np.uint8)
    patches[1, 0].reshape(-1)[:117] += 1
    patches[1, 1].reshape(-1)[:118] += 1
    mask = keep_mask(patches.reshape(-1, 588), num_frames=2, merge_size=2, table=table, threshold=0.1, min_tokens=0)
    assert mask.tolist() == [True, True, False, True]


def test_the_first_frame_is_whole_and_a_still_frame_keeps_its_first_tokens():
    patches = np.full((3 * 4, 12), 7, dtype=np.uint8)
    arguments = {"num_frames": 3, "merge_size": 1, "table": normalization_table(**HALF), "threshold": 0.1}
    for min_tokens, still in [(0, [0, 0, 0, 0]), (1, [1, 0, 0, 0]), (3, [1, 1, 1, 0])]:
        mask = keep_mask(patches, min_tokens=min_tokens, **arguments)
        assert mask.tolist() == [True] * 4 + [bool(x) for x in still * 2]


def test_too_few_kept_tokens_are_joined_by_the_first_ones():
    patches = np.full((2, 4, 12), 7, dtype=np.uint8)
    patches[1, 3] = 90
    arguments = {"num_frames": 2, "merge_size": 1, "table": normalization_table(**HALF), "threshold": 0.1}
    assert keep_mask(patches.reshape(8, 12), min_tokens=1, **arguments)[4:].tolist() == [False, False, False, True]
    assert keep_mask(patches.reshape(8, 12), min_tokens=2, **arguments)[4:].tolist() == [True, True, False, True]


def test_the_comparison_is_with_the_previous_frame():
    # A slow fade: each step is below the threshold, and so every frame but the first is dropped.
    table = normalization_table(**HALF)
    patches = frames_with_steps([1] * 5)
    mask = keep_mask(patches, num_frames=6, merge_size=1, table=table, threshold=2.0, min_tokens=0)
    assert mask.tolist() == [True] + [False] * 5


def test_darker_counts_as_much_as_brighter():
    table = normalization_table(**HALF)
    patches = frames_with_steps([100, 100])[::-1].copy()
    assert (
        keep_mask(patches, num_frames=3, merge_size=1, table=table, threshold=199.9, min_tokens=0).tolist()
        == [True] * 3
    )
    assert keep_mask(patches, num_frames=3, merge_size=1, table=table, threshold=200, min_tokens=0).tolist() == [
        True,
        False,
        False,
    ]


def test_channels_weigh_by_their_own_std():
    table = normalization_table(**{**HALF, "image_std": [0.5, 0.25, 1.0]})
    patches = np.zeros((2, 3, 12), dtype=np.uint8)  # three tokens, of which one channel each changes by 30
    for token in range(3):
        patches[1, token, 4 * token : 4 * token + 4] = 30
    # a third of the values times 30 levels / std: 20, 40, 10
    arguments = {"num_frames": 2, "merge_size": 1, "table": table, "min_tokens": 0}
    kept = [keep_mask(patches.reshape(6, 12), threshold=t, **arguments)[3:].tolist() for t in (9.9, 10.1, 20.1, 40.1)]
    assert kept == [[True, True, True], [True, True, False], [False, True, False], [False, False, False]]
