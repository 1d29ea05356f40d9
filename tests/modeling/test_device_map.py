"""Models spread over devices by accelerate answer as on one."""

import numpy as np
import pytest
import torch

from tests.conftest import GOLDEN
from videollama3 import VideoLlama3ForCausalLM
from videollama3.streaming import StreamingSession

pytest.importorskip("accelerate")

# Of older transformers, where the first weights are on disk.
pytestmark = pytest.mark.filterwarnings(
    "ignore:You are calling .generate.. with the `input_ids` being on a device:UserWarning"
)

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


SPREAD = pytest.mark.parametrize(
    "device_map",
    ["auto", {"": "cpu"}, PARTLY_ON_DISK, ENCODER_ON_DISK],
    ids=["auto", "cpu", "language model on disk", "encoder on disk"],
)


def _spread(device_map, folder):
    return VideoLlama3ForCausalLM.from_pretrained(
        GOLDEN / "ckpt", dtype="float32", device_map=device_map, offload_folder=folder
    )


@SPREAD
def test_answers_as_on_one_device(device_map, processor, model, tmp_path):
    conversation = [
        {
            "role": "user",
            "content": [{"type": "image", "image": str(GOLDEN / "media" / "img3_40x30.png")}, "What?"],
        }
    ]
    inputs = processor(conversation=conversation, add_generation_prompt=True, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    spread = _spread(device_map, tmp_path)
    if device_map == "auto" and torch.cuda.is_available():
        # On one device nothing moves inputs there.
        inputs = inputs.to("cuda")
    assert spread.generate(**inputs, max_new_tokens=4, do_sample=False).tolist() == expected.tolist()


@SPREAD
def test_a_session_goes_on_as_on_one_device(device_map, processor, model, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)
    said = []
    for number, one in enumerate((model, _spread(device_map, tmp_path / "weights"))):
        with StreamingSession(one, processor) as session:
            for second, frame in enumerate(frames):
                session.push(frame, float(second))
            first = "".join(session.ask("What?", max_new_tokens=4))
            session.save(tmp_path / str(number))
        with StreamingSession.load(one, processor, tmp_path / str(number)) as session:
            said.append((first, "".join(session.ask("And now?", max_new_tokens=4))))
    assert said[0] == said[1]
