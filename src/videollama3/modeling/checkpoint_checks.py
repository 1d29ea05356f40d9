"""Checks of a checkpoint against the model that is to be filled from it, before and after loading.

A folder or Hub id and a configuration enter; nothing leaves but an error that lists what is wrong. Reading
headers is left to `checkpoint_files.py`, loading to transformers.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.utils import cached_file

from .checkpoint_files import (
    SAFETENSORS_FILES,
    TORCH_FILES,
    StoredTensor,
    file_inside,
    find_weight_file,
    shard_names,
    shorten,
    stored_tensors,
)

# Arguments of `from_pretrained` that say where a checkpoint's files are.
DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Arguments whose weights are not the files looked at here.
_OTHER_SOURCES = ("state_dict", "gguf_file", "variant")


def check_before_loading(model_class: Any, name_or_path: Any, options: Mapping[str, Any]) -> None:
    """Refuses a checkpoint whose files are damaged, leave their folder, or do not justify the model's sizes.

    Args:
        model_class: the class to be filled.
        name_or_path: folder or Hub id, as given to `from_pretrained`.
        options: the other arguments of `from_pretrained`.

    Raises:
        FileNotFoundError: where files that an index names are absent.
        ValueError: for everything else; the message names files, tensors and shapes.
    """
    if options.get("weights_only") is False:
        raise ValueError(
            "Expected weights_only=True, got False: torch files would run code of whoever wrote them. Convert the "
            "file to safetensors where you trust it."
        )
    if name_or_path is None or any(options.get(name) is not None for name in _OTHER_SOURCES):
        return
    folder = weights_folder(str(name_or_path), options)
    if folder is None:
        return
    stored = stored_tensors(folder, use_safetensors=options.get("use_safetensors"))
    config = _configuration(model_class, name_or_path, options)
    # Quantised weights are packed into other shapes, which only their library knows.
    if getattr(config, "quantization_config", None) is None and options.get("quantization_config") is None:
        key_mapping = options.get("key_mapping")
        key_mapping = model_class._official_key_mapping if key_mapping is None else key_mapping
        names = [rename(name, key_mapping) for name in stored]
        ignore = bool(options.get("ignore_mismatched_sizes"))
        check_sizes(model_class, config, stored, names, folder, ignore_mismatched_sizes=ignore)


def weights_folder(name_or_path: str, options: Mapping[str, Any]) -> str | None:
    """The local folder with the weight files, downloaded where needed; None where transformers must look itself."""
    if os.path.isdir(name_or_path):
        folder = os.path.join(name_or_path, options.get("subfolder") or "")
        if os.path.lexists(os.path.join(folder, "config.json")):
            file_inside(folder, "config.json")
        if find_weight_file(folder, use_safetensors=options.get("use_safetensors")) is None:
            return _folder_of_base(folder, options)
        return folder
    download = {name: options[name] for name in DOWNLOAD_OPTIONS if options.get(name) is not None}
    for name in (*SAFETENSORS_FILES, *TORCH_FILES):
        if options.get("use_safetensors") in (None, name in SAFETENSORS_FILES):
            path = _cached(name_or_path, name, download)
            if path is not None:
                folder = os.path.dirname(path)
                for shard in sorted(set(shard_names(folder, name).values())) if name.endswith(".json") else ():
                    # The name is checked before it becomes part of an address.
                    if os.path.basename(shard) == shard:
                        _cached(name_or_path, shard, download)
                return folder
    return None


def _folder_of_base(folder: str, options: Mapping[str, Any]) -> str | None:
    """An adapter's folder has no weights of its own: transformers loads those of its base."""
    base = _base_of(folder)
    return None if base is None else weights_folder(base, {"use_safetensors": options.get("use_safetensors")})


def _base_of(folder: str) -> str | None:
    """What an adapter was trained on, by its own word; None for anything but an adapter."""
    if not os.path.isfile(os.path.join(folder, "adapter_config.json")):
        return None
    with open(file_inside(folder, "adapter_config.json"), encoding="utf-8") as file:
        base = json.load(file).get("base_model_name_or_path")
    return str(base) if base and os.path.realpath(str(base)) != os.path.realpath(folder) else None


