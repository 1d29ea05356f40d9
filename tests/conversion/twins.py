"""Tiny checkpoints in every layout, and how two folders are compared."""

import json
import shutil

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def stored(folder):
    """Name -> dtype, shape and bytes of every tensor in a folder's safetensors files, read by the library."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                tensor = file.get_tensor(name)
                assert name not in found
                content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                found[name] = (tensor.dtype, tuple(tensor.shape), content)
    return found


def read_json(path):
    return json.loads(path.read_text())


def official(golden_folder, folder, change=lambda weights: weights, **config):
    """A copy of the golden checkpoint with changed weights and configuration."""
    shutil.copytree(golden_folder / "ckpt", folder)
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**read_json(path), **config}))
    return folder


def without_head(weights):
    return {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}


def with_equal_head(weights):
    return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}


def doubled(weights):
    """Names of the authors' training code."""
    return {
        name.replace("model.vision_encoder.", "model.vision_encoder.vision_encoder."): t for name, t in weights.items()
    }
