"""A LoRA adapter merged into its base, one weight at a time.

A folder in peft's format and the base's stored tensors enter, streams of the merged weights leave. Training
adapters is left to `training/`; whatever is not plain LoRA is refused by name.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..modeling.checkpoint_files import StoredTensor, file_inside, read_header, shorten
from .weights import TensorStream, cast, read_whole, stored_stream

ADAPTER_CONFIG = "adapter_config.json"
# The recipe's settings, in the folder of an adapter that `videollama3 train` made.
RUN_SETTINGS_NAME = "run_settings.json"
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
# Settings of peft that change what an adapter means, with the values under which it is plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
}
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.weight)?$")


@dataclass
class LowRank:
    """Factors of one weight's change: weight + scale * (B @ A), transposed for an embedding."""

    embedding: bool
    scale: float
    factors: dict[str, StoredTensor] = field(default_factory=dict)


@dataclass
class Adapter:
    """What an adapter does to a model with our parameter names.

    Attributes:
        folder: where it is.
        base: folder or Hub id of its base, as it says itself.
        changes: low-rank changes by the weight's name.
        replacements: whole weights (`modules_to_save`, trained biases) by name.
    """

    folder: str
    base: str
    changes: dict[str, LowRank]
    replacements: dict[str, StoredTensor]

    @property
    def names(self) -> set[str]:
        """All weights that it touches."""
        return {*self.changes, *self.replacements}


def is_adapter(folder: str) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return os.path.lexists(os.path.join(folder, ADAPTER_CONFIG))


def processor_folder(base: str, adapter: Adapter | None) -> str:
    """Where the processor of a model with an adapter is: it may merge or prune otherwise than its base's.

    Args:
        base: folder of the weights that the adapter changes.
        adapter: None where there is none.
    """
    own = adapter is not None and os.path.lexists(os.path.join(adapter.folder, "processor_config.json"))
    return adapter.folder if adapter is not None and own else base


def read_adapter(folder: str) -> Adapter:
    """Reads an adapter's settings and the headers of its weights.

    Raises:
        ValueError: for anything but plain LoRA, and for weights that make no pair of factors.
        FileNotFoundError: where its weights are absent.
    """
    with open(file_inside(folder, ADAPTER_CONFIG), encoding="utf-8") as file:
        config = json.load(file)
    _check_plain(config, folder)
    changes: dict[str, LowRank] = {}
    replacements: dict[str, StoredTensor] = {}
    for stored in _adapter_tensors(folder).values():
        name = stored.name.removeprefix(_PREFIX)
        found = _FACTOR.match(name)
        if found:
            scale = _scale(config, found["module"], stored, found["factor"])
            change = changes.setdefault(f"{found['module']}.weight", LowRank(bool(found["embedding"]), scale))
            change.factors[found["factor"]] = stored
            change.scale = scale if found["factor"] == "A" else change.scale
        elif "lora_" in name:
            raise ValueError(f"Expected plain LoRA weights in {folder!r}, got {stored.name!r}: merge it with peft.")
        else:
            # An embedding or bias that peft saved whole, under the wrapper's name or its own.
            replacements[name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = stored
    alone = [name for name, change in changes.items() if len(change.factors) != 2]
    if alone:
        raise ValueError(f"Expected lora_A and lora_B of every weight in {folder!r}, one lacks for {shorten(alone)}.")
    return Adapter(folder, str(config.get("base_model_name_or_path") or ""), changes, replacements)


def _check_plain(config: dict[str, Any], folder: str) -> None:
    for name, allowed in _PLAIN.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"Expected a plain LoRA adapter in {folder!r}, got {name}={config[name]!r}: merge it with peft's "
                "merge_and_unload and convert the result."
            )


def _adapter_tensors(folder: str) -> dict[str, StoredTensor]:
    for name in _ADAPTER_FILES:
        if os.path.lexists(os.path.join(folder, name)):
            return read_header(file_inside(folder, name))
    raise FileNotFoundError(f"Expected {' or '.join(_ADAPTER_FILES)} in {folder!r}, found neither.")


def _scale(config: dict[str, Any], module: str, stored: StoredTensor, factor: str) -> float:
    """`lora_alpha` over the rank, or over its root; both may be set per module by pattern."""
    if len(stored.shape) != 2:
        raise ValueError(f"Expected LoRA factors of linear layers, got {stored.name!r} of shape {list(stored.shape)}.")
    rank = stored.shape[0 if factor == "A" else 1]
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def merged_stream(
    adapter: Adapter, plugin_name: str, stored: StoredTensor, name: str, dtype: torch.dtype | None
) -> TensorStream:
    """The stream of one weight after merging.

    Args:
        adapter: the adapter.
        plugin_name: our name of the weight.
        stored: the base's tensor.
        name: in the file to be written.
        dtype: of the result; the base's by default.

    Returns:
        The merged weight, computed in float32 when its chunks are asked for.
    """
    wanted = dtype or stored.dtype
    base = adapter.replacements.get(plugin_name, stored)
    change = adapter.changes.get(plugin_name)
    if change is None:
        return stored_stream(base, name, wanted)
    low_rank = change

    def chunks() -> Iterator[torch.Tensor]:
        yield cast(_merge(base, low_rank), wanted, plugin_name)

    return TensorStream(name, wanted, base.shape, chunks)


def _merge(stored: StoredTensor, change: LowRank) -> torch.Tensor:
    weight = read_whole(stored).float()
    first, second = (read_whole(change.factors[factor]).float() for factor in "AB")
    if change.embedding:
        first, second = second.T, first.T
    if (second.shape[0], first.shape[1]) != tuple(weight.shape) or second.shape[1] != first.shape[0]:
        raise ValueError(
            f"Expected LoRA factors for {stored.name!r} of shape {list(stored.shape)}, got A "
            f"{list(change.factors['A'].shape)} and B {list(change.factors['B'].shape)}: the adapter belongs to "
            "another base."
        )
    return weight.addmm_(second, first, alpha=change.scale)
