"""The whole model: features at their placeholders, logits, loss, gradients, generation."""

import contextlib
import copy
import re

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

from videollama3 import VideoLlama3ForCausalLM, VideoLlama3Model
from videollama3.modeling.vision_encoder_videollama3 import VideoLlama3VisionModel

from .tiny import IMAGE, VIDEO, batch, image_and_video_request, images, prompt, text, tiny_config, videos

GREEDY = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 301}


@pytest.fixture
def request_with_media():
    """An image of 12 tokens and two pruned videos of 12 and 6 tokens, one row."""
    return image_and_video_request()


@pytest.fixture
def requests():
    """Three rows of unequal lengths: image and videos, text only, one image."""
    last = {**prompt(text(3, 7), (IMAGE, 8), text(11, 8)), **images([[1, 4, 8]], [2], seed=9)}
    return [image_and_video_request(), prompt(text(9, 6)), last]


def _trainable(model):
    """A copy in training mode, without gradients."""
    trained = copy.deepcopy(model).train()
    trained.zero_grad()
    return trained


def _labels(request, supervised=10):
    """The last ids of a row are supervised."""
    labels = torch.full_like(request["input_ids"], -100)
    labels[:, -supervised:] = request["input_ids"][:, -supervised:]
    return labels


def _gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_close_gradients(got, expected, *, atol):
    assert got.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max().clamp(min=1e-3)
        torch.testing.assert_close(
            got[name] / scale, expected[name] / scale, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- features and placeholders ---


@torch.no_grad()
def test_image_features_are_a_list_of_one_tensor_per_image(model):
    inputs = images([[1, 3, 4], [1, 4, 8], [1, 5, 7]], [1, 2, 1])
    output = model.get_image_features(**inputs)
    assert isinstance(output.pooler_output, list)
    assert [tuple(part.shape) for part in output.pooler_output] == [(12, 64), (8, 64), (35, 64)]
    assert output.last_hidden_state.shape == (55, 64)
    assert isinstance(model.model.get_image_features(**inputs, return_dict=False), tuple)


@torch.no_grad()
def test_video_features_are_the_kept_ones(model):
    inputs = videos([[2, 4, 6], [3, 2, 4]], [2, 2], keep=0.6)
    mask = inputs["video_compression_mask"]
    pruned = model.get_video_features(**inputs).pooler_output
    whole = model.get_video_features(**{**inputs, "video_compression_mask": None}).pooler_output
    kept = [int(part.sum()) for part in mask.split([12, 6])]
    assert kept[0] < 12
    assert kept[1] < 6
    assert isinstance(pruned, list)
    assert [len(part) for part in pruned] == kept
    assert [len(part) for part in whole] == [12, 6]
    # Measured worst case 0 of 2.3 (the projector sees other numbers of rows); a neighbour's features are off by 1.6.
    torch.testing.assert_close(torch.cat(pruned), torch.cat(whole)[mask], atol=2e-5, rtol=0)


@torch.no_grad()
def test_features_stand_at_their_placeholders(model, request_with_media):
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    output = model(**request_with_media)
    hook.remove()
    ids = request_with_media["input_ids"]
    expected = model.get_input_embeddings()(ids)
    expected[ids == IMAGE] = output.image_hidden_states
    expected[ids == VIDEO] = output.video_hidden_states
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize(
    ("row", "given", "message"),
    [
        (
            prompt(text(4), (IMAGE, 11)),
            images([[1, 3, 4]], [1]),
            "Expected as many image placeholders (id 308) in input_ids as image features, got 11 placeholders and "
            "12 features: input_ids were cut, or belong to other media or to another pruning mask.",
        ),
        (
            prompt((VIDEO, 13), text(4)),
            videos([[2, 4, 6]], [2]),
            "Expected as many video placeholders (id 309) in input_ids as video features, got 13 placeholders and "
            "12 features",
        ),
        (
            prompt((VIDEO, 12), text(4)),
            {**videos([[2, 4, 6]], [2]), "video_compression_mask": torch.arange(12) < 5},
            "Expected as many video placeholders (id 309) in input_ids as video features, got 12 placeholders and "
            "5 features",
        ),
        (
            prompt((VIDEO, 12)),
            {**videos([[2, 4, 6]], [2]), "video_compression_mask": torch.ones(48, dtype=torch.bool)},
            "Expected video_compression_mask as bool of shape (12,), one entry per visual token before pruning, "
            "got torch.bool of shape (48,).",
        ),
        (
            prompt((VIDEO, 12)),
            {**videos([[2, 4, 6]], [2]), "video_compression_mask": torch.ones(12, dtype=torch.int64)},
            "got torch.int64 of shape (12,).",
        ),
        (
            prompt((IMAGE, 12)),
            {"pixel_values": torch.zeros(12, 588)},
            "Expected grids and merge sizes together with pixel values, got None: pass all of the processor's tensors on.",
        ),
        ({}, {}, "Expected exactly one of input_ids and inputs_embeds."),
        (
            {"inputs_embeds": torch.zeros(1, 12, 64)},
            images([[1, 3, 4]], [1]),
            "got 0 placeholders and 12 features",
        ),
        (
            prompt(text(4), (IMAGE, 12)),
            {},
            "Expected image pixels together with the 12 image placeholders (id 308) in input_ids, got none",
        ),
        (
            prompt((IMAGE, 12), (VIDEO, 6)),
            images([[1, 3, 4]], [1]),
            "Expected video pixels together with the 6 video placeholders (id 309) in input_ids, got none",
        ),
    ],
)
@torch.no_grad()
def test_inputs_that_contradict_each_other_are_named(model, row, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**row, **given)


@torch.no_grad()
def test_embeddings_with_media_equal_ids_with_media(model, request_with_media):
    """As peft's prompt tuning calls a model: embeddings of ids, some of its own before them, and the media."""
    ids = request_with_media["input_ids"]
    media = {name: value for name, value in request_with_media.items() if name not in ("input_ids", "attention_mask")}
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeddings, **media).logits, model(input_ids=ids, **media).logits)
    learnt = torch.randn(1, 3, embeddings.shape[-1])
    logits = model(inputs_embeds=torch.cat([learnt, embeddings], dim=1), **media).logits
    assert logits.shape[1] == 3 + ids.shape[1]
    assert not torch.equal(logits[:, 3:], model(input_ids=ids, **media).logits)


