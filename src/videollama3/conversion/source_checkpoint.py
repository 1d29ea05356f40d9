"""The source of a conversion: where it is, what it is, and whether it is complete.

A folder or Hub id of any layout enters, a record with its configuration and stored tensors under our names leaves.
Writing the target is left to `convert.py`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ..modeling import checkpoint_layouts as layouts
from ..modeling.checkpoint_checks import check_layer_counts, expected_shapes
from ..modeling.checkpoint_files import StoredTensor, file_inside, shorten, stored_tensors
from ..modeling.configuration_videollama3 import VideoLlama3Config, VideoLlama3VisionConfig
from ..modeling.modeling_videollama3 import VideoLlama3ForCausalLM
from ..modeling.vision_encoder_videollama3 import VideoLlama3VisionModel
from .adapter import Adapter
from .weights import stored_chunks

Layout = Literal["plugin", "official", "native"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"

# model_type -> layout, and whether it is a whole model rather than the encoder alone.
_MODEL_TYPES: dict[str, tuple[Layout, bool]] = {
    layouts.PLUGIN_MODEL_TYPE: ("plugin", True),
    layouts.OFFICIAL_MODEL_TYPE: ("official", True),
    layouts.NATIVE_MODEL_TYPE: ("native", True),
    layouts.PLUGIN_VISION_MODEL_TYPE: ("plugin", False),
    layouts.OFFICIAL_VISION_MODEL_TYPE: ("official", False),
    layouts.NATIVE_VISION_MODEL_TYPE: ("native", False),
}
# Files of a Hub repository that a conversion reads; no code.
_PATTERNS = ["*.json", "*.txt", "*.jinja"]
_READ_SUFFIXES = (".json", ".txt", ".jinja")


@dataclass(frozen=True)
class Checkpoint:
    """A source, read as far as its headers.

    Attributes:
        folder: where it is.
        layout: of its configuration.
        whole: whether it is a whole model, not the encoder alone.
        config: translated into our layout.
        tensors: by our names.
        training_names: whether they had the names of the authors' training code.
    """

    folder: str
    layout: Layout
    whole: bool
    config: Any
    tensors: dict[str, StoredTensor]
    training_names: bool

    @property
    def model_class(self) -> Any:
        """Our class for it."""
        return VideoLlama3ForCausalLM if self.whole else VideoLlama3VisionModel

    @property
    def prefixes(self) -> tuple[layouts.KeyPrefix, ...]:
        """The rows of the key table that its names follow."""
        return layouts.KEY_PREFIXES if self.whole else layouts.ENCODER_KEY_PREFIXES


def local_folder(name: str) -> str:
    """A folder as it is, or the snapshot of a Hub repository without its code.

    Raises:
        FileNotFoundError: for a path that is not there.
    """
    if os.path.isdir(name):
        return name
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"Expected a checkpoint folder or a Hub id such as owner/name, got {name!r}.")
    from huggingface_hub import snapshot_download

    folder = snapshot_download(name, allow_patterns=[*_PATTERNS, "*.safetensors"])
    if not any(file.endswith(".safetensors") for file in os.listdir(folder)):
        folder = snapshot_download(name, allow_patterns=[*_PATTERNS, "pytorch_model*.bin", "adapter_model.bin"])
    return folder


def read_checkpoint(folder: str) -> Checkpoint:
    """Reads configuration and headers of a folder of any layout.

    Raises:
        ValueError: for another kind of model, files that leave the folder, damaged files.
        FileNotFoundError: where configuration or weights are absent.
    """
    # What is copied or parsed later, checked once.
    for name in sorted(os.listdir(folder)):
        if name.endswith(_READ_SUFFIXES) and not os.path.isdir(os.path.join(folder, name)):
            file_inside(folder, name)
    with open(file_inside(folder, "config.json"), encoding="utf-8") as file:
        model_type = json.load(file).get("model_type")
    if model_type not in _MODEL_TYPES:
        raise ValueError(f"Expected a model_type of {', '.join(_MODEL_TYPES)} in {folder!r}, got {model_type!r}.")
    layout, whole = _MODEL_TYPES[model_type]
    config = (VideoLlama3Config if whole else VideoLlama3VisionConfig).from_pretrained(folder)
    stored = stored_tensors(folder)
    prefixes = layouts.KEY_PREFIXES if whole else layouts.ENCODER_KEY_PREFIXES
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        plugin_name = layouts.to_plugin_name(name, prefixes=prefixes)
        if plugin_name in tensors:
            raise ValueError(
                f"Expected each weight once in {folder!r}, got {plugin_name!r} as {tensors[plugin_name].name!r} and "
                f"{name!r}."
            )
        tensors[plugin_name] = tensor
    training = tuple(row.training for row in prefixes if row.training)
    return Checkpoint(folder, layout, whole, config, tensors, any(name.startswith(training) for name in stored))


def check_complete(checkpoint: Checkpoint, adapter: Adapter | None, extra: set[str]) -> None:
    """Checks that every stored tensor has a place and every place a tensor of its shape.

    Args:
        checkpoint: the source.
        adapter: what is merged into it.
        extra: our names of weights that only the adapter has.

    Raises:
        ValueError: once, listing what is missing, what has no place and what has another shape.
    """
    check_layer_counts(checkpoint.config, (tensor.name for tensor in checkpoint.tensors.values()), checkpoint.folder)
    expected = expected_shapes(checkpoint.model_class, checkpoint.config)
    here = {*checkpoint.tensors, *extra}
    missing = sorted(expected.keys() - here)
    if HEAD in missing and checkpoint.config.tie_word_embeddings:
        missing.remove(HEAD)
    unexpected = sorted(tensor.name for name, tensor in checkpoint.tensors.items() if name not in expected)
    shapes = dict(checkpoint.tensors)
    if adapter is not None:
        unexpected += sorted(adapter.names - expected.keys())
        shapes.update(adapter.replacements)
    mismatched = [
        f"{tensor.name} {list(expected[name])}, got {list(tensor.shape)}"
        for name, tensor in shapes.items()
        if name in expected and tensor.shape != tuple(expected[name])
    ]
    problems = [
        f"{len(names)} {what}: {shorten(names, most=100)}"
        for what, names in (
            ("missing", missing),
            ("without a place", unexpected),
            ("of another shape", mismatched),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"Expected exactly the weights that config.json describes in {checkpoint.folder!r}; {'; '.join(problems)}."
        )


def settle_head(checkpoint: Checkpoint, adapter: Adapter | None) -> str:
    """Makes the configuration say what the stored weights say about the head; returns it for the report.

    Raises:
        ValueError: where an adapter changes the embedding of a tied head, but not the head.
    """
    if not checkpoint.whole:
        return "none"
    config = checkpoint.config
    changed = adapter.names if adapter is not None else set()
    if not config.tie_word_embeddings:
        return "own"
    if HEAD not in checkpoint.tensors and HEAD not in changed:
        if EMBEDDING in changed:
            raise ValueError(
                "Expected an adapter that leaves a tied token embedding alone, or stores lm_head beside it, got one "
                "that changes the embedding only: merge it with peft, which knows what was trained."
            )
        return "tied"
    stored = checkpoint.tensors.get(HEAD)
    if not changed & {HEAD, EMBEDDING} and stored is not None and _equal(stored, checkpoint.tensors[EMBEDDING]):
        return "tied, stored twice"
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    return "own"


def _equal(first: StoredTensor, second: StoredTensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    pairs = zip(stored_chunks(first), stored_chunks(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
