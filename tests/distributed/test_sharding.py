"""transformers' own tensor parallelism and FSDP2, two real processes on the CPU (gloo), against one process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DistributedConfig

from tests.modeling.tiny import tiny_config
from tests.snippets import fenced_blocks
from videollama3 import VideoLlama3ForCausalLM, VideoLlama3VisionModel

from .launch import start
from .sharding import write_checkpoint, write_clips

# What a plan deals out; all else is whole on every process.
DEALT_OUT = ("q_proj.", "k_proj.", "v_proj.", "fc1.", "gate_proj.", "up_proj.", "lm_head.")
WIDE = ("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    for name, tied in (("own_head", False), ("tied", True)):
        write_checkpoint(folder / name, tied=tied)
    write_clips(folder)

    def job(checkpoint, config, do):
        return {"checkpoint": str(folder / checkpoint), "clips": str(folder), "config": config, "do": do}

    return {
        "tp": {**job("own_head", {"tp_size": 2}, "answer"), "save": str(folder / "saved")},
        "tp_tied": job("tied", {"tp_plan": "auto"}, "answer"),
        "fsdp": job("own_head", {"fsdp_size": 2}, "train"),
        "fsdp_tied": job("tied", {"fsdp_size": 2}, "train"),
    }


@pytest.fixture(scope="module")
def two(jobs, tmp_path_factory):
    return torch.load(start("sharding.py", tmp_path_factory.mktemp("two"), {"jobs": jobs}, processes=2, timeout=240))


@pytest.fixture(scope="module")
def one(jobs, tmp_path_factory):
    """In a process of its own as well: the worker changes a limit of the package."""
    return torch.load(start("sharding.py", tmp_path_factory.mktemp("one"), {"jobs": jobs}, processes=1, timeout=240))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp", "tp_tied"])
class TestTensorParallel:
    def test_weights_are_dealt_out(self, name, two):
        for rank in two[name]:
            halves = {key for key, (values, here) in rank["sharded"].items() if 2 * here == values}
            dealt_out = [key for key in halves if any(part in key for part in (*DEALT_OUT, *WIDE))]
            # Two layers: ten parameters of each in the encoder, ten in the language model (7 weights, 3 biases).
            assert len([key for key in dealt_out if "vision_model" in key]) == 2 * 10
            assert len([key for key in dealt_out if "language_model" in key]) == 2 * 10
            assert sum(values - here for values, here in rank["sharded"].values()) > 0.35 * rank["all"]

    def test_pruned_video_gives_the_same_answer(self, name, two, one):
        (expected,) = one[name]
        kept, total = expected["kept"]
        assert 0 < kept < total
        for rank in two[name]:
            assert rank["kept"] == expected["kept"]
            assert rank["tokens"] == expected["tokens"]
            # Measured worst case 4e-5 of 13; a bias of 0.5 added on both processes is off by more than 0.1.
            torch.testing.assert_close(rank["logits"], expected["logits"], atol=5e-4, rtol=0)

    def test_loss_and_gradients(self, name, two, one):
        (expected,) = one[name]
        for rank in two[name]:
            assert rank["loss"] == pytest.approx(expected["loss"], abs=1e-5)
            assert set(rank["gradients"]) == set(expected["gradients"])
            # Measured worst case 6e-6 of the largest; what is summed over one process only is off by a half.
            atol = 1e-4 * max(float(gradient.abs().max()) for gradient in expected["gradients"].values())
            for key, gradient in expected["gradients"].items():
                torch.testing.assert_close(rank["gradients"][key], gradient, atol=atol, rtol=0, msg=key)


@pytest.mark.slow
def test_the_script_of_the_page(jobs, one, tmp_path):
    """docs/scale.md, on the checkpoint and the clip of the other tests."""
    ((_, code), *_) = fenced_blocks((Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8"))
    job = jobs["tp"]
    code = code.replace('"DIR"', repr(job["checkpoint"])).replace("clip.mp4", f"{job['clips']}/0.mp4")
    code = code.replace("What happens in the video?", "What moves?").replace("max_new_tokens=128", "max_new_tokens=12")
    keep = """
