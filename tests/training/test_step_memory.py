"""What a step is said to hold, against every allocation counted."""

import pytest
import torch

from tests.modeling.allocations import peak_bytes
from videollama3 import VideoLlama3Config, VideoLlama3ForCausalLM
from videollama3.training.step_memory import HeldMemory, ModelSize, StepMemory

SIZE = ModelSize(
    hidden_size=8,
    intermediate_size=16,
    num_layers=3,
    vision_hidden_size=4,
    vision_intermediate_size=6,
    vision_num_layers=5,
    vocab_size=100,
)


def test_parts_by_hand():
    memory = StepMemory(SIZE)
    assert memory.layer_inputs(40, 84) == 4 * 40 * 8 * 3 + 2 * 84 * 4 * 5
    assert StepMemory(SIZE, bf16=False).layer_inputs(40, 84) == 4 * 40 * 8 * 3 + 4 * 84 * 4 * 5
    assert StepMemory(SIZE, encoder_learns=False).layer_inputs(40, 84) == 4 * 40 * 8 * 3
    assert memory.layer_at_work(1000, 0) == 1000 * (12 * 16 + 34 * 8)
    assert memory.layer_at_work(0, 1000) == 1000 * (6 * 6 + 28 * 4 + 2 * 588)
    # The logits of 2048 trained tokens at most exist at once.
    assert memory.logits(10) == 12 * 10 * 100
    assert memory.logits(5000) == 12 * 2048 * 100
    assert memory.whole(40, 0, 10) == memory.layer_inputs(40, 0) + memory.layer_at_work(40, 0)
    assert memory.whole(40, 0, 2000) == memory.layer_inputs(40, 0) + memory.logits(2000)
    # The encoder alone decides where there is hardly any text.
    assert memory.whole(1, 9000, 1) == memory.layer_inputs(0, 9000) + memory.layer_at_work(0, 9000)


def test_held_are_weights_and_of_the_trained_ones_gradients_and_two_moments():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4, device="meta"), torch.nn.Linear(4, 5, device="meta"))
    model[0].requires_grad_(False)
    assert HeldMemory.of(model) == HeldMemory(weights=4 * (16 + 25), gradients=4 * 25, moments=8 * 25)
    assert HeldMemory.of(model).whole == 4 * 41 + 12 * 25


@pytest.mark.parametrize("encoder_learns", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("case", ["text", "video", "many labels"])
def test_the_estimate_is_what_a_step_holds(bf16, encoder_learns, case):
    tokens, frames, supervised = {"text": (2400, 0, 40), "video": (400, 20, 40), "many labels": (1200, 0, 1000)}[case]
    torch.manual_seed(0)
    config = VideoLlama3Config(
        text_config={
            "vocab_size": 8000 if case == "many labels" else 500,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
        image_token_id=5,
        video_token_id=6,
    )
    model = VideoLlama3ForCausalLM(config).train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.model.vision_model.requires_grad_(encoder_learns)
    for weights in model.parameters():
        # They are there between steps, so they are no part of one.
        weights.grad = torch.zeros_like(weights) if weights.requires_grad else None
    ids = torch.randint(10, 500, (1, tokens))
    labels = torch.full_like(ids, -100)
    labels[:, -supervised:] = ids[:, -supervised:]
    media = {}
    if frames:
        grid = (frames, 8, 8)
        ids[:, 1 : 1 + frames * 16] = 6
        media = {
            "pixel_values_videos": torch.randn(frames * 64, 588),
            "video_grid_thw": torch.tensor([grid]),
            "video_merge_sizes": torch.tensor([2]),
        }

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=labels, use_cache=False, **media).loss
        loss.backward()

    step()
    memory = StepMemory(ModelSize.of(config), bf16=bf16, encoder_learns=encoder_learns)
    estimate = memory.whole(tokens, frames * 64, supervised)
    assert 0.8 < estimate / peak_bytes(step) < 1.2
