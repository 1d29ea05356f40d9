"""Attention without repeated keys gives the numbers of transformers' own, and is used where that would be."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from videollama3.random_checkpoint import build_random
from videollama3.streaming.grouped_attention import GROUPED_SDPA, grouped_attention, grouped_sdpa_attention

ROWS, HEADS, KEY_HEADS, WIDTH, CACHE = 2, 6, 2, 8, 37
# Sums in another order; seen 3e-7 of values about 1. A query with another head's keys is off by more than 0.1.
TOLERANCE = 2e-6


def module():
    attention = torch.nn.Module()
    attention.num_key_value_groups = HEADS // KEY_HEADS
    attention.is_causal = True
    return attention


def tensors(length, rows=ROWS):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, length, HEADS, WIDTH, generator=generator).transpose(1, 2)
    # As a growing cache gives them: the beginning of a longer buffer.
    key, value = torch.randn(2, rows, KEY_HEADS, 50, WIDTH, generator=generator)[..., :CACHE, :]
    return query, key, value


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "of each row"])
def test_values_are_those_of_sdpa(length, kind):
    query, key, value = tensors(length)
    mask = torch.ones(1, 1, length, CACHE, dtype=torch.bool).tril(CACHE - length)
    if kind == "of each row":
        mask = mask.repeat(ROWS, 1, 1, 1)
        mask[1, ..., :4] = False
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    if kind == "none":
        mask = None
        if length > 1:
            key, value = key[..., :length, :], value[..., :length, :]
    output, _ = grouped_sdpa_attention(module(), query, key, value, mask, scaling=0.3)
    expected, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module(), query, key, value, mask, scaling=0.3)
    assert output.shape == (ROWS, length, HEADS, WIDTH)
    torch.testing.assert_close(output, expected, atol=TOLERANCE, rtol=0)


def test_a_prompt_without_a_mask_where_a_kernel_that_shares_no_keys_is_pretended(monkeypatch):
    query, key, value = tensors(5)
    key, value = key[..., :5, :], value[..., :5, :]
    expected, _ = grouped_sdpa_attention(module(), query, key, value, None)
    for name in ("videollama3.streaming.grouped_attention", "videollama3.modeling.document_attention"):
        monkeypatch.setattr(f"{name}.kernel_shares_keys", lambda query: False)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", None)
    output, _ = grouped_sdpa_attention(module(), query, key, value, None)
    torch.testing.assert_close(output, expected, atol=TOLERANCE, rtol=0)


def test_the_cache_is_not_copied():
    """The largest tensor that is made is the mask, not keys for every head."""
    query, key, value = tensors(5, rows=1)
    mask = torch.ones(1, 1, 5, CACHE, dtype=torch.bool).tril(CACHE - 5)

    def copied(attend):
        with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
            attend(module(), query, key, value, mask)
        shapes = [event.input_shapes for event in profile.events() if event.name == "aten::copy_"]
        return any(len(one) > 0 and len(one[0]) >= 4 and CACHE in one[0] and WIDTH in one[0] for one in shapes)

    assert copied(ALL_ATTENTION_FUNCTIONS["sdpa"])
    assert not copied(grouped_sdpa_attention)


def test_only_sdpa_is_replaced_and_it_is_put_back():
    model, _ = build_random()
    config = model.config.text_config
    layer = model.model.language_model.layers[0].self_attn
    for implementation, within in (("sdpa", GROUPED_SDPA), ("torch_varlen", GROUPED_SDPA), ("eager", "eager")):
        config._attn_implementation = implementation
        with grouped_attention(model):
            assert layer.config._attn_implementation == within
            with grouped_attention(model):
                assert layer.config._attn_implementation == within
            assert layer.config._attn_implementation == within
        assert layer.config._attn_implementation == implementation
    config._attn_implementation = "sdpa"
    with pytest.raises(KeyError), grouped_attention(model):
        raise KeyError
    assert config._attn_implementation == "sdpa"
