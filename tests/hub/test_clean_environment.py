"""Saved folders load and answer in virtual environments that have the core dependencies and not this package.

The environments are real: created here, one with the oldest supported transformers and one with the release that
runs the tests, without torchvision and accelerate. Every load is a fresh process.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from tests.media import numbered_picture, write_clip
from videollama3 import VideoLlama3ImageProcessor, VideoLlama3VisionModel
from videollama3.random_checkpoint import build_random

from .hub_cache import as_hub_cache

ROOT = Path(__file__).parent.parent.parent
OLDEST_TRANSFORMERS = "5.16.1"
REPOSITORY = "org/name"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

PREAMBLE = """
import importlib.util, json, sys
for name in ("videollama3", "torchvision", "accelerate", "decord", "cv2", "torchcodec"):
    assert importlib.util.find_spec(name) is None, name
import torch, transformers
torch.set_num_threads(1)
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor,
                          AutoTokenizer)
# Not from the top level, where older transformers has dummies without torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

def load(auto, name, **options):
    loaded, *info = [auto.from_pretrained(source, trust_remote_code=True, **options)]
    if isinstance(loaded, tuple):
        loaded, *info = loaded
        assert not any(info[0].values()), info
    assert type(loaded).__name__ == name, (auto, type(loaded))
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded).__module__
    return loaded
"""

WHOLE_MODEL = (
    PREAMBLE
    + """