# --- batches ---


@pytest.mark.parametrize("padding_side", ["left", "right"])
@torch.no_grad()
def test_a_batch_of_unequal_rows_equals_single_rows(model, requests, padding_side):
    logits = model(**batch(requests, padding_side=padding_side)).logits
    for row, request in enumerate(requests):
        length = request["input_ids"].shape[1]
        own = logits[row, -length:] if padding_side == "left" else logits[row, :length]
        # Measured worst case 3.2e-6 of 4.7; a row that sees its padding is off by 5.5.
        torch.testing.assert_close(own, model(**request).logits[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_batch_generates_what_single_rows_generate(model, requests):
    answers = model.generate(**batch(requests, padding_side="left"), **GREEDY)
    for answer, request in zip(answers, requests, strict=True):
        alone = model.generate(**request, **GREEDY)[0, request["input_ids"].shape[1] :]
        got = answer[-GREEDY["max_new_tokens"] :]
        assert got[: len(alone)].tolist() == alone.tolist()
        assert set(got[len(alone) :].tolist()) <= {301}


@torch.no_grad()
def test_rows_packed_by_position_ids_do_not_see_each_other(model):
    """Training packs documents into one row; positions restart at each."""
    first, second = text(9, 1), text(12, 2)
    positions = torch.cat([torch.arange(9), torch.arange(12)]).unsqueeze(0)

    def logits(document):
        ids = torch.cat([document, second]).unsqueeze(0)
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 9:]

    alone = model(input_ids=second.unsqueeze(0)).logits[0]
    # Measured worst case 2.6e-6 of 4.7; without the boundary the difference is 6.9.
    torch.testing.assert_close(logits(first), alone, atol=1e-4, rtol=0)
    assert torch.equal(logits(first), logits(first.flip(0)))


# --- logits ---


@torch.no_grad()
def test_logits_to_keep(model, request_with_media):
    every = model(**request_with_media).logits
    assert every.shape == (1, request_with_media["input_ids"].shape[1], 320)
    # Measured worst case 1.2e-6 of 4.5 (other shapes round otherwise); the position before is off by 4.7.
    for kept, expected in ((1, every[:, -1:]), (5, every[:, -5:]), (torch.tensor([0, 3, 11]), every[:, [0, 3, 11]])):
        got = model(**request_with_media, logits_to_keep=kept).logits
        torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)


