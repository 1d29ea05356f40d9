"""The class inside transformers with the same weights, as an oracle: features and logits."""

import pytest
import torch
from transformers.models.video_llama_3 import configuration_video_llama_3 as native_configuration
from transformers.models.video_llama_3 import modeling_video_llama_3 as native_modeling

from .tiny import IMAGE, VIDEO, image_and_video_request, images, prompt, text, videos


def native_twin(model):
    """transformers' model with our configuration's sizes and our weights, by name."""
    config = model.config.to_dict()
    for part in ("text_config", "vision_config"):
        config[part].pop("model_type")
    rope_theta = config["vision_config"].pop("rope_theta")
    native = native_configuration.VideoLlama3Config(
        text_config={**config["text_config"], "model_type": "qwen2"},
        vision_config={
            **config["vision_config"],
            "model_type": "video_llama_3_vision",
            "rope_parameters": {"rope_type": "axial", "rope_theta": rope_theta},
        },
        image_token_id=config["image_token_id"],
        video_token_id=config["video_token_id"],
        tie_word_embeddings=False,
    )
    native._attn_implementation = "sdpa"
    twin = native_modeling.VideoLlama3ForConditionalGeneration(native).eval()
    # Strict: every name is shared, nothing is left over on either side.
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin


@pytest.fixture(scope="module")
def native(model):
    return native_twin(model)


# One, two and three items; unequal sides; both released merge sizes, and 4 as a setting of ours.
REQUESTS = {
    "one_image": ([[1, 5, 7]], [1]),
    "images_of_unequal_sizes": ([[1, 5, 7], [1, 3, 4], [1, 8, 2]], [1, 1, 1]),
    "images_merged": ([[1, 4, 6], [1, 8, 2]], [2, 2]),
    "videos": ([[3, 4, 6], [2, 2, 8]], [2, 2]),
    "mixed_merge_sizes": ([[1, 3, 4], [4, 4, 6], [1, 8, 12]], [1, 2, 4]),
}


@pytest.mark.parametrize("name", REQUESTS)
@torch.no_grad()
def test_encoder_features(model, native, name):
    inputs = images(*REQUESTS[name])
    arguments = (inputs["pixel_values"], inputs["image_grid_thw"], inputs["image_merge_sizes"])
    ours = model.model.vision_model(*arguments).last_hidden_state
    theirs = native.model.vision_model(*arguments).last_hidden_state
    # Measured worst case 4.7e-6 of 4.8; angles in bfloat16 are off by 1.4e-3, rows and columns swapped by 2.6.
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", REQUESTS)
@torch.no_grad()
def test_projected_features(model, native, name):
    inputs = images(*REQUESTS[name])
    ours = model.get_image_features(**inputs).pooler_output
    theirs = native.get_image_features(**inputs).pooler_output
    assert [len(part) for part in ours] == [len(part) for part in theirs]
    for our, their in zip(ours, theirs, strict=True):
        # Measured worst case 5.5e-6 of 3.0; tanh instead of exact GELU in the projector is off by 7e-4.
        torch.testing.assert_close(our, their, atol=5e-5, rtol=0)


@torch.no_grad()
def _compare_logits(model, native, request):
    ours = model(**request)
    theirs = native(**request)
    # Measured worst case 1.8e-5 of 4.9; tanh GELU in the projector is off by 2e-3, a mask moved by one token by 3.
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=0)
    return ours


def test_logits_of_text(model, native):
    _compare_logits(model, native, prompt(text(23)))


def test_logits_of_images(model, native):
    request = prompt(text(4), (IMAGE, 35), text(2, 3), (IMAGE, 3), text(5, 4))
    _compare_logits(model, native, {**request, **images([[1, 5, 7], [1, 6, 2]], [1, 2])})


def test_logits_of_a_video_without_mask(model, native):
    request = prompt(text(4), (VIDEO, 18), text(5, 4))
    _compare_logits(model, native, {**request, **videos([[3, 4, 6]], [2])})


def test_logits_of_image_and_pruned_videos(model, native):
    request = image_and_video_request()
    assert 0 < request["video_compression_mask"].sum() < request["video_compression_mask"].numel()
    output = _compare_logits(model, native, request)
    assert output.image_hidden_states.shape == (12, 64)
    assert output.video_hidden_states.shape == (int(request["video_compression_mask"].sum()), 64)


@torch.no_grad()
def test_greedy_answers(model, native):
    request = image_and_video_request()
    ours = model.generate(**request, max_new_tokens=8, do_sample=False, pad_token_id=301)
    theirs = native.generate(**request, max_new_tokens=8, do_sample=False, pad_token_id=301)
    assert torch.equal(ours, theirs)
