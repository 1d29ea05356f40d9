"""Attention by document: equal to the mask of all pairs and to each document alone, which it needs no mask for."""

import functools
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

import videollama3
from videollama3.modeling import document_attention
from videollama3.modeling.document_attention import (
    Documents,
    Qwen2DocumentAttention,
    attend_as_transformers,
    attend_documents,
    attends_by_document,
)
from videollama3.modeling.packed_documents import read_documents
from videollama3.modeling.torch_varlen import TORCH_VARLEN

from .tiny import text, tiny_config

# Six documents, all of other lengths, one of a single token.
LENGTHS = (7, 40, 1, 23, 64, 12)
TOTAL = sum(LENGTHS)
CPU = torch.device("cpu")
HEADS, KEY_HEADS, HEAD_DIM = 6, 2, 8
SCALING = HEAD_DIM**-0.5
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def _model(attention="sdpa", dtype=torch.float32, **text_changes):
    torch.manual_seed(0)
    config = tiny_config()
    for name, value in text_changes.items():
        setattr(config.text_config, name, value)
    model = videollama3.VideoLlama3ForCausalLM._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than fresh weights, so that attention is far from uniform.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def _row(lengths=LENGTHS):
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    return {"input_ids": text(sum(lengths)).unsqueeze(0), "position_ids": positions}


def _without_documents(monkeypatch):
    """The mask of all pairs instead, as before and as where attention by document does not serve."""
    monkeypatch.setattr(videollama3.modeling.packed_documents, "attends_by_document", lambda *_, **__: False)


def _states(dtype=torch.float32, seed=0, total=TOTAL):
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    return [(torch.randn(1, count, total, HEAD_DIM, generator=generator) * 2).to(dtype) for count in heads]


def _run(attend, dtype=torch.float32):
    """Output and the gradients of query, key and value."""
    query, key, value, gradient = _states(dtype)
    states = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = attend(*states)
    output.backward(gradient.transpose(1, 2))
    return [output.detach(), *(state.grad for state in states)]


