"""Frames that repeat the one before are encoded once: which ones, that nothing changes, and the switch."""

import pytest
import torch

from videollama3 import VideoLlama3VisionConfig
from videollama3.modeling.packed_segments import Grid, distinct_frames
from videollama3.modeling.vision_encoder_videollama3 import VideoLlama3VisionModel

from .tiny import IMAGE, VIDEO, images, prompt, text, videos


def _pixels(contents, patches=6):
    """(frames * patches, 588), one number per frame's content."""
    return torch.cat([torch.randn(patches, 588, generator=torch.Generator().manual_seed(c)) for c in contents])


@pytest.mark.parametrize(
    ("contents", "kept", "rows"),
    [
        ([1, 1, 2, 3], [1, 2, 3], [0, 0, 1, 2]),
        ([1, 1, 1, 1], [1], [0, 0, 0, 0]),
        # Only the frame before is looked at.
        ([1, 2, 1, 1], [1, 2, 1], [0, 1, 2, 2]),
    ],
)
@pytest.mark.parametrize("grid", [Grid(4, 2, 3, 1), Grid(4, 4, 6, 2), Grid(4, 6, 14, 2)])
def test_what_remains_and_what_is_read(contents, kept, rows, grid):
    remaining, grids, read = distinct_frames(_pixels(contents, grid.patches_per_frame), [grid])
    assert torch.equal(remaining, _pixels(kept, grid.patches_per_frame))
    assert grids == [Grid(len(kept), grid.height, grid.width, grid.merge)]
    tokens = grid.num_tokens // 4
    assert read.tolist() == [row * tokens + token for row in rows for token in range(tokens)]


def test_nothing_repeats_nothing_moves():
    pixels = _pixels([1, 2, 3])
    # The second frame differs in the last value of its last patch only.
    pixels[6:12] = pixels[:6]
    pixels[11, -1] += 1e-6
    grids = [Grid(3, 2, 3, 1)]
    same, same_grids, read = distinct_frames(pixels, grids)
    assert same is pixels
    assert same_grids is grids
    assert read is None


def test_equal_items_stay_apart():
    """Two images that are equal are two items; a video's first frame is not compared with the item before."""
    pixels = _pixels([1, 1, 1, 2])
    same, _, read = distinct_frames(pixels, [Grid(1, 2, 3, 1), Grid(1, 2, 3, 1), Grid(2, 2, 3, 1)])
    assert same is pixels
    assert read is None


@pytest.fixture
def request_with_pauses():
    """An image, a video of six frames of which three repeat, and one of three frames of which two do."""
    video = videos([[6, 4, 6], [3, 2, 4]], [2, 2], keep=0.7)
    frames = video["pixel_values_videos"][: 6 * 24].view(6, 24, 588)
    frames[1] = frames[0]
    frames[3] = frames[4] = frames[2]
    short = video["pixel_values_videos"][6 * 24 :].view(3, 8, 588)
    short[1] = short[2] = short[0]
    kept = int(video["video_compression_mask"].sum())
    return {**prompt(text(5), (IMAGE, 12), (VIDEO, kept), text(6, 4)), **images([[1, 3, 4]], [1]), **video}


@pytest.fixture
def passes(monkeypatch):
    """Patches of each pass through the encoder."""
    seen = []
    inner = VideoLlama3VisionModel._encode

    def counting(self, pixel_values, grids):
        seen.append(len(pixel_values))
        return inner(self, pixel_values, grids)

    monkeypatch.setattr(VideoLlama3VisionModel, "_encode", counting)
    return seen


@torch.no_grad()
def test_logits_are_equal(model, request_with_pauses, passes, monkeypatch):
    reused = model(**request_with_pauses).logits
    monkeypatch.setattr(model.config.vision_config, "reuse_identical_frames", False)
    encoded = model(**request_with_pauses).logits
    assert passes == [12, 3 * 24 + 1 * 8, 12, 6 * 24 + 3 * 8]
    # Measured worst case 0 of 4.7 (other batch sizes may round otherwise); a frame's tokens read for another's
    # are off by 1 and more.
    torch.testing.assert_close(reused, encoded, atol=1e-4, rtol=0)


def test_with_gradients_every_frame_is_encoded(model, request_with_pauses, passes):
    model(**request_with_pauses)
    assert passes == [12, 6 * 24 + 3 * 8]


@torch.no_grad()
def test_uint8_frames_repeat_too(model, passes):
    levels = torch.randint(0, 256, (24, 588), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grid_thw, merge_sizes = torch.tensor([[3, 4, 6]]), torch.tensor([2])
    tokens = model.model.vision_model(levels.repeat(3, 1), grid_thw, merge_sizes).last_hidden_state
    assert passes == [24]
    assert torch.equal(tokens[:6], tokens[12:])


def test_the_switch_is_saved(tmp_path):
    assert VideoLlama3VisionConfig().reuse_identical_frames
    VideoLlama3VisionConfig(reuse_identical_frames=False).save_pretrained(tmp_path)
    assert not VideoLlama3VisionConfig.from_pretrained(tmp_path).reuse_identical_frames


@torch.no_grad()
def test_the_projector_runs_on_kept_tokens_only(model, request_with_pauses):
    rows = []
    handle = model.model.projector.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    model(**request_with_pauses)
    handle.remove()
    assert rows == [12, int(request_with_pauses["video_compression_mask"].sum())]
