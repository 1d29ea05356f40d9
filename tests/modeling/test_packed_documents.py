"""Several documents in one row: positions that restart keep them apart, with media, on every backend."""

import functools
import itertools
import re

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import videollama3
from videollama3.modeling import packed_documents
from videollama3.modeling.packed_documents import look_at_positions, read_documents

from .tiny import IMAGE, VIDEO, image_and_video_request, prompt, text, tiny_config, videos

BACKENDS = ["eager", "sdpa"]


@pytest.fixture(params=BACKENDS)
def packing_model(request):
    torch.manual_seed(0)
    model = videollama3.VideoLlama3ForCausalLM._from_config(tiny_config(), attn_implementation=request.param).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than fresh weights, so that attention is far from uniform.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def documents():
    """Three documents of unequal lengths: text; image and video; video."""
    video = videos([[2, 2, 4]], [2], seed=9)
    second = image_and_video_request()
    third = {**prompt(text(3, 11), (VIDEO, 4), text(4, 12)), **video}
    return [prompt(text(7, 10)), second, third]


def _pack(documents, **extra):
    """One row: ids and media one after the other, positions from 0 in each."""
    row = {
        "input_ids": torch.cat([document["input_ids"] for document in documents], dim=1),
        "position_ids": torch.cat([torch.arange(d["input_ids"].shape[1]) for d in documents]).unsqueeze(0),
    }
    for name in sorted({name for document in documents for name in document} - {"input_ids", "attention_mask"}):
        row[name] = torch.cat(
            [
                # A video without a mask keeps all of its tokens.
                document.get(name, torch.ones(4, dtype=torch.bool))
                for document in documents
                if name in document or (name == "video_compression_mask" and "pixel_values_videos" in document)
            ]
        )
    return {**row, **extra}


def _lengths(documents):
    return [document["input_ids"].shape[1] for document in documents]


def _with_mask(row, form):
    length = row["input_ids"].shape[1]
    return {"none": {}, "ones": {"attention_mask": torch.ones(1, length, dtype=torch.long)}}[form]