def _by_mask(query, key, value):
    """One softmax over all pairs with a mask, in float64."""
    document = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    order = torch.arange(TOTAL)
    mask = (document[:, None] == document) & (order[:, None] >= order)
    key, value = (tensor.double().repeat_interleave(HEADS // KEY_HEADS, dim=1) for tensor in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * SCALING
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2).to(query.dtype)


by_document = functools.partial(attend_documents, documents=Documents(LENGTHS), scaling=SCALING)


# Measured worst case 2.4e-5 of 36 in float32 and 0.016 of 36 in bfloat16 (without a gradient of 6.5), a unit in the
# last place; where the second document sees the first, outputs are off by 6.4 and gradients by 10.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 0.25)])
def test_equals_one_softmax_over_all_pairs_forward_and_backward(dtype, tolerance):
    for result, expected in zip(_run(by_document, dtype), _run(_by_mask, dtype), strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result, expected, atol=tolerance, rtol=0)
    # Another kernel on the CPU in bfloat16.
    states = _states(dtype)[:3]
    torch.testing.assert_close(by_document(*states), _by_mask(*states), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_document_is_bit_equal_to_itself_alone(dtype):
    output, *gradients = _run(by_document, dtype)
    query, key, value, gradient = _states(dtype)
    for number, (start, stop) in enumerate(itertools.pairwise(itertools.accumulate(LENGTHS, initial=0))):
        states = [tensor[:, :, start:stop].clone().requires_grad_() for tensor in (query, key, value)]
        alone = attend_documents(*states, documents=Documents((LENGTHS[number],)), scaling=SCALING)
        alone.backward(gradient[:, :, start:stop].transpose(1, 2))
        assert torch.equal(output[:, start:stop], alone)
        for state, packed in zip(states, gradients, strict=True):
            assert torch.equal(packed[:, :, start:stop], state.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_document_moves_no_other_bit(dtype):
    states = _states(dtype)[:3]
    before = by_document(*states)
    changed = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    for state in states:
        state[:, :, changed] += 7.0
    after = by_document(*states)
    untouched = torch.ones(TOTAL, dtype=torch.bool)
    untouched[changed] = False
    assert torch.equal(before[:, untouched], after[:, untouched])
    assert not torch.equal(before[:, changed], after[:, changed])


# --- where documents begin ---


@pytest.mark.parametrize(
    ("positions", "mask", "rows", "expected"),
    [
        ([[0, 1, 2, 0, 1]], None, 1, (3, 2)),
        ([[0, 1, 2, 0, 0]], None, 1, (3, 1, 1)),
        # Positions that are left out end none.
        ([[0, 1, 5, 6, 0]], None, 1, (4, 1)),
        ([[4, 5, 0, 1, 2]], None, 2, (2, 3, 2, 3)),
        # Padding is one document, however long.
        ([[0, 1, 0, 0, 0], [0, 1, 2, 0, 1]], [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], 2, (2, 3, 3, 2)),
        ([[0, 1, 2, 0, 0]], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], 2, (3, 2, 3, 1, 1)),
    ],
)
def test_where_documents_begin(positions, mask, rows, expected):
    mask = None if mask is None else torch.tensor(mask)
    assert read_documents(torch.tensor(positions), mask, rows).lengths == expected


# --- in the model ---


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        self.elements = max([self.elements, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return result


def test_nothing_of_all_pairs_is_made(monkeypatch):
    model, row = _model(), _row((150, 90, 160))
    pairs = 400 * 400
    with torch.no_grad(), _Largest() as largest:
        model.model(**row)
    assert largest.elements < pairs / 2
    _without_documents(monkeypatch)
    with torch.no_grad(), _Largest() as largest:
        model.model(**row)
    assert largest.elements >= pairs


def _loss_and_gradients(model, row):
    model.zero_grad()
    loss = model(**row, labels=row["input_ids"]).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.model.language_model.parameters())]


# Measured worst case 3e-8 in float32 and 0.0012 in bfloat16, of gradients up to 0.13; where the second document sees
# the first, 0.047.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.005)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_those_of_the_mask(monkeypatch, dtype, tolerance, checkpointing):
    model = _model(dtype=dtype).train()
    if checkpointing:
        # Renamed within the supported releases.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    by_document = _loss_and_gradients(model, _row())
    by_document = [tensor.clone() for tensor in by_document]
    _without_documents(monkeypatch)
    for result, expected in zip(by_document, _loss_and_gradients(model, _row()), strict=True):
        torch.testing.assert_close(result, expected, atol=tolerance, rtol=0)


def test_training_in_half_precision_equals_the_mask_under_autocast(monkeypatch):
    model = _model().train()
    with torch.autocast("cpu", torch.bfloat16):
        results = [tensor.clone() for tensor in _loss_and_gradients(model, _row())]
        _without_documents(monkeypatch)
        masked = _loss_and_gradients(model, _row())
    for result, expected in zip(results, masked, strict=True):
        # Measured worst case 0.001 of gradients up to 0.13; where the second document sees the first, 0.047.
        torch.testing.assert_close(result, expected, atol=0.005, rtol=0)


def test_several_rows_with_padding_equal_single_rows():
    model = _model()
    first, second = _row((30, 11, 4)), _row((9, 21))
    pad = (0, 15)
    rows = {name: torch.cat([first[name], torch.nn.functional.pad(second[name], pad)]) for name in first}
    mask = torch.ones(2, 45, dtype=torch.long)
    mask[1, 30:] = 0
    with torch.no_grad():
        logits = model(**rows, attention_mask=mask).logits
        # Measured worst case 6e-8 of 2.3 (other shapes round otherwise); where the second document sees the first, 2.1.
        torch.testing.assert_close(logits[:1], model(**first).logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[1:, :30], model(**second).logits, atol=1e-4, rtol=0)


# --- where the mask stays ---


def test_what_stays_with_the_mask():
    plain = _model()
    serves = functools.partial(attends_by_document, device=CPU)
    assert serves(plain.model.language_model)
    assert not serves(plain.model.language_model, output_attentions=True)
    assert not attends_by_document(plain.model.language_model, device=torch.device("mps"))
    assert not serves(_model("eager").model.language_model)
    sliding = _model(layer_types=["full_attention", "sliding_attention"], sliding_window=9, use_sliding_window=True)
    assert not serves(sliding.model.language_model)
    dropout = _model(attention_dropout=0.5)
    assert serves(dropout.model.language_model)
    assert not serves(dropout.model.language_model.train())
    compiled = _model()
    compiled.model.language_model.layers[1].compile(backend="eager")
    assert not serves(compiled.model.language_model)
    other = _model()
    other.model.language_model.layers[1].self_attn.__class__ = Qwen2DocumentAttention.__bases__[0]
    assert not serves(other.model.language_model)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["layers", "language_model", "whole"])
@torch.no_grad()
def test_a_compiled_decoder_gives_the_same(part):
    model, row = _model(), _row()
    expected = model(**row).logits
    if part == "layers":
        for layer in model.model.language_model.layers:
            layer.compile(backend="eager", fullgraph=True)
    elif part == "language_model":
        model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    run = torch.compile(model, backend="eager") if part == "whole" else model
    # A document that sees another is off by 2.5.
    torch.testing.assert_close(run(**row).logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_one_document_and_generation_are_untouched():
    model = _model()
    plain = _model()
    attend_as_transformers(plain.model.language_model)
    assert all(type(layer.self_attn) is Qwen2Attention for layer in plain.model.language_model.layers)
    ids = {"input_ids": text(12).unsqueeze(0), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    assert torch.equal(model(**ids).logits, plain(**ids).logits)
    assert torch.equal(model.generate(**ids, **GREEDY), plain.generate(**ids, **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", TORCH_VARLEN])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_prompt_in_float32_of_a_card_is_the_same_where_that_kernel_is_pretended(monkeypatch, attention, rows):
    model = _model(attention)
    ids = {"input_ids": text(12 * rows).view(rows, 12), "attention_mask": torch.ones(rows, 12, dtype=torch.long)}
    expected = model(**ids).logits, model.generate(**ids, **GREEDY)
    # On CUDA no float32 kernel lets heads share keys, but the one that holds the scores of all pairs.
    monkeypatch.setattr(document_attention, "kernel_shares_keys", lambda query: False)
    called = []
    attend = document_attention.attend_documents
    monkeypatch.setattr(
        document_attention, "attend_documents", lambda *args, **options: called.append(1) or attend(*args, **options)
    )
    # Seen: 2e-7.
    torch.testing.assert_close(model(**ids).logits, expected[0], atol=2e-6, rtol=0)
    assert torch.equal(model.generate(**ids, **GREEDY), expected[1])
    # The prompt of each call, not the tokens after it.
    assert len(called) == 2 * len(model.model.language_model.layers)


@torch.no_grad()
def test_bounds_that_a_kernel_cannot_use_are_an_error_where_float32_of_a_card_is_pretended(monkeypatch):
    model = _model(TORCH_VARLEN)
    monkeypatch.setattr(document_attention, "kernel_shares_keys", lambda query: False)
    with pytest.raises(ValueError, match="torch_varlen"):
        model(**_row(), **Documents(LENGTHS).bounds(CPU))
