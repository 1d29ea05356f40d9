"""Shared fixtures: golden numbers of the authors' code, and generated media."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from safetensors.torch import load_file

import videollama3

GOLDEN = Path(__file__).parent / "golden"

# Tiny models run fastest on one thread, and the suite runs in parallel processes.
torch.set_num_threads(1)


class GoldenCase:
    """One request run through the authors' code: see golden/README.md."""

    def __init__(self, name):
        self.name = name
        self.record = json.loads((GOLDEN / "cases" / f"{name}.json").read_text())
        self.tensors = load_file(GOLDEN / "cases" / f"{name}.safetensors")

    @property
    def conversation(self):
        """The conversation with absolute media paths."""
        return _absolute(self.record["conversation"])

    def call_arguments(self):
        return {key: self.record[key] for key in ("add_system_prompt", "add_generation_prompt")}


def _absolute(value):
    if isinstance(value, dict):
        return {
            key: str(GOLDEN / item) if key in ("video_path", "image_path") else _absolute(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    return value


GOLDEN_CASES = sorted(path.stem for path in (GOLDEN / "cases").glob("*.json"))


@pytest.fixture(scope="session")
def golden_folder():
    return GOLDEN


@pytest.fixture(scope="session")
def processor():
    """The processor of the golden checkpoint (official layout, tiny tokenizer)."""
    return videollama3.VideoLlama3Processor.from_pretrained(GOLDEN / "ckpt")


@pytest.fixture(scope="session")
def model():
    """The golden checkpoint in float32; do not modify."""
    return videollama3.VideoLlama3ForCausalLM.from_pretrained(GOLDEN / "ckpt", dtype="float32").eval()