@torch.no_grad()
def test_outputs_on_request(model, request_with_media):
    output = model(**request_with_media, output_hidden_states=True, use_cache=False)
    assert len(output.hidden_states) == 3
    assert output.past_key_values is None
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    as_tuple = model(**request_with_media, use_cache=False, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.logits)


@torch.no_grad()
def test_attention_of_each_part_is_chosen_apart(model, request_with_media):
    mixed = copy.deepcopy(model)
    mixed.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    assert mixed.model.vision_model.encoder.layers[0].self_attn.config._attn_implementation == "eager"
    assert mixed.model.language_model.config._attn_implementation == "sdpa"
    # Measured worst case 4.6e-6 of 4.9; frames that see each other on one backend are off by 5.
    torch.testing.assert_close(
        mixed(**request_with_media).logits, model(**request_with_media).logits, atol=1e-4, rtol=0
    )


@torch.no_grad()
def test_bfloat16(model, request_with_media):
    half = copy.deepcopy(model).bfloat16()
    output = half(**request_with_media)
    assert output.logits.dtype == output.video_hidden_states.dtype == torch.bfloat16
    exact = model(**request_with_media).logits
    # bfloat16 keeps 8 bits: measured worst case 0.19 of 4.9; another position's logits are off by 5.
    torch.testing.assert_close(output.logits.float(), exact, atol=0.5, rtol=0)
    assert half.generate(**request_with_media, **GREEDY).shape[1] > request_with_media["input_ids"].shape[1]


@torch.no_grad()
def test_uint8_pixels(model):
    raw = images([[1, 3, 4]], [1])
    raw["pixel_values"] = torch.randint(
        0, 256, (12, 588), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    floats = {**raw, "pixel_values": (raw["pixel_values"].float() / 255 - 0.5) / 0.5}
    row = prompt(text(4), (IMAGE, 12), text(3, 3))
    assert torch.equal(model(**row, **raw).logits, model(**row, **floats).logits)


# --- loss ---


def test_loss_and_gradients_equal_full_cross_entropy(model, request_with_media):
    labels = _labels(request_with_media)
    ours = _trainable(model)
    output = ours(**request_with_media, labels=labels)
    output.loss.backward()
    full = _trainable(model)
    logits = full(**request_with_media).logits
    loss = nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
    loss.backward()
    # Measured worst case 0 of 6.2; labels off by one position are off by 0.28.
    torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=0)
    got, expected = _gradients(ours), _gradients(full)
    assert any(name.startswith("model.vision_model") for name in got)
    assert any(name.startswith("model.projector") for name in got)
    # Measured worst case 0 of a tensor's largest entry; a part without gradient fails the keys.
    _assert_close_gradients(got, expected, atol=1e-3)


def test_logits_are_skipped_in_training_with_labels_only(model, request_with_media):
    labels = _labels(request_with_media)
    trained = _trainable(model)
    assert trained(**request_with_media, labels=labels).logits is None
    assert trained(**request_with_media).logits is not None
    assert trained(**request_with_media, labels=labels, skip_logits=False).logits is not None
    with torch.no_grad():
        evaluated = model(**request_with_media, labels=labels)
        assert evaluated.logits.shape[1] == labels.shape[1]
        skipped = model(**request_with_media, labels=labels, skip_logits=True)
    assert skipped.logits is None
    assert torch.equal(skipped.loss, evaluated.loss)


@torch.no_grad()
def test_num_items_in_batch(model, request_with_media):
    labels = _labels(request_with_media)
    mean = model(**request_with_media, labels=labels).loss
    for divisor in (25, torch.tensor(25)):
        loss = model(**request_with_media, labels=labels, num_items_in_batch=divisor).loss
        # Measured worst case 0 of 2.5; the mean over the 10 supervised positions is off by 3.7.
        torch.testing.assert_close(loss, mean * 10 / 25, atol=1e-5, rtol=0)