source, clip, again = sys.argv[1:]
report = {"output_loading_info": True}
config = load(AutoConfig, "VideoLlama3Config")
assert config.model_type == "videollama3"
assert type(config.vision_config).__name__ == "VideoLlama3VisionConfig"
load(AutoModel, "VideoLlama3Model", **report)
load(AutoImageProcessor, "VideoLlama3ImageProcessor")
load(AutoVideoProcessor, "VideoLlama3VideoProcessor")
assert AutoTokenizer.from_pretrained(source).convert_tokens_to_ids("<|im_end|>") > 0
processor = load(AutoProcessor, "VideoLlama3Processor")
content = [{"type": "video", "path": clip}, {"type": "text", "text": "What?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                       tokenize=True, return_dict=True, return_tensors="pt")
answers = []
for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
    model = load(auto, "VideoLlama3ForCausalLM", **report).eval()
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    answers.append(new.tolist())
if again != "-":
    model.save_pretrained(again)
    processor.save_pretrained(again)
print("ANSWER", json.dumps({"version": transformers.__version__, "answers": answers}))
"""
)

ENCODER = (
    PREAMBLE
    + """
from PIL import Image
from safetensors.torch import save_file
source, picture, features, again = sys.argv[1:]
config = load(AutoConfig, "VideoLlama3VisionConfig")
assert config.model_type == "videollama3_vision"
model = load(AutoModel, "VideoLlama3VisionModel", output_loading_info=True).eval()
processor = load(AutoImageProcessor, "VideoLlama3ImageProcessor")
with torch.no_grad():
    inputs = processor(images=Image.open(picture), merge_size=2, return_tensors="pt")
    save_file({"features": model(**inputs).last_hidden_state.contiguous()}, features)
if again != "-":
    model.save_pretrained(again)
    processor.save_pretrained(again)
print("ANSWER", json.dumps({"version": transformers.__version__}))
"""
)


def run(*command, **options):
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=1200,
        check=False,
        **options,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(params=sorted({OLDEST_TRANSFORMERS, transformers.__version__}))
def environment(request, tmp_path):
    """The interpreter of a new virtual environment, and its transformers; a gigabyte each, removed afterwards."""
    folder = tmp_path / "environment"
    run(sys.executable, "-m", "venv", folder)
    packages = ("torch", "safetensors", "huggingface_hub", "tokenizers", "av", "pillow")
    pip = (folder / "bin" / "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")
    run(*pip, f"transformers=={request.param}", *packages)
    yield folder / "bin" / "python", request.param
    shutil.rmtree(folder)


def ask(environment, script, home, *arguments):
    """Runs a script in a fresh process: offline, away from the sources, with `home` for the Hub's and code caches."""
    interpreter, version = environment
    home.mkdir(exist_ok=True)
    hidden = ("PYTHON", "HF_", "TRANSFORMERS_", "VIRTUAL_ENV")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    variables.update(HF_HOME=str(home), HF_HUB_OFFLINE="1")
    printed = run(interpreter, "-I", "-c", script, *arguments, env=variables, cwd=home)
    answer = json.loads(printed.split("ANSWER", 1)[1])
    assert answer.pop("version") == version
    return answer


def save_whole_model(folder, clip):
    """Writes the folder of a whole model; returns the tokens with which this package answers."""
    model, processor = build_random()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    conversation = [{"role": "user", "content": [{"type": "video", "path": clip}, {"type": "text", "text": "What?"}]}]
    inputs = processor(conversation=conversation, add_generation_prompt=True, return_tensors="pt")
    assert int(inputs["video_grid_thw"][0, 0]) == 3
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return new.tolist()


# One test per environment, since parallel workers would each install their own.
def test_everything_that_is_saved_loads_without_the_package(environment, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 75, 25)
    folder = tmp_path / "saved"
    expected = save_whole_model(folder, clip)
    for check in (check_a_whole_model_in_a_folder, check_a_whole_model_in_the_hubs_cache):
        (tmp_path / check.__name__).mkdir()
        check(environment, folder, clip, {"answers": [expected, expected]}, tmp_path / check.__name__)
    check_the_encoder_alone(environment, folder, tmp_path)


def check_a_whole_model_in_a_folder(environment, folder, clip, expected, tmp_path):
    again = tmp_path / "again"
    assert ask(environment, WHOLE_MODEL, tmp_path / "one", folder, clip, again) == expected
    for path in folder.glob("*.py"):
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert ask(environment, WHOLE_MODEL, tmp_path / "two", again, clip, "-") == expected


def check_a_whole_model_in_the_hubs_cache(environment, folder, clip, expected, tmp_path):
    home, again = tmp_path / "home", tmp_path / "again"
    name = as_hub_cache(folder, home, REPOSITORY)
    for save_to in (again, "-"):
        # Twice: the second run finds the code already copied.
        assert ask(environment, WHOLE_MODEL, home, name, clip, save_to) == expected
    # What was loaded by its name on the Hub is whole again in the folder: nothing points back to the Hub.
    assert {path.name for path in folder.glob("*.py")} <= {path.name for path in again.iterdir()}
    for path in again.glob("*.json"):
        assert REPOSITORY not in path.read_text(), path.name
    assert ask(environment, WHOLE_MODEL, tmp_path / "empty", again, clip, "-") == expected


def check_the_encoder_alone(environment, whole, tmp_path):
    encoder = VideoLlama3VisionModel.from_pretrained(whole).eval()
    processor = VideoLlama3ImageProcessor.from_pretrained(whole)
    folder = tmp_path / "encoder"
    encoder.save_pretrained(folder)
    processor.save_pretrained(folder)
    picture = tmp_path / "picture.png"
    Image.fromarray(numbered_picture(5, 98, 210)).save(picture)
    with torch.no_grad():
        expected = encoder(**processor(images=str(picture), merge_size=2)).last_hidden_state
    assert expected.shape[0] > 16
    home, again = tmp_path / "home", tmp_path / "encoder again"
    name = as_hub_cache(folder, home, REPOSITORY)
    for source, save_to in ((folder, again), (again, "-"), (name, "-")):
        ask(environment, ENCODER, home, source, picture, tmp_path / "features", save_to)
        features = load_file(tmp_path / "features")["features"]
        # Measured 0: the same sums by the same torch. A layer left out moves features by 0.3.
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
