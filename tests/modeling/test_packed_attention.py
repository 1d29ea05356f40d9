"""Attention over packed segments: backends agree, and no segment sees another."""

import itertools

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from videollama3.modeling import packed_attention
from videollama3.modeling.packed_attention import attend_packed, eager_segment_attention
from videollama3.modeling.packed_segments import Grid, pack_segments

# Seven segments of five lengths: 6 three times, 8, 15, 20, 12.
GRIDS = [Grid(1, 3, 5, 1), Grid(2, 2, 3, 1), Grid(1, 2, 4, 2), Grid(1, 4, 5, 1), Grid(1, 3, 2, 1), Grid(1, 3, 4, 1)]
HEADS, HEAD_DIM = 3, 8


def _module():
    module = torch.nn.Module().eval()
    module.is_causal = False
    module.num_key_value_groups = 1
    return module


def _attend(implementation, query, key, value, segments):
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_segment_attention)
    return attend_packed(
        attend,
        _module(),
        query,
        key,
        value,
        segments=segments,
        implementation=implementation,
        scaling=HEAD_DIM**-0.5,
    )


def _reference(query, key, value, segments):
    """One plain softmax per segment and head, in float64."""
    output = torch.empty_like(query, dtype=torch.float64)
    bounds = segments.cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        for head in range(query.shape[1]):
            q, k, v = (tensor[start:end, head].double() for tensor in (query, key, value))
            output[start:end, head] = torch.softmax(q @ k.T * HEAD_DIM**-0.5, dim=-1) @ v
    return output


def _states(segments, seed=0):
    total = int(segments.cu_seqlens[-1])
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(total, HEADS, HEAD_DIM, generator=generator) * 2 for _ in range(3)]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_backends_equal_a_loop_over_segments(implementation):
    segments = pack_segments(GRIDS, torch.device("cpu"))
    states = _states(segments)
    # Measured worst case 1.8e-6 of 5.6; segments of one length that see each other are off by 5.9.
    torch.testing.assert_close(
        _attend(implementation, *states, segments).double(), _reference(*states, segments), atol=1e-5, rtol=0
    )


def test_backends_agree_backward():
    segments = pack_segments(GRIDS, torch.device("cpu"))
    gradients = {}
    for implementation in ("eager", "sdpa"):
        states = [state.requires_grad_() for state in _states(segments)]
        output = _attend(implementation, *states, segments)
        (output * _states(segments, seed=1)[0]).sum().backward()
        gradients[implementation] = [state.grad for state in states]
    for eager, sdpa in zip(gradients["eager"], gradients["sdpa"], strict=True):
        # Measured worst case 1.6e-5 on gradients up to 24; a detached key or a leak is off by their size.
        torch.testing.assert_close(eager, sdpa, atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_segment_does_not_see_another(implementation):
    segments = pack_segments(GRIDS, torch.device("cpu"))
    bounds = segments.cu_seqlens.tolist()
    states = _states(segments)
    before = _attend(implementation, *states, segments)
    changed = slice(bounds[3], bounds[4])
    for state in states:
        state[changed] += 7.0
    after = _attend(implementation, *states, segments)
    untouched = torch.ones(len(before), dtype=torch.bool)
    untouched[changed] = False
    assert torch.equal(before[untouched], after[untouched])
    assert not torch.equal(before[changed], after[changed])


def test_eager_takes_segments_in_blocks_of_bounded_memory(monkeypatch):
    grids = [Grid(7, 2, 3, 1), Grid(2, 3, 3, 1)]
    segments = pack_segments(grids, torch.device("cpu"))
    states = _states(segments)
    whole = _attend("eager", *states, segments)
    counts = []

    def counting(module, query, key, value, attention_mask, **kwargs):
        counts.append((query.shape[0], query.shape[2]))
        return eager_segment_attention(module, query, key, value, attention_mask, **kwargs)

    # Room for the scores of two segments of six patches, and for eight queries of a segment of nine.
    monkeypatch.setattr(packed_attention, "_MAX_EAGER_SCORE_BYTES", 2 * 4 * HEADS * 6 * 6)
    monkeypatch.setattr(packed_attention, "eager_segment_attention", counting)
    blocks = attend_packed(
        counting, _module(), *states, segments=segments, implementation="eager", scaling=HEAD_DIM**-0.5
    )
    assert counts == [(2, 6), (2, 6), (2, 6), (1, 6), (1, 8), (1, 1), (1, 8), (1, 1)]
    # Measured worst case 1.4e-6 of 6.2 (another batch size rounds otherwise); a block at another's place is
    # off by the size of the values.
    torch.testing.assert_close(blocks, whole, atol=1e-5, rtol=0)


def test_eager_takes_one_long_segment_in_blocks_of_queries(monkeypatch):
    """A picture of 16,384 patches would write 17 GB of scores."""
    segments = pack_segments([Grid(1, 5, 6, 1), Grid(1, 2, 2, 1)], torch.device("cpu"))
    states = [torch.randn(34, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    shapes = []

    def attend(module, query, key, value, *args, **kwargs):
        shapes.append((*query.shape, key.shape[2]))
        return eager_segment_attention(module, query, key, value, *args, **kwargs)

    options = {"segments": segments, "implementation": "eager", "scaling": 0.5}
    expected = attend_packed(attend, torch.nn.Module(), *states, **options)
    assert len(shapes) == 2
    shapes.clear()
    monkeypatch.setattr(packed_attention, "_MAX_EAGER_SCORE_BYTES", 4 * HEADS * 30 * 7)
    result = attend_packed(attend, torch.nn.Module(), *states, **options)
    assert max(heads * length * keys for _, heads, length, _, keys in shapes) == HEADS * 7 * 30
    # Measured worst case 2e-7: a product of other shapes rounds otherwise.
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_flash_gets_all_segments_in_one_call_with_their_bounds():
    segments = pack_segments(GRIDS, torch.device("cpu"))
    states = _states(segments)
    calls = []

    def varlen(module, query, key, value, **kwargs):
        calls.append(kwargs)
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        return _reference(*rows, segments).to(query.dtype).unsqueeze(0), None

    output = attend_packed(
        varlen,
        _module(),
        *states,
        segments=segments,
        implementation="flash_attention_2",
        scaling=HEAD_DIM**-0.5,
    )
    assert torch.equal(output, _reference(*states, segments).float())
    (call,) = calls
    assert call["cu_seq_lens_q"].tolist() == call["cu_seq_lens_k"].tolist() == [0, 6, 12, 18, 26, 38, 53, 73]
    assert (call["max_length_q"], call["max_length_k"], call["is_causal"]) == (20, 20, False)
