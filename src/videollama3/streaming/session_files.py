"""A session on disk: one JSON file, one safetensors file, nothing that could run code.

A record and tensors enter and leave, with a fingerprint of the model they belong to. What they mean is left to
`saved_session.py`.

    folder/session.json            names the tensor file; replaced last, in one step
    folder/session-1f0c....safetensors
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..whole_files import write_whole
from .placement import with_weights

_FORMAT = 1
_RECORD = "session.json"
_MAX_SECONDS_TO_SAVE = 3600.0
# Of a session that is saved again and again meanwhile.
_MAX_READS = 100
# Of so many weights, and of each so many values: enough to tell a checkpoint from its next training step.
_SAMPLED_WEIGHTS, _SAMPLED_VALUES = 24, 64
# Parts of a configuration that say nothing about what the model computes.
_INCIDENTAL = {"transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "attn_implementation"}


def write_session(
    folder: str | os.PathLike[str], record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Writes a session; one that is there already stays whole until this one is.

    Args:
        folder: made where there is none.
        record: what JSON can hold.
        tensors: by name.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    before = _named_by(place / _RECORD)
    name = f"session-{uuid.uuid4().hex}.safetensors"
    # A copy each: parts of one cache may share memory, and cropped ones are no whole blocks.
    save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, place / name)
    write_whole(place / _RECORD, json.dumps({"format": _FORMAT, "tensors": name, **record}))
    # Others that are young may be of somebody who saves at this moment; old ones are of a killed process.
    oldest = time.time() - _MAX_SECONDS_TO_SAVE
    for other in place.glob("session-*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            if other.name == before or (other.name != name and other.stat().st_mtime < oldest):
                other.unlink()


def _named_by(path: Path) -> str | None:
    """The tensor file of a record; None where there is no record, or none that can be read."""
    try:
        return _tensor_file(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tensor_file(record: Mapping[str, Any]) -> str:
    # The name only: a record must not lead to files elsewhere.
    return Path(str(record["tensors"])).name


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record.get("format") != _FORMAT:
        raise ValueError(f"it has format {record.get('format')}, this version reads {_FORMAT}")
    return record, load_file(path.with_name(_tensor_file(record)))


def read_session(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Reads what `write_session` wrote, tensors on the CPU.

    Raises:
        FileNotFoundError: where there is no session.
        ValueError: for files that are damaged or of another format.
    """
    place = Path(folder)
    path = place / _RECORD
    if not path.is_file():
        raise FileNotFoundError(f"Expected a folder with a saved session, got {str(place)!r} without {_RECORD}.")
    try:
        for _ in range(_MAX_READS):
            before = _named_by(path)
            try:
                return _read(path)
            except FileNotFoundError:
                # Saved anew between the record and its tensors?
                if _named_by(path) == before:
                    raise
        return _read(path)
    except (ValueError, KeyError, AttributeError, OSError, SafetensorError) as error:
        raise ValueError(
            f"Expected a whole session in {str(place)!r}, got one that cannot be read: {error}."
        ) from error


def fingerprint(model: Any, processor: Any) -> dict[str, str]:
    """What must be the same for a saved cache to be of use.

    Args:
        model: a `VideoLlama3ForCausalLM`.
        processor: its processor.

    Returns:
        Hashes and texts by the name that an error gives them.
    """
    names = sorted(name for name, _ in model.named_parameters())
    digest = hashlib.sha256()
    for name in names[:: max(1, len(names) // _SAMPLED_WEIGHTS)]:
        with with_weights(model.get_submodule(name.rpartition(".")[0])):
            values = model.get_parameter(name).detach().flatten()
            step = max(1, len(values) // _SAMPLED_VALUES)
            digest.update(name.encode() + values[::step].float().cpu().numpy().tobytes())
    tokenizer = processor.tokenizer
    settings = dataclasses.asdict(processor.video_processor.settings())
    return {
        "model's configuration": _hash(_essentials(model.config.to_dict())),
        "model's dtype": str(model.get_input_embeddings().weight.dtype),
        "model's weights": digest.hexdigest(),
        "tokenizer": _hash(sorted(tokenizer.get_vocab().items())),
        "video processor's settings": _hash(settings),
    }


def check_same_model(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises ValueError where a session was saved with another model or processor."""
    different = [name for name, value in now.items() if saved.get(name) != value]
    if different:
        raise ValueError(
            f"Expected the model and the processor that the session was saved with, got others: the "
            f"{', the '.join(different)} differ{'s' if len(different) == 1 else ''}."
        )


def _essentials(config: Any) -> Any:
    if isinstance(config, dict):
        return {
            key: _essentials(value)
            for key, value in config.items()
            if key not in _INCIDENTAL and not str(key).startswith("_")
        }
    return config


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