def _cached(name_or_path: str, filename: str, download: dict[str, Any]) -> str | None:
    path: str | None = cached_file(
        name_or_path,
        filename,
        **download,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return path


def _configuration(model_class: Any, name_or_path: Any, options: Mapping[str, Any]) -> Any:
    config = options.get("config")
    if config is not None and not isinstance(config, (str, os.PathLike)):
        return copy.deepcopy(config)
    folder = os.path.join(str(name_or_path), options.get("subfolder") or "")
    if config is None and not os.path.lexists(os.path.join(folder, "config.json")):
        base = _base_of(folder)
        if base is not None:
            return model_class.config_class.from_pretrained(base)
    download = {name: options[name] for name in DOWNLOAD_OPTIONS if options.get(name) is not None}
    return model_class.config_class.from_pretrained(config or name_or_path, **download)


def check_sizes(
    model_class: Any,
    config: Any,
    stored: dict[str, StoredTensor],
    names: list[str],
    folder: str,
    *,
    ignore_mismatched_sizes: bool = False,
) -> None:
    """Refuses a configuration whose sizes the stored tensors do not justify, before a model is allocated.

    Args:
        model_class: the class to be filled.
        config: its configuration.
        stored: what the files hold.
        names: those of `stored`, renamed to the model's.
        folder: for the message.
        ignore_mismatched_sizes: whether other shapes are let pass, as in `from_pretrained`.

    Raises:
        ValueError: listing layers or shapes that differ, or saying how much is missing.
    """
    check_layer_counts(config, names, folder)
    shapes = {name: tensor.shape for name, tensor in zip(names, stored.values(), strict=True)}
    found, missing, mismatched = 0, 0, []
    for name, expected in expected_shapes(model_class, config).items():
        got = next((shapes[other] for other in _spellings(name) if other in shapes), None)
        if got is None:
            missing += expected.numel()
        else:
            found += expected.numel()
            if got != tuple(expected):
                mismatched.append(f"{name} {list(expected)}, got {list(got)}")
    if mismatched and not ignore_mismatched_sizes:
        raise ValueError(
            f"Expected weights of the shapes that config.json asks for in {folder!r}, {len(mismatched)} differ: "
            f"{shorten(mismatched)}. Weights and configuration are not of one model."
        )
    # A lost bias is reported after loading; what would be mostly fresh weights is no checkpoint of this model.
    if missing > found:
        raise ValueError(
            f"Expected the weights of a {model_class.__name__} in {folder!r}: config.json asks for {missing + found} "
            f"values, the files justify {found}. Its first tensors are {shorten(names, most=3)}."
        )


def rename(name: str, key_mapping: Mapping[str, str]) -> str:
    """A stored name after the first rule of a key mapping that fits it."""
    for pattern, replacement in key_mapping.items():
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def _spellings(name: str) -> tuple[str, str, str]:
    """Names under which transformers also finds a weight: with and without the base model's prefix."""
    return name, f"model.{name}", name.removeprefix("model.")


def expected_shapes(model_class: Any, config: Any) -> dict[str, torch.Size]:
    """Names and shapes of all weights of a model, built without allocating any."""
    with torch.device("meta"):
        model: nn.Module = model_class(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def check_layer_counts(config: Any, names: Iterable[str], folder: str) -> None:
    """Refuses a configuration with more layers than the stored names have, before a model is built from it.

    Args:
        config: of a whole model, of the encoder alone or of a Qwen2 alone.
        names: stored names, of any layout.
        folder: for the message.

    Raises:
        ValueError: with both counts.
    """
    layers: dict[str, set[str]] = {"vision encoder": set(), "language model": set()}
    for name in names:
        found = re.search(r"(?:^|\.)(encoder\.)?layers\.(\d+)\.", name)
        if found:
            layers["vision encoder" if found[1] else "language model"].add(found[2])
    if hasattr(config, "text_config"):
        asked = {"vision encoder": config.vision_config, "language model": config.text_config}
    else:
        asked = {"language model" if config.model_type == "qwen2" else "vision encoder": config}
    for part, sub_config in asked.items():
        if sub_config.num_hidden_layers > len(layers[part]):
            raise ValueError(
                f"Expected weights of {sub_config.num_hidden_layers} layers of the {part} in {folder!r}, as "
                f"config.json says, found {len(layers[part])}."
            )


def check_finite(model: nn.Module, where: str) -> None:
    """Refuses a model with weights that are not a number.

    Raises:
        ValueError: naming the first such weights.
    """
    sums: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for name, weight in model.state_dict().items():
        for tensor in _plain_parts(weight):
            # The narrow floats of quantised weights know no sum.
            if tensor.is_floating_point() and tensor.itemsize >= 2 and tensor.device.type != "meta":
                sums.setdefault(tensor.device, []).append((name, tensor))
    suspects = []
    for tensors in sums.values():
        # A sum is the fastest pass that keeps NaN (0.1 s per GB); one transfer per device tells all.
        flags = torch.stack([tensor.sum().isnan() for _, tensor in tensors]).tolist()
        suspects += [pair for pair, flag in zip(tensors, flags, strict=True) if flag]
    broken = [name for name, tensor in suspects if bool(tensor.isnan().any())]
    if broken:
        raise ValueError(
            f"Expected weights that are numbers in {where!r}, got NaN in {len(broken)}: {shorten(broken, most=5)}. "
            "The checkpoint is damaged or its training diverged."
        )


def _plain_parts(weight: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a weight is made of on this process.

    Of one spread over processes that is a part of it, of one quantised by torchao integers and scales; a scale is
    NaN where a weight was.
    """
    tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain_parts(getattr(tensor, name))]