def test_labels_of_another_shape_are_named(model, request_with_media):
    length = request_with_media["input_ids"].shape[1]
    message = f"Expected labels of shape (1, {length}), one per input id, got (1, 3)."
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**request_with_media, labels=torch.zeros(1, 3, dtype=torch.long))


# --- gradient checkpointing ---


def _checkpoint(model, use_reentrant):
    # The name since transformers 5.2x, or the one before it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    return model


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, request_with_media, use_reentrant):
    labels = _labels(request_with_media)
    plain = _trainable(model)
    plain(**request_with_media, labels=labels).loss.backward()
    checkpointed = _checkpoint(_trainable(model), use_reentrant)
    layer = checkpointed.model.vision_model.encoder.layers[0]
    runs = []
    layer.self_attn.register_forward_hook(lambda *args: runs.append(None))
    checkpointed(**request_with_media, labels=labels).loss.backward()
    assert len(runs) == 2 * 2, "for images and for videos: forward, and again in the backward pass"
    # Measured worst case 0, the same operations; a layer left out of the backward pass fails the keys.
    _assert_close_gradients(_gradients(checkpointed), _gradients(plain), atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_trains_a_part_of_a_frozen_model(model, request_with_media, use_reentrant):
    """As adapters do: everything frozen but something inside a checkpointed encoder layer."""
    labels = _labels(request_with_media)
    trained = _trainable(model)
    trained.requires_grad_(False)
    weight = trained.model.vision_model.encoder.layers[0].mlp.fc1.weight.requires_grad_()
    trained(**request_with_media, labels=labels).loss.backward()
    expected = weight.grad.clone()
    assert expected.abs().max() > 0
    weight.grad = None
    _checkpoint(trained, use_reentrant)
    trained.enable_input_require_grads()
    trained(**request_with_media, labels=labels).loss.backward()
    # Measured worst case 0 of the largest entry; without the hook on the patches there is no gradient at all.
    torch.testing.assert_close(weight.grad / expected.abs().max(), expected / expected.abs().max(), atol=1e-5, rtol=0)


# --- generation ---


@torch.no_grad()
def test_generate_returns_the_prompt_and_new_tokens(model, request_with_media):
    answer = model.generate(**request_with_media, **GREEDY)
    length = request_with_media["input_ids"].shape[1]
    assert torch.equal(answer[:, :length], request_with_media["input_ids"])
    # The same, position by position, without generate.
    ids = request_with_media["input_ids"]
    for _ in range(answer.shape[1] - length):
        step = {**request_with_media, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids = torch.cat([ids, model(**step).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answer, ids)


@pytest.mark.parametrize("changes", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@torch.no_grad()
def test_generate_with_other_caches(model, requests, changes):
    inputs = batch(requests, padding_side="left")
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, **changes), expected)


@torch.no_grad()
def test_the_encoder_runs_once_per_answer(model, request_with_media, monkeypatch):
    calls = []
    inner = VideoLlama3VisionModel._encode
    monkeypatch.setattr(
        VideoLlama3VisionModel,
        "_encode",
        lambda self, pixels, grids: calls.append(len(pixels)) or inner(self, pixels, grids),
    )
    model.generate(**request_with_media, **GREEDY, num_beams=3, num_return_sequences=3)
    # Images, videos: not once per step, nor once per beam.
    assert calls == [12, 72]


@torch.no_grad()
def test_generate_computes_logits_of_one_position_of_the_prompt(model, request_with_media):
    positions = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: positions.append(output.shape[:2]))
    model.generate(**request_with_media, **GREEDY)
    handle.remove()
    assert set(positions) == {(1, 1)}


@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
@torch.no_grad()
def test_assisted_generation_with_media(model, request_with_media, way):
    """Both draw candidates that are then read several at a time; the media go in with the prompt."""
    expected = model.generate(**request_with_media, **GREEDY)
    if way == "assistant":
        assistant = copy.deepcopy(model)
        assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight) * 0.1)
        options = {"assistant_model": assistant}
    else:
        options = {"prompt_lookup_num_tokens": 2}
    assert torch.equal(model.generate(**request_with_media, **GREEDY, **options), expected)


