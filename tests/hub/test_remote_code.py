"""`save_pretrained` writes folders that load with `trust_remote_code=True` where the package is not installed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import videollama3
from tests.media import write_clip
from videollama3.random_checkpoint import build_random

SOURCE = Path(videollama3.__file__).parent
ROOMS = ("modeling", "processing")
CORE = {"transformers", "torch", "safetensors", "huggingface_hub", "tokenizers", "av", "PIL", "numpy"}


def room_files():
    return [path for room in ROOMS for path in sorted((SOURCE / room).glob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("path", room_files(), ids=lambda path: path.name)
def test_import_rules_of_the_hub_rooms(path):
    siblings = {other.stem for other in path.parent.glob("*.py")}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{path.name}: `from ..` cannot be resolved on the Hub"
            assert node.module in siblings, f"{path.name}: `from . import` or a module of another folder"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                top = name.split(".")[0]
                assert top in CORE or top in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_names_are_unique_over_both_rooms():
    names = [path.name for path in room_files()]
    assert len(names) == len(set(names))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model, processor = build_random()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_saved_code_is_the_source_byte_for_byte(saved):
    written = {path.name for path in saved.glob("*.py")}
    source = {path.name: path for path in room_files()}
    assert written <= set(source)
    for name in written:
        assert (saved / name).read_bytes() == source[name].read_bytes(), name
    # Every module that a written file imports is written too.
    for name in written:
        for node in ast.walk(ast.parse((saved / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                assert f"{node.module}.py" in written, (name, node.module)


def test_every_auto_class_is_named(saved):
    auto_map = json.loads((saved / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_videollama3.VideoLlama3Config",
        "AutoModel": "modeling_videollama3.VideoLlama3Model",
        "AutoModelForCausalLM": "modeling_videollama3.VideoLlama3ForCausalLM",
        "AutoModelForImageTextToText": "modeling_videollama3.VideoLlama3ForCausalLM",
        "AutoModelForMultimodalLM": "modeling_videollama3.VideoLlama3ForCausalLM",
    }


def test_a_processor_that_came_through_its_auto_class_is_saved_for_the_same_one(monkeypatch):
    for cls, auto in (
        (videollama3.VideoLlama3ImageProcessor, "AutoImageProcessor"),
        (videollama3.VideoLlama3VideoProcessor, "AutoVideoProcessor"),
        (videollama3.VideoLlama3Processor, "AutoProcessor"),
    ):
        monkeypatch.setattr(cls, "_auto_class", None)
        cls.register_for_auto_class()  # what the Auto class does after loading code from a folder
        assert cls._auto_class == auto


SCRIPT = """
import sys
sys.modules["videollama3"] = None  # as if it were not installed
folder, clip, again = sys.argv[1:]
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor,
                          AutoTokenizer)
remote = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **remote)
assert config.model_type == "videollama3" and type(config).__module__.startswith("transformers_modules"), config
processor = AutoProcessor.from_pretrained(folder, **remote)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
assert type(AutoImageProcessor.from_pretrained(folder, **remote)).__name__ == "VideoLlama3ImageProcessor"
assert type(AutoVideoProcessor.from_pretrained(folder, **remote)).__name__ == "VideoLlama3VideoProcessor"
assert type(AutoModel.from_pretrained(folder, **remote)).__name__ == "VideoLlama3Model"
AutoModelForImageTextToText.from_pretrained(folder, **remote)
model = AutoModelForCausalLM.from_pretrained(folder, **remote)
content = [{"type": "video", "path": clip}, {"type": "text", "text": "What?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                       tokenize=True, return_dict=True, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1]:].tolist()
if again != "-":
    model.save_pretrained(again)
    processor.save_pretrained(again)
print("ANSWER", ids)
"""


def answer(folder, clip, cache, again="-"):
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(clip), str(again)],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.split("ANSWER", 1)[1])


def test_loads_and_answers_without_the_package_and_again_after_saving(saved, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 75, 25)
    model, processor = build_random()
    conversation = [{"role": "user", "content": [{"type": "video", "path": clip}, {"type": "text", "text": "What?"}]}]
    inputs = processor(conversation=conversation, add_generation_prompt=True, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    again = tmp_path / "again"
    assert answer(saved, clip, tmp_path / "cache", again) == expected
    assert answer(again, clip, tmp_path / "cache2") == expected
