"""Going on from a cache: media that it holds are not read again, and none may be missing."""

import pytest
import torch
from transformers import DynamicCache

from videollama3 import VideoLlama3ForCausalLM
from videollama3.modeling.cached_media import media_after_cache

from .tiny import IMAGE, VIDEO, batch, image_and_video_request, images, prompt, text, tiny_config, videos

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 301}
TOKENS = {"image": IMAGE, "video": VIDEO}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VideoLlama3ForCausalLM(tiny_config()).eval()


def _conversations(model):
    """Two rows after their first answers: the cache of these, the whole ids, the media of the whole and of the rest."""
    first = [image_and_video_request(), {**prompt(text(9, 30), (IMAGE, 8)), **images([[1, 2, 4]], [1], seed=31)}]
    cache = DynamicCache(config=model.config)
    inputs = batch(first, padding_side="left")
    answer = model.generate(**inputs, past_key_values=cache, **GREEDY)
    more = [
        {**prompt(text(3, 32), (IMAGE, 6), text(2, 33)), **images([[1, 2, 3]], [1], seed=34)},
        {**prompt(text(2, 35), (VIDEO, 4), text(5, 36)), **videos([[1, 4, 4]], [2], seed=37)},
    ]
    tail = torch.cat([row["input_ids"] for row in more])
    mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(2, 5 + tail.shape[1])], dim=1)
    whole = {"input_ids": torch.cat([answer, tail], dim=1), "attention_mask": mask}
    rest = {name: value for row in more for name, value in row.items() if name not in whole}
    rest["video_compression_mask"] = torch.ones(4, dtype=torch.bool)
    rows = zip(first, more, strict=True)
    everything = [_joined(one, other) for one, other in rows]
    media = {name: torch.cat([row[name] for row in everything if name in row]) for name in rest}
    return cache, whole, media, rest


def _joined(one, other):
    """Media of a row's first and second turn, one after the other."""
    if "pixel_values_videos" in other:
        other = {**other, "video_compression_mask": torch.ones(4, dtype=torch.bool)}
    names = [name for name in {**one, **other} if name not in ("input_ids", "attention_mask")]
    return {name: torch.cat([part[name] for part in (one, other) if name in part]) for name in names}


@pytest.mark.parametrize("given", ["whole", "rest"])
@torch.no_grad()
def test_the_answer_is_that_without_a_cache(model, given):
    cache, ids, media, rest = _conversations(model)
    expected = model.generate(**ids, **media, **GREEDY)
    chosen = media if given == "whole" else rest
    assert torch.equal(model.generate(**ids, **chosen, past_key_values=cache, **GREEDY), expected)


@torch.no_grad()
def test_media_that_were_all_read_are_not_read_again(model, monkeypatch):
    request = image_and_video_request()
    cache = DynamicCache(config=model.config)
    answer = model.generate(**request, past_key_values=cache, **GREEDY)
    ids = prompt(answer[0], text(4, 40))
    media = {name: value for name, value in request.items() if name not in ids}
    expected = model.generate(**ids, **media, **GREEDY)
    monkeypatch.setattr(type(model.model.vision_model), "forward", None)
    assert torch.equal(model.generate(**ids, **media, past_key_values=cache, **GREEDY), expected)


@torch.no_grad()
def test_missing_media_are_told(model):
    request = image_and_video_request()
    cache = DynamicCache(config=model.config)
    answer = model.generate(**request, past_key_values=cache, **GREEDY)
    ids = prompt(answer[0], (IMAGE, 6), text(4, 40))
    message = r"the images of the whole conversation \(18 visual tokens\) or those that follow \(6\), got images of 0"
    with pytest.raises(ValueError, match=message):
        model.generate(**ids, past_key_values=cache, **GREEDY)


def test_what_follows_by_hand():
    ids = torch.tensor([[1, IMAGE, IMAGE, 2, IMAGE, 3], [IMAGE, IMAGE, 4, 5, VIDEO, 6]])
    media = {
        "pixel_values": torch.arange(5.0)[:, None],
        "image_grid_thw": torch.tensor([[1, 1, 2], [1, 1, 1], [1, 1, 2]]),
        "image_merge_sizes": torch.tensor([1, 1, 1]),
        "pixel_values_videos": torch.arange(2.0)[:, None],
        "video_grid_thw": torch.tensor([[1, 1, 2]]),
        "video_merge_sizes": torch.tensor([1]),
        "video_compression_mask": torch.tensor([True, False]),
    }
    rest = media_after_cache(media, ids, num_cached=3, token_ids=TOKENS)
    assert rest["pixel_values"].tolist() == [[2.0]]
    assert rest["image_grid_thw"].tolist() == [[1, 1, 1]]
    assert rest["pixel_values_videos"] is media["pixel_values_videos"], "all of them follow"
    rest = media_after_cache(media, ids, num_cached=5, token_ids=TOKENS)
    assert {name: rest[name] for name in media} == dict.fromkeys(media)
    with pytest.raises(ValueError, match="that end between images, got some that end inside one"):
        media_after_cache(media, ids, num_cached=2, token_ids=TOKENS)
    assert media_after_cache({}, torch.tensor([[1, 2]]), num_cached=1, token_ids=TOKENS) == {}
