"""Several documents in one row: positions that restart keep them apart, with media, on every backend."""

import functools
import re
import warnings

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import videollama3
from videollama3.modeling.modeling_videollama3 import holds_documents

from .tiny import IMAGE, VIDEO, image_and_video_request, images, prompt, text, tiny_config, videos

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
    assert holds_documents(torch.tensor([positions]), mask) is expected


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
    assert not holds_documents(row["position_ids"], row["attention_mask"])
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


@pytest.mark.slow
@torch.no_grad()
def test_documents_on_flex_attention(documents):
    """flex_attention is compiled; where the CPU has no compiler for it, there is nothing to test."""
    torch.manual_seed(0)
    model = videollama3.VideoLlama3ForCausalLM._from_config(
        tiny_config(), attn_implementation={"vision_config": "sdpa", "text_config": "flex_attention"}
    ).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = _pack([prompt(text(7, 10)), prompt(text(12, 11)), {**prompt((IMAGE, 6)), **images([[1, 2, 3]], [1])}])
        try:
            flex = model(**row).logits
        except (NotImplementedError, torch._inductor.exc.InductorError) as error:
            pytest.skip(f"flex_attention does not run here: {type(error).__name__}")
    model.set_attn_implementation("sdpa")
    # Measured worst case 9e-8 of 0.45; fresh weights attend almost evenly, yet a leak is off by more than 1e-2.
    torch.testing.assert_close(flex, model(**row).logits, atol=1e-4, rtol=0)