@pytest.mark.parametrize("form", ["none", "ones"])
@torch.no_grad()
def test_documents_equal_their_single_runs(packing_model, documents, form):
    row = _pack(documents)
    logits = packing_model(**row, **_with_mask(row, form)).logits
    for packed, document in zip(logits.split(_lengths(documents), dim=1), documents, strict=True):
        # Measured worst case 8.3e-7 of 2.6 (other shapes round otherwise); documents that see each other are off by
        # 2.9.
        torch.testing.assert_close(packed, packing_model(**document).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", ["none", "ones"])
@torch.no_grad()
def test_a_changed_document_moves_no_other(packing_model, documents, form):
    row = _pack(documents)
    before = packing_model(**row, **_with_mask(row, form)).logits
    # Another text in the first document, other pixels in the second.
    row["input_ids"] = row["input_ids"].clone()
    row["input_ids"][:, :7] = text(7, 99)
    row["pixel_values"] = row["pixel_values"] + 0.5
    after = packing_model(**row, **_with_mask(row, form)).logits
    first, second, third = zip(
        before.split(_lengths(documents), dim=1), after.split(_lengths(documents), dim=1), strict=True
    )
    assert torch.equal(*third)
    assert not torch.equal(*first)
    assert not torch.equal(*second)


@torch.no_grad()
def test_padding_on_the_right_changes_nothing(packing_model, documents):
    row = _pack(documents)
    plain = packing_model(**row).logits
    length = plain.shape[1]
    padded = {
        **row,
        "input_ids": torch.nn.functional.pad(row["input_ids"], (0, 5), value=301),
        "position_ids": torch.nn.functional.pad(row["position_ids"], (0, 5)),
        "attention_mask": (torch.arange(length + 5) < length).long().unsqueeze(0),
    }
    # Measured worst case 0 of 2.6 (other shapes round otherwise); documents that see each other are off by 2.9.
    torch.testing.assert_close(packing_model(**padded).logits[:, :length], plain, atol=1e-4, rtol=0)


def test_gradients_do_not_cross_documents(packing_model, documents):
    row = _pack(documents)
    embeddings = packing_model.get_input_embeddings()(row["input_ids"]).detach().requires_grad_()
    hidden = packing_model.model(inputs_embeds=embeddings, position_ids=row["position_ids"]).last_hidden_state
    first, second, _ = _lengths(documents)
    hidden[:, first : first + second].sum().backward()
    moved = (embeddings.grad[0] != 0).any(dim=-1)
    assert moved.tolist() == [first <= token < first + second for token in range(len(moved))]


def test_loss_of_a_packed_row_equals_the_sum_of_its_documents(packing_model, documents):
    row = _pack(documents)
    labels = row["input_ids"].clone()
    labels[(labels == IMAGE) | (labels == VIDEO)] = -100
    # A document's first token is nobody's target: the token before it belongs to another.
    starts = torch.tensor([0, *_lengths(documents)[:-1]]).cumsum(0)
    labels[:, starts] = -100
    packed = packing_model(**row, labels=labels, num_items_in_batch=1).loss
    single = sum(
        packing_model(**document, labels=part, num_items_in_batch=1).loss
        for document, part in zip(documents, labels.split(_lengths(documents), dim=1), strict=True)
    )
    # Measured worst case 0 of 147 (a sum); one label more or less is off by about 6.
    torch.testing.assert_close(packed, single, atol=1e-2, rtol=0)


# --- what counts as documents ---


@pytest.mark.parametrize(
    ("positions", "mask", "expected"),
    [
        ([0, 1, 2, 0, 1], None, True),
        ([0, 1, 2, 0, 1], [1, 1, 1, 1, 1], True),
        ([0, 1, 0, 1, 0], [1, 1, 1, 1, 0], True),
        ([0, 1, 2, 3, 4], None, False),
        ([7, 8, 9, 10, 11], None, False),
        # What `generate` gives for rows padded on either side.
        ([1, 1, 0, 1, 2], [0, 0, 1, 1, 1], False),
        ([0, 0, 0, 1, 2], [0, 0, 1, 1, 1], False),
        ([0, 1, 2, 1, 1], [1, 1, 1, 0, 0], False),
        ([0, 0, 1, 0, 1], [0, 1, 1, 1, 1], True),
        # The last columns of a mask that covers a cache too.
        ([0, 1, 2, 0, 1], [1, 1, 1, 1, 1, 1, 1], True),
        ([5, 6, 7, 8, 9], [0, 0, 1, 1, 1, 1, 1], False),
    ],
)
def test_what_counts_as_documents(positions, mask, expected):
    mask = None if mask is None else torch.tensor([mask])
    assert look_at_positions(torch.tensor([positions]), mask)[0] is expected


def test_a_cache_of_documents_is_refused(packing_model, documents):
    row = _pack(documents)
    for options in ({"use_cache": True}, {"past_key_values": DynamicCache()}):
        with pytest.raises(ValueError, match=re.escape("Expected no cache (use_cache=False) for rows whose position")):
            packing_model(**row, **options)
    with pytest.raises(ValueError, match="generate answers one document at a time"):
        packing_model.generate(**row, max_new_tokens=2)
    assert packing_model(**row).past_key_values is None


@torch.no_grad()
def test_documents_after_padding_on_the_left(packing_model, documents):
    """Also beside a row without padding; what its positions say at the padding does not matter."""
    row = _pack([prompt(text(7, 10)), prompt(text(5, 11))])
    plain = packing_model(**row).logits
    for fill in (-1, 0, 1, 6):
        pad = functools.partial(torch.nn.functional.pad, pad=(2, 0))
        padded = {
            "input_ids": torch.cat([pad(row["input_ids"], value=301), text(14, 12).unsqueeze(0)]),
            "position_ids": torch.cat([pad(row["position_ids"], value=fill), torch.arange(14).unsqueeze(0)]),
            "attention_mask": torch.ones(2, 14, dtype=torch.long),
        }
        padded["attention_mask"][0, :2] = 0
        logits = packing_model(**padded).logits
        # Measured worst case 5e-7; documents that see each other are off by 1.8.
        torch.testing.assert_close(logits[:1, 2:], plain, atol=1e-4, rtol=0)
        other = packing_model(**prompt(text(14, 12))).logits
        torch.testing.assert_close(logits[1:], other, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_mask_of_a_compiled_graph_says_the_same(documents):
    """Where positions cannot be looked at, a mask of padding must not hide that they restart."""
    torch.manual_seed(0)
    model = videollama3.VideoLlama3ForCausalLM._from_config(tiny_config(), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    row = _pack([prompt(text(7, 10)), prompt(text(5, 11))])
    expected = model(**row).logits
    for left, right in ((0, 0), (2, 3)):
        padded = {name: torch.nn.functional.pad(tensor, (left, right)) for name, tensor in row.items()}
        padded["attention_mask"] = torch.nn.functional.pad(torch.ones(1, 12, dtype=torch.long), (left, right))
        logits = torch.compile(model, backend="eager")(**padded).logits[:, left : left + 12]
        # Measured worst case 5e-7; without a mask of its own it is off by 1.8.
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    # One document stays one: positions that jump, and padding in the middle, whose positions stand still.
    ids = text(8, 10).unsqueeze(0)
    for mask, positions in (
        ([1] * 8, [0, 1, 2, 10, 11, 12, 13, 14]),
        ([1, 1, 1, 0, 0, 1, 1, 1], [0, 1, 2, 2, 2, 3, 4, 5]),
    ):
        inputs = {"input_ids": ids, "attention_mask": torch.tensor([mask]), "position_ids": torch.tensor([positions])}
        kept = inputs["attention_mask"].bool()
        got, want = torch.compile(model, backend="eager")(**inputs).logits, model(**inputs, use_cache=True).logits
        torch.testing.assert_close(got[kept], want[kept], atol=1e-4, rtol=0)


def test_padding_between_documents_is_refused(packing_model):
    row = {**prompt(text(8)), "position_ids": torch.tensor([[0, 1, 2, 0, 0, 0, 1, 2]])}
    row["attention_mask"] = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
    assert look_at_positions(row["position_ids"], row["attention_mask"]) == (False, False)
    row["position_ids"][0, -1] = 0
    with pytest.raises(ValueError, match="Expected padding only before and after the documents of a row"):
        packing_model(**row)


def test_flash_takes_one_row(packing_model, documents, monkeypatch):
    row = {**prompt(text(6)), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    rows = {name: tensor.expand(2, -1) for name, tensor in row.items()}
    monkeypatch.setattr(packing_model.config.text_config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match=re.escape("Expected one row of documents for flash_attention_2, got 2 rows")):
        packing_model(**rows)


def test_bounds_reach_the_attention_function(packing_model, monkeypatch):
    """What kernels for packed sequences need arrives in every layer, unchanged."""
    seen = []

    def kernel(module, query, key, value, attention_mask, **kwargs):
        seen.append(
            {name: kwargs[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")}
        )
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "bounds", kernel)
    monkeypatch.setattr(packing_model.config.text_config, "_attn_implementation_internal", "bounds")
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    options = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 5, "max_length_k": 5}
    with torch.no_grad():
        packing_model(**prompt(text(9)), **options)
    assert seen == [options] * 2


# --- positions that leave some out, and kernels that go by bounds ---


def _larger_weights(implementation="sdpa", **text):
    torch.manual_seed(0)
    config = tiny_config()
    for name, value in text.items():
        setattr(config.text_config, name, value)
    model = videollama3.VideoLlama3ForCausalLM._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _by_hand(model, ids, positions, lengths):
    """Each document alone, on masks of all pairs that say no more than what comes later."""
    logits = []
    for part, places in zip(ids.split(lengths, dim=1), positions.split(lengths, dim=1), strict=True):
        later = torch.ones(part.shape[1], part.shape[1]).triu(1).bool()
        mask = torch.zeros(later.shape).masked_fill(later, torch.finfo(torch.float32).min)[None, None]
        logits.append(model(input_ids=part, position_ids=places, attention_mask=mask, use_cache=False).logits)
    return torch.cat(logits, dim=1)


GAPS = [
    ([0, 1, 2, 10, 11, 0, 1, 2], [5, 3]),
    ([0, 1, 2, 10, 11, 12, 13, 14], [8]),
    ([4, 5, 6, 0, 1, 2, 3, 9], [3, 5]),
    ([0, 5, 6, 1, 2, 4, 8, 9], [3, 5]),
]


@pytest.mark.parametrize(("positions", "lengths"), GAPS)
@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
@pytest.mark.parametrize("form", ["none", "ones"])
@torch.no_grad()
def test_positions_that_are_left_out_begin_no_document(packing_model, positions, lengths, compiled, form):
    ids, positions = text(8).unsqueeze(0), torch.tensor([positions])
    torch.compiler.reset()
    run = torch.compile(packing_model, backend="eager") if compiled else packing_model
    mask = torch.ones_like(ids) if form == "ones" else None
    expected = _by_hand(packing_model, ids, positions, lengths)
    logits = run(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    # Measured worst case 1e-6; documents divided at a gap, or joined, are off by 1.3.
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def _flash_stand_in(module, query, key, value, attention_mask, *, scaling, **kwargs):
    """What a varlen kernel computes, in a loop; it goes by nothing but bounds."""
    assert attention_mask is None
    assert torch.equal(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"])
    bounds = kwargs["cu_seq_lens_q"].tolist()
    assert (bounds[0], bounds[-1]) == (0, query.shape[2])
    assert kwargs["max_length_q"] == max(b - a for a, b in itertools.pairwise(bounds))
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling, enable_gqa=True
        )
        for a, b in itertools.pairwise(bounds)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
@pytest.mark.parametrize(
    ("positions", "mask", "lengths"),
    [
        ([0, 1, 2, 0, 1, 2, 3, 4], None, [3, 5]),
        ([1, 2, 3, 1, 2, 3, 4, 5], None, [3, 5]),
        ([4, 5, 6, 0, 1, 2, 3, 9], None, [3, 5]),
        ([0, 1, 2, 1, 2, 3, 4, 5], [1] * 8, [3, 5]),
        ([1, 2, 3, 1, 2, 3, 0, 0], [1] * 6 + [0, 0], [3, 3]),
    ],
)
@torch.no_grad()
def test_a_stand_in_for_flash_gets_the_bounds_of_every_document(monkeypatch, positions, mask, lengths, compiled):
    model = _larger_weights()
    ids, positions = text(8).unsqueeze(0), torch.tensor([positions])
    count = sum(lengths)
    expected = _by_hand(model, ids[:, :count], positions[:, :count], lengths)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_stand_in", _flash_stand_in)
    monkeypatch.setattr(model.config.text_config, "_attn_implementation_internal", "flash_stand_in")
    torch.compiler.reset()
    reads = []

    def counted(*arguments):
        reads.append(read_documents(*arguments))
        return reads[-1]

    monkeypatch.setattr(packed_documents, "read_documents", counted)
    run = torch.compile(model, backend="eager") if compiled else model
    mask = None if mask is None else torch.tensor([mask])
    logits = run(input_ids=ids, position_ids=positions, attention_mask=mask).logits[:, :count]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    # For all layers together: it waits for the device.
    assert len(reads) == 1


@torch.no_grad()
def test_a_cache_that_is_asked_for_does_not_join_documents_in_a_graph():
    model, ids = _larger_weights(), text(12).unsqueeze(0)
    positions = torch.cat([torch.arange(7), torch.arange(5)]).unsqueeze(0)
    # After many graphs of other tests torch would give up compiling, and the model look at the positions itself.
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    logits = compiled(input_ids=ids, position_ids=positions, use_cache=True).logits
    torch.testing.assert_close(logits, model(input_ids=ids, position_ids=positions).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_documents_with_a_sliding_window(implementation):
    """A window of four tokens, also in a graph: what a document's tokens see is the same as in its run alone."""
    layers = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4, "use_sliding_window": True}
    model = _larger_weights(implementation, **layers)
    ids, positions = text(19).unsqueeze(0), torch.cat([torch.arange(11), torch.arange(8)]).unsqueeze(0)
    single = [model(input_ids=part, use_cache=False).logits for part in ids.split([11, 8], dim=1)]
    assert not torch.allclose(single[0], _larger_weights(implementation)(input_ids=ids[:, :11]).logits, atol=1e-2)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    for run in (model, compiled):
        for mask in (None, torch.ones_like(ids)):
            logits = run(input_ids=ids, position_ids=positions, attention_mask=mask).logits
            torch.testing.assert_close(logits, torch.cat(single, dim=1), atol=1e-4, rtol=0)