@pytest.mark.parametrize("kind", ["image", "video"])
@torch.no_grad()
def test_an_assistant_may_propose_placeholders(model, kind):
    """Prompt lookup finds the words before the medium again at the prompt's end, and proposes what followed them."""
    told, media = (IMAGE, images([[1, 4, 6]], [1])) if kind == "image" else (VIDEO, videos([[2, 4, 6]], [2]))
    words = text(4, 11)
    request = {**prompt(words, (told, 24 if kind == "image" else 12), text(2, 12), words), **media}
    expected = model.generate(**request, **GREEDY)
    for count in (3, 10):
        assert torch.equal(model.generate(**request, **GREEDY, prompt_lookup_num_tokens=count), expected)


@torch.no_grad()
def test_more_logits_do_not_hide_missing_media(model, request_with_media):
    ids = {name: request_with_media[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="Expected image pixels together with the 12 image placeholders"):
        model(**ids, logits_to_keep=3)


def _expanded(requests, times, **options):
    """Every row with its media, `times` times in a row."""
    return batch([request for request in requests for _ in range(times)], padding_side="left", **options)


@torch.no_grad()
def test_expanded_rows_share_their_media(model, requests):
    """What beam search and several return sequences rest on: rows may differ after the prompt."""
    inputs = batch(requests, padding_side="left")
    tails = text(3 * 2 * 4, 12).view(6, 4)
    rows = {name: inputs.pop(name).repeat_interleave(2, dim=0) for name in ("input_ids", "attention_mask")}
    rows["input_ids"] = torch.cat([rows["input_ids"], tails], dim=1)
    rows["attention_mask"] = torch.cat([rows["attention_mask"], torch.ones_like(tails)], dim=1)
    shared = model(**rows, **inputs, media_expand_size=2).logits
    full = {**_expanded(requests, 2), **rows}
    # Measured worst case 0 of 5.2; rows that read the first row's tail instead of their own are off by 5.5.
    torch.testing.assert_close(shared, model(**full).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_beam_search_with_media(model, requests, use_cache):
    """Against a plain beam search that knows nothing of caches and expands every input."""
    beams, steps = 3, 4
    inputs = batch(requests, padding_side="left")
    answers = model.generate(
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=301,
        num_beams=beams,
        num_return_sequences=beams,
        use_cache=use_cache,
        length_penalty=0.0,
    ).view(len(requests), beams, -1)
    for answer, request in zip(answers, requests, strict=True):
        assert answer[:, -steps:].tolist() == _plain_beam_search(model, request, beams, steps)


def _plain_beam_search(model, request, beams, steps):
    found = [(0.0, [])]
    for _ in range(steps):
        candidates = []
        for score, tokens in found:
            ids = torch.cat([request["input_ids"], torch.tensor([tokens], dtype=torch.long)], dim=1)
            step = {**request, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            scores = model(**step, logits_to_keep=1).logits[0, -1].log_softmax(-1)
            scores[[300, 301]] = float("-inf")
            candidates += [(score + s.item(), [*tokens, t]) for t, s in enumerate(scores)]
        found = sorted(candidates, key=lambda pair: -pair[0])[:beams]
    return [tokens for _, tokens in found]


@torch.no_grad()
def test_several_return_sequences_with_media(model, requests):
    options = {"max_new_tokens": 5, "do_sample": True, "top_k": 50, "pad_token_id": 301}
    torch.manual_seed(3)
    answers = model.generate(**batch(requests, padding_side="left"), **options, num_return_sequences=4)
    torch.manual_seed(3)
    expanded = model.generate(**_expanded(requests, 4), **options)
    assert torch.equal(answers, expanded)
    assert len({tuple(answer.tolist()) for answer in answers[:4]}) > 1


@torch.no_grad()
def test_a_second_question_reads_the_cache_of_the_first(model, request_with_media):
    """The media are given once; the second turn, with a further image, continues on the cache."""
    first = {**request_with_media, "past_key_values": DynamicCache(config=model.config)}
    answer = model.generate(**first, **GREEDY)
    image = images([[1, 2, 3]], [1], seed=21)
    follow_up = prompt(answer[0], text(4, 20), (IMAGE, 6), text(3, 22))
    second = model.generate(**follow_up, **image, past_key_values=first["past_key_values"], **GREEDY)
    media = {**request_with_media, **{name: torch.cat([request_with_media[name], image[name]]) for name in image}}
    whole = model.generate(**{**media, **follow_up}, **GREEDY)
    assert torch.equal(second, whole)


@torch.no_grad()
def test_a_prefill_in_chunks_is_refused_rather_than_wrong(model, request_with_media):
    # transformers refuses by itself where it knows of raw pixels; older versions would have cut the
    # placeholders away from their features.
    with pytest.raises(ValueError, match=r"Chunked prefill cannot split|got 0 placeholders and 12 features"):
        model.generate(**request_with_media, **GREEDY, prefill_chunk_size=4)


@torch.no_grad()
def test_generate_from_embeddings(model):
    row = prompt(text(9))
    embeddings = model.get_input_embeddings()(row["input_ids"])
    answer = model.generate(inputs_embeds=embeddings, attention_mask=row["attention_mask"], **GREEDY)
    assert torch.equal(answer, model.generate(**row, **GREEDY)[:, 9:])


# --- the whole chain, and other configurations ---


@torch.no_grad()
def test_the_processors_tensors_go_straight_in(model, processor):
    picture = torch.randint(0, 256, (60, 90, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    conversation = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture.numpy()}, {"type": "text", "text": "What is this?"}],
        }
    ]
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs, **GREEDY)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_encoder_and_language_model_of_unequal_widths():
    torch.manual_seed(0)
    small = VideoLlama3ForCausalLM(tiny_config()).eval()
    request = image_and_video_request()
    with torch.no_grad():
        output = small(**request, labels=_labels(request))
    assert output.image_hidden_states.shape == (12, 32)
    assert output.logits.shape == (1, request["input_ids"].shape[1], 320)
    # Fresh weights know nothing: log(320) = 5.77, measured 5.77; a wrong divisor is off by 10.
    assert output.loss.item() == pytest.approx(5.77, abs=0.3)


