"""The vision encoder: rotary table, merge, backends, segments, chunks, pixel dtypes."""

import math
import re

import pytest
import torch
from torch import nn

from videollama3 import VideoLlama3VisionModel
from videollama3.modeling import vision_encoder_videollama3 as module
from videollama3.modeling.vision_encoder_videollama3 import (
    activation_bytes_per_patch,
    apply_rotary,
    merge_blocks,
    rotary_table,
)

from .tiny import media, tiny_vision_config

# Eight segments, of 12, 24, 24, 24, 35, 6, 24 and 16 patches.
GRIDS = [[1, 3, 4], [3, 4, 6], [1, 5, 7], [1, 2, 3], [1, 6, 4], [1, 4, 4]]
MERGES = [1, 2, 1, 1, 2, 4]


def _encoder(seed=0, **changes):
    torch.manual_seed(seed)
    encoder = VideoLlama3VisionModel(tiny_vision_config(**changes)).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            # Larger than fresh weights, so that attention is far from uniform.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder


def _encode(encoder, pixels, grid_thw, merge_sizes):
    return encoder(pixel_values=pixels, grid_thw=grid_thw, merge_sizes=merge_sizes).last_hidden_state


def _tokens_per_item(grid_thw, merge_sizes):
    return (grid_thw.prod(dim=1) // merge_sizes**2).tolist()


# --- rotary embedding ---


@pytest.mark.parametrize("head_dim", [8, 72])
def test_rotary_table_equals_plain_loops(head_dim):
    positions = [(0, 0), (3, 1), (2, 40), (63, 7)]
    cos, sin = rotary_table(torch.tensor(positions), head_dim=head_dim, rope_theta=10000.0)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (4, head_dim)
    pairs = head_dim // 2
    for patch, (row, column) in enumerate(positions):
        for i in range(head_dim):
            pair = i % pairs
            # The first half of the pairs turns with the row, the second half with the column.
            position, k = (row, pair) if pair < pairs // 2 else (column, pair - pairs // 2)
            angle = position / 10000.0 ** (2 * k / pairs)
            # float32 angles up to 63: measured worst case 2.1e-6; rows and columns swapped are off by up to 2.
            assert cos[patch, i].item() == pytest.approx(math.cos(angle), abs=1e-5)
            assert sin[patch, i].item() == pytest.approx(math.sin(angle), abs=1e-5)


def test_rotation_depends_on_relative_positions_only():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 24, generator=generator)

    def score(first, second):
        turned = [
            apply_rotary(states, *rotary_table(torch.tensor([at]), head_dim=24, rope_theta=10000.0))
            for states, at in ((query, first), (key, second))
        ]
        return (turned[0] * turned[1]).sum()

    # Measured worst case 7.2e-7 of 3.4; angles in bfloat16 are off by 0.012.
    torch.testing.assert_close(score((1, 2), (4, 7)), score((11, 6), (14, 11)), atol=2e-5, rtol=0)
    assert (score((1, 2), (4, 7)) - score((2, 1), (4, 7))).abs() > 0.1


def test_rotation_keeps_the_dtype_and_the_length():
    states = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    table = rotary_table(torch.arange(10).view(5, 2), head_dim=8, rope_theta=10000.0)
    turned = apply_rotary(states, *table)
    assert turned.dtype == torch.bfloat16
    # bfloat16 rounding: measured worst case 0.0093 of 4.7; a table that is no rotation changes lengths by more.
    torch.testing.assert_close(turned.float().norm(dim=-1), states.float().norm(dim=-1), atol=0.03, rtol=0)


# --- merge ---


