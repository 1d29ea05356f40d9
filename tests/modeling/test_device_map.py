"""Models spread over devices by accelerate answer as on one."""

import pytest

from tests.conftest import GOLDEN
from videollama3 import VideoLlama3ForCausalLM

pytest.importorskip("accelerate")

PARTLY_ON_DISK = {
    "model.vision_model": "cpu",
    "model.projector": "cpu",
    "model.language_model": "disk",
    "lm_head": "cpu",
}


ENCODER_ON_DISK = {
    "model.vision_model": "disk",
    "model.projector": "disk",
    "model.language_model": "cpu",
    "lm_head": "cpu",
}


# Of older transformers, where the first weights are on disk.
@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device:UserWarning")
@pytest.mark.parametrize(
    "device_map",
    ["auto", {"": "cpu"}, PARTLY_ON_DISK, ENCODER_ON_DISK],
    ids=["auto", "cpu", "language model on disk", "encoder on disk"],
)
def test_answers_as_on_one_device(device_map, processor, model, tmp_path):
    conversation = [
        {
            "role": "user",
            "content": [{"type": "image", "image": str(GOLDEN / "media" / "img3_40x30.png")}, "What?"],
        }
    ]
    inputs = processor(conversation=conversation, add_generation_prompt=True, return_tensors="pt")
    spread = VideoLlama3ForCausalLM.from_pretrained(
        GOLDEN / "ckpt", dtype="float32", device_map=device_map, offload_folder=tmp_path
    )
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert spread.generate(**inputs, max_new_tokens=4, do_sample=False).tolist() == expected.tolist()