def test_token_embeddings_can_grow(model, request_with_media):
    grown = copy.deepcopy(model)
    grown.resize_token_embeddings(333, mean_resizing=False)
    assert grown.config.text_config.vocab_size == 333
    assert grown.lm_head.weight.shape == grown.get_input_embeddings().weight.shape == (333, 64)
    with torch.no_grad():
        # Measured worst case 0 of 4.9 (other shapes round otherwise); a head that is not copied is off by 4.
        torch.testing.assert_close(
            grown(**request_with_media).logits[..., :320], model(**request_with_media).logits, atol=1e-4, rtol=0
        )


@torch.no_grad()
def test_an_answer_may_hold_a_placeholder(model):
    """With and without a cache; it is text like any other."""

    def image_token(input_ids, scores):
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([IMAGE]), 0.0)

    row = prompt(text(5))
    for use_cache in (True, False):
        options = {**GREEDY, "use_cache": use_cache, "logits_processor": [image_token]}
        assert model.generate(**row, **options)[0, 5:].tolist() == [IMAGE] * GREEDY["max_new_tokens"]


# --- Auto classes ---


def test_every_auto_class_that_knows_the_configuration_gives_this_model():
    """transformers looks for what is not registered by the configuration's class name, which it has one of, too."""
    given = {}
    for name in dir(transformers):
        auto = getattr(transformers, name) if name.startswith("AutoModel") else None
        if getattr(auto, "_model_mapping", None) is None:
            continue
        # Which it says where it does not know it.
        with contextlib.suppress(ValueError):
            given[name] = type(auto.from_config(tiny_config()))
    ours = {"AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"} & set(dir(transformers))
    assert given == {"AutoModel": VideoLlama3Model, **dict.fromkeys(ours, VideoLlama3ForCausalLM)}