import json, sys
if int(os.environ["RANK"]) == 0:
    with open(sys.argv[1]) as file:
        torch.save(output[0, inputs["input_ids"].shape[1] :].tolist(), json.load(file)["result"])
os._exit(0)
"""
    script = tmp_path / "answer.py"
    script.write_text("import os\n" + code + keep, encoding="utf-8")
    tokens = torch.load(start(script, tmp_path, {}, processes=2, timeout=240))
    assert tokens == one["tp"][0]["tokens"]


@pytest.mark.slow
def test_a_dealt_out_model_saves_whole_weights(jobs, two):
    saved, original = (load_file(f"{jobs['tp'][key]}/model.safetensors") for key in ("save", "checkpoint"))
    assert set(saved) == set(original)
    assert all(torch.equal(saved[name], original[name]) for name in original)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "fsdp_tied"])
class TestFullySharded:
    def test_every_parameter_is_a_shard(self, name, two, one):
        (expected,) = one[name]
        for rank in two[name]:
            assert set(rank["sharded"]) == set(expected["weights"])
            assert all(2 * here == values for values, here in rank["sharded"].values())

    def test_losses_and_weights(self, name, two, one):
        (expected,) = one[name]
        first, second = two[name]
        # Measured worst case 3e-6 of the largest: gradients of the chunks of the loss are summed in another order.
        for name, gradient in expected["gradients"].items():
            atol = 3e-5 * float(gradient.abs().max()) + 1e-6
            torch.testing.assert_close(first["gradients"][name], gradient, atol=atol, rtol=0, msg=name)
        for step, (a, b) in enumerate(expected["losses"]):
            assert first["losses"][step] == pytest.approx([a], abs=1e-4)
            assert second["losses"][step] == pytest.approx([b], abs=1e-4)
        assert expected["losses"][-1][0] < expected["losses"][0][0] - 0.1
        for key, weight in expected["weights"].items():
            torch.testing.assert_close(first["weights"][key], weight, atol=1e-4, rtol=0, msg=key)

    def test_clips_of_other_lengths_are_evaluated_without_waiting_for_ever(self, name, two, one):
        """Unequal numbers of chunks in the encoder would fetch a layer's weights unequally often."""
        (expected,) = one[name]
        first, second = two[name]
        assert first["evaluated"] + second["evaluated"] == pytest.approx(expected["evaluated"], abs=1e-4)


@pytest.mark.parametrize(
    ("tp_size", "text_heads", "message"),
    [
        (2, 4, r"the vision encoder's `num_attention_heads` \(3\), got 2: every process holds whole heads"),
        (3, 4, r"the language model's `num_attention_heads` \(4\), got 3"),
        (3, 6, r"the language model's `num_key_value_heads` \(2\), got 3"),
    ],
)
def test_heads_that_cannot_be_dealt_out_are_refused(tp_size, text_heads, message):
    model = VideoLlama3ForCausalLM(tiny_config())
    model.config.text_config.num_attention_heads = text_heads
    with pytest.raises(ValueError, match=message):
        VideoLlama3ForCausalLM.maybe_distribute_model(model, DistributedConfig(tp_size=tp_size), None)


def test_the_encoder_alone_has_both_plans():
    model = VideoLlama3VisionModel(tiny_config().vision_config)
    assert set(model.tp_plan) == set(model.config.base_model_tp_plan)
    assert model.fsdp_plan == {"encoder.layers.*": "free_full_weight"}
    with pytest.raises(ValueError, match=r"vision encoder's `num_attention_heads` \(3\), got 2"):
        VideoLlama3VisionModel.maybe_distribute_model(model, DistributedConfig(tp_size=2), None)