@pytest.mark.parametrize("merge", [1, 2, 3, 4])
def test_merge_equals_bilinear_interpolation(merge):
    rows, columns, channels = 3 * merge, 5 * merge, 7
    frame = torch.randn(channels, rows, columns, generator=torch.Generator().manual_seed(merge))
    expected = nn.functional.interpolate(
        frame.unsqueeze(0), size=(3, 5), mode="bilinear", align_corners=False, antialias=False
    )[0]
    blocks = frame.view(channels, 3, merge, 5, merge).permute(1, 3, 2, 4, 0).reshape(-1, channels)
    merged = merge_blocks(blocks, merge)
    # Measured worst case 1.2e-7 of 1.3; the mean of all patches for merge 3 and 4 is off by 2.8.
    torch.testing.assert_close(merged, expected.permute(1, 2, 0).reshape(-1, channels), atol=1e-6, rtol=0)


# --- attention backends and segments ---


@pytest.mark.parametrize("changes", [{}, {"hidden_size": 144, "num_attention_heads": 2}], ids=["head16", "head72"])
def test_eager_equals_sdpa_forward_and_backward(changes):
    pixels, grid_thw, merge_sizes = media(GRIDS, MERGES)
    outputs, gradients = [], []
    for implementation in ("eager", "sdpa"):
        encoder = _encoder(**changes)
        encoder.set_attn_implementation(implementation)
        assert encoder.config._attn_implementation == implementation
        output = _encode(encoder, pixels, grid_thw, merge_sizes)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        (output * weights).sum().backward()
        outputs.append(output.detach())
        gradients.append({name: parameter.grad for name, parameter in encoder.named_parameters()})
    # Measured worst case 1.7e-6 of 3.9; segments that see each other on one backend are off by 0.2.
    torch.testing.assert_close(outputs[0], outputs[1], atol=5e-5, rtol=0)
    for name, eager in gradients[0].items():
        # Measured worst case 1.3e-6 of the largest entry; a branch detached on one backend is off by its size.
        scale = eager.abs().max().clamp(min=1.0)
        torch.testing.assert_close(eager / scale, gradients[1][name] / scale, atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_changed_frame_moves_its_own_tokens_only(implementation):
    pixels, grid_thw, merge_sizes = media(GRIDS, MERGES)
    encoder = _encoder()
    encoder.set_attn_implementation(implementation)
    with torch.no_grad():
        before = _encode(encoder, pixels, grid_thw, merge_sizes)
        # Second frame of the second item: patches 12 + 24 to 12 + 48, tokens 12 + 6 to 12 + 12.
        pixels[36:60] += 1.0
        after = _encode(encoder, pixels, grid_thw, merge_sizes)
    same = (before == after).all(dim=1)
    assert same.tolist() == [not 18 <= token < 24 for token in range(len(before))]


def test_order_of_items_does_not_matter():
    pixels, grid_thw, merge_sizes = media(GRIDS, MERGES)
    encoder = _encoder()
    order = [4, 0, 5, 2, 1, 3]
    parts = pixels.split(grid_thw.prod(dim=1).tolist())
    with torch.no_grad():
        straight = _encode(encoder, pixels, grid_thw, merge_sizes)
        moved = _encode(encoder, torch.cat([parts[i] for i in order]), grid_thw[order], merge_sizes[order])
        alone = torch.cat(
            [_encode(encoder, part, grid_thw[i : i + 1], merge_sizes[i : i + 1]) for i, part in enumerate(parts)]
        )
    tokens = straight.split(_tokens_per_item(grid_thw, merge_sizes))
    # Measured worst case 1.1e-6 of 3.6 (other batch sizes round otherwise); items mixed up are off by 4.8, segments
    # that see each other by 0.2.
    torch.testing.assert_close(moved, torch.cat([tokens[i] for i in order]), atol=5e-5, rtol=0)
    torch.testing.assert_close(alone, straight, atol=5e-5, rtol=0)


def test_chunks_equal_one_pass(monkeypatch):
    pixels, grid_thw, merge_sizes = media(GRIDS, MERGES)
    encoder = _encoder()
    with torch.no_grad():
        whole = _encode(encoder, pixels, grid_thw, merge_sizes)
    passes = []
    inner = VideoLlama3VisionModel._encode

    def counting(self, pixel_values, grids):
        passes.append(len(pixel_values))
        return inner(self, pixel_values, grids)

    monkeypatch.setattr(VideoLlama3VisionModel, "_encode", counting)
    # Room for 40 patches.
    budget = 40 * activation_bytes_per_patch(encoder.config, torch.float32)
    monkeypatch.setattr(module, "MAX_ACTIVATION_BYTES_PER_CHUNK", budget)
    with torch.no_grad():
        chunked = _encode(encoder, pixels, grid_thw, merge_sizes)
    assert passes == [36, 24, 24, 35, 30, 16]
    # Measured worst case 0 of 3.6; chunks in the wrong order are off by 4.8.
    torch.testing.assert_close(chunked, whole, atol=5e-5, rtol=0)
    passes.clear()
    _encode(encoder, pixels, grid_thw, merge_sizes)
    assert passes == [len(pixels)], "with gradients nothing is saved by chunks"
    passes.clear()
    frozen = _encode(encoder.requires_grad_(False), pixels, grid_thw, merge_sizes)
    assert passes == [36, 24, 24, 35, 30, 16], "a frozen encoder keeps nothing for gradients, whatever learns after it"
    assert not frozen.requires_grad
    assert torch.equal(frozen, chunked)
    passes.clear()
    _encode(encoder, pixels.clone().requires_grad_(), grid_thw, merge_sizes).sum().backward()
    assert passes == [len(pixels)], "gradients of pixels pass through a frozen encoder"
    passes.clear()
    # What DeepSpeed's ZeRO-3 marks its parameters with; DeepSpeed itself does not run here.
    next(encoder.encoder.layers[0].parameters()).ds_id = 0
    _encode(encoder, pixels, grid_thw, merge_sizes)
    assert passes == [len(pixels)], "processes that share weights call their layers equally often"


# --- pixels ---


def test_uint8_equals_normalised_floats():
    levels = torch.randint(0, 256, (12, 588), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    levels[0, :256] = torch.arange(256, dtype=torch.uint8)
    mean, std = (0.48, 0.5, 0.41), (0.27, 0.26, 0.5)
    encoder = _encoder(image_mean=mean, image_std=std)
    floats = (levels.view(12, 3, 196).float() / 255 - torch.tensor(mean).view(1, 3, 1)) / torch.tensor(std).view(
        1, 3, 1
    )
    grid_thw, merge_sizes = torch.tensor([[1, 3, 4]]), torch.tensor([1])
    with torch.no_grad():
        raw = _encode(encoder, levels, grid_thw, merge_sizes)
        normalised = _encode(encoder, floats.view(12, 588), grid_thw, merge_sizes)
    assert torch.equal(raw, normalised)


@torch.no_grad()
def test_channels_last_weights_are_the_same_weights():
    encoder, inputs = _encoder(), media([[2, 4, 4]], [2])
    expected = _encode(encoder, *inputs)
    assert torch.equal(_encode(encoder.to(memory_format=torch.channels_last), *inputs), expected)


def test_pixels_are_cast_to_the_weights_dtype():
    pixels, grid_thw, merge_sizes = media(GRIDS, MERGES)
    encoder = _encoder()
    with torch.no_grad():
        exact = _encode(encoder, pixels, grid_thw, merge_sizes)
        half = _encode(encoder.bfloat16(), pixels, grid_thw, merge_sizes)
    assert half.dtype == torch.bfloat16
    # bfloat16 weights keep 8 bits: measured worst case 0.033 of 3.6; tokens at each other's place are off by 4.8.
    torch.testing.assert_close(half.float(), exact, atol=0.15, rtol=0)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (
            torch.zeros(11, 588),
            "Expected pixel_values of shape (12, 588), as the grids of 1 item(s) say, got (11, 588): "
            "pass the processor's tensors together, unchanged.",
        ),
        (
            torch.zeros(1, 12, 588),
            "Expected pixel_values of shape (12, 588), as the grids of 1 item(s) say, got (1, 12, 588)",
        ),
        (
            torch.zeros(12, 192),
            "Expected pixel_values of shape (12, 588), as the grids of 1 item(s) say, got (12, 192)",
        ),
        (
            torch.zeros(12, 588, dtype=torch.int64),
            "Expected pixel_values as normalised floats or raw uint8, got torch.int64.",
        ),
    ],
)
def test_pixels_that_contradict_their_grids_are_named(pixels, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _encode(_encoder(), pixels, torch.tensor([[1, 3, 4]]), torch.tensor([1]))


def test_return_dict_false_gives_a_tuple():
    pixels, grid_thw, merge_sizes = media([[1, 2, 3]], [1])
    output = _encoder()(pixels, grid_thw, merge_sizes, return_dict=False)
    assert isinstance(output, tuple)
    assert output[0].shape == (6, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 8])
def test_blocks_of_rows_equal_the_whole(monkeypatch, dtype, threads):
    """Inference on the CPU takes rows in blocks; training takes them at once."""
    monkeypatch.setattr(module, "_ROTARY_ELEMENTS_PER_BLOCK", 7 * 3 * 8)
    monkeypatch.setattr(module, "_MLP_ROWS_PER_BLOCK", 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    states = torch.randn(33, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    table = rotary_table(torch.arange(66).view(33, 2), head_dim=16, rope_theta=10000.0)
    with torch.no_grad():
        blocks = apply_rotary(states, *table)
    assert torch.equal(blocks, apply_rotary(states, *table))
    layer = _encoder().to(dtype).encoder.layers[0].mlp
    hidden = torch.randn(33, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        mapped = layer(hidden)
    # Measured worst case 3.6e-7 of 2.2, in bfloat16 0 (other shapes may round otherwise); a block at another's place
    # is off by 2.
    torch.testing.assert_close(mapped, layer(hidden).detach(), atol=1e-5 if dtype == torch.float32 else 0.03, rtol=0)


@torch.no_grad()
def test_segments_and_rotations_are_made_once_for_all_layers(monkeypatch):
    encoder, calls = _encoder(), []

    def counted(name):
        made = getattr(module, name)
        return lambda *args, **kwargs: (calls.append(name), made(*args, **kwargs))[1]

    for name in ("pack_segments", "rotary_table"):
        monkeypatch.setattr(module, name, counted(name))
    encoder(*media(GRIDS, MERGES))
    assert encoder.config.num_hidden_layers > 1
    assert sorted(calls) == ["pack_segments", "rotary_table"]


# --- states of the layers ---


def test_states_of_the_layers_are_those_that_lead_to_the_tokens():
    encoder, (pixels, grid_thw, merge_sizes) = _encoder(), media(GRIDS, MERGES)
    expected = _encode(encoder, pixels, grid_thw, merge_sizes)
    output = encoder(pixels, grid_thw, merge_sizes, output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, expected)
    assert len(output.hidden_states) == 1 + encoder.config.num_hidden_layers
    # In order of appearance, however segments are packed.
    assert torch.equal(output.hidden_states[0], encoder.embeddings(pixels))
    last = encoder.post_layernorm(output.hidden_states[-1]).split(grid_thw.prod(dim=1).tolist())
    tokens = torch.cat([merge_blocks(part, merge) for part, merge in zip(last, MERGES, strict=True)])
    # Measured 0; rows of a norm round alike, whatever their order.
    torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=0)
    assert encoder(pixels, grid_thw, merge_sizes).hidden_states is None


def test_weights_of_attention_are_refused():
    encoder, arguments = _encoder(), media(GRIDS, MERGES)
    with pytest.raises(ValueError, match="Expected no output_attentions of the vision encoder"):
        encoder(*arguments, output_attentions=True)
