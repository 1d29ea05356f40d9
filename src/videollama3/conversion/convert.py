"""Checkpoints from one layout to another.

A folder or Hub id of any layout enters (or an adapter and its base), a folder of the layout asked for leaves:
weights, configuration, tokenizer, processor, templates. Each of these is left to a file of its own beside this one.

    source -> stored tensors -> our names -> target's names -> shards   (source_checkpoint, weights)
           -> configuration  -> ours      -> target's                   (checkpoint_layouts)
           -> processor      -> ours      -> target's                   (processor_files, tokenizer_files)
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

from ..modeling import checkpoint_layouts as layouts
from .adapter import RUN_SETTINGS_NAME, Adapter, is_adapter, merged_stream, processor_folder, read_adapter
from .partial_folder import partial_folder
from .processor_files import load_processor, placeholder_index, write_image_processor, write_processor
from .source_checkpoint import (
    EMBEDDING,
    HEAD,
    LAYOUTS,
    Checkpoint,
    Layout,
    check_complete,
    local_folder,
    read_checkpoint,
    settle_head,
)
from .weights import Progress, TensorStream, parse_size, stored_stream, write_json, write_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Said even where they are transformers' defaults.
_SAID_ALWAYS = ("tie_word_embeddings", "transformers_version")
# Of classifiers.
_LABELS = ("id2label", "label2id")


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        destination: the folder written.
        source_layout: "plugin", "official" or "native".
        layout: of the result.
        num_tensors: tensors written.
        num_bytes: of the tensors.
        num_shards: weight files.
        head: "own" (a weight of its own), "tied" (no weight stored), "tied, stored twice" (an equal copy is stored,
            as in the source) or "none" (an encoder alone).
        merged: weights that an adapter changed.
        remarks: what the user should know.
        largest_difference: of logits, after `verify`; None without it.
    """

    destination: str
    source_layout: Layout
    layout: Layout
    num_tensors: int
    num_bytes: int
    num_shards: int
    head: str
    merged: int = 0
    remarks: tuple[str, ...] = ()
    largest_difference: float | None = None


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: Layout,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    base: str | os.PathLike[str] | None = None,
    verify: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Converts a checkpoint into another layout.

    Args:
        source: a folder or Hub id in any layout: a whole model, a training checkpoint of the authors' code, the
            vision encoder alone, or a LoRA adapter of ours, which is merged into its base.
        destination: the folder to be made; it appears when all is written.
        to: "plugin" (this package), "official" (the authors') or "native" (the class inside transformers).
        dtype: "float32", "bfloat16" or "float16" for floating-point weights; by default they stay byte for byte.
        max_shard_size: largest weight file, such as "5GB", unless one tensor is larger.
        base: folder or Hub id of an adapter's base, instead of the one that it names.
        verify: load both sides afterwards and compare their logits on a generated picture and clip.
        overwrite: replace a destination that has files.
        progress: called with bytes written and bytes in all.

    Returns:
        What was done.

    Raises:
        ValueError: where a weight has no place or a place no weight (all are listed), for damaged files, an
            adapter that is not plain LoRA, and a failed verification.
        FileNotFoundError: where files are absent.
        FileExistsError: where the destination has files and `overwrite` is false.
    """
    if to not in LAYOUTS:
        raise ValueError(f"Expected to= one of {', '.join(LAYOUTS)}, got {to!r}.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"Expected dtype= one of {', '.join(DTYPES)}, got {dtype!r}.")
    max_shard_bytes = parse_size(max_shard_size)
    folder, adapter = _resolve(str(source), None if base is None else str(base))
    _check_apart(folder, str(destination))
    checkpoint = read_checkpoint(folder)
    extra = {HEAD} & adapter.names if adapter is not None else set()
    check_complete(checkpoint, adapter, extra)
    head = settle_head(checkpoint, adapter)
    remarks: list[str] = []
    with partial_folder(str(destination), overwrite=overwrite, say=remarks.append) as partial:
        streams = _streams(checkpoint, adapter, extra, to, None if dtype is None else DTYPES[dtype])
        shards = write_weights(partial, streams, max_shard_bytes=max_shard_bytes, progress=progress)
        remarks += _write_settings(checkpoint, partial, to, dtype, adapter)
        report = ConversionReport(
            destination=str(destination),
            source_layout=checkpoint.layout,
            layout=to,
            num_tensors=len(streams),
            num_bytes=sum(stream.num_bytes for stream in streams),
            num_shards=len(shards),
            head=head,
            merged=0 if adapter is None else len(adapter.names),
            remarks=tuple(_remarks(checkpoint) + remarks),
        )
        if verify:
            from .verification import compare_logits

            rounded = None if dtype is None else DTYPES[dtype]
            difference = compare_logits(folder, partial, to=to, whole=checkpoint.whole, dtype=rounded, adapter=adapter)
            report = dataclasses.replace(report, largest_difference=difference)
    return report


def _remarks(checkpoint: Checkpoint) -> list[str]:
    return ["names of the authors' training code"] if checkpoint.training_names else []


def _resolve(source: str, base: str | None) -> tuple[str, Adapter | None]:
    """The folder with the weights, and the adapter to be merged into them."""
    folder = local_folder(source)
    if not is_adapter(folder):
        if base is not None:
            raise ValueError(f"Expected --base only with an adapter, got a whole checkpoint: {source!r}.")
        return folder, None
    adapter = read_adapter(folder)
    _check_encoder(folder)
    if not (base or adapter.base):
        raise ValueError(f"Expected the base of the adapter {source!r}: it names none, pass --base.")
    return local_folder(base or adapter.base), adapter


def _check_encoder(folder: str) -> None:
    """An adapter trained on another encoder than its base's does not hold that one."""
    path = os.path.join(folder, RUN_SETTINGS_NAME)
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            encoder = json.load(file).get("model.vision_encoder")
        if encoder is not None:
            raise ValueError(
                f"Expected an adapter on its base as it is, got {folder!r}, which was trained with the vision encoder "
                f"{encoder!r} in it: convert the merged model, which its run wrote beside it."
            )


def _check_apart(folder: str, destination: str) -> None:
    real, target = os.path.realpath(folder), os.path.realpath(destination)
    if os.path.commonpath([real, target]) in (real, target):
        raise ValueError(
            f"Expected a destination apart from the source, got {destination!r} for {folder!r}: one lies in the other."
        )


def _streams(
    checkpoint: Checkpoint, adapter: Adapter | None, extra: set[str], to: Layout, dtype: torch.dtype | None
) -> list[TensorStream]:
    """What is to be written, in the order of the source's files."""

    def named(name: str) -> str:
        return layouts.to_official_name(name, prefixes=checkpoint.prefixes) if to == "official" else name

    streams = []
    for name in [*checkpoint.tensors, *sorted(extra - checkpoint.tensors.keys())]:
        # A head that only the adapter has was tied when it was trained.
        stored = checkpoint.tensors[name if name in checkpoint.tensors else EMBEDDING]
        if adapter is None:
            streams.append(stored_stream(stored, named(name), dtype))
        else:
            streams.append(merged_stream(adapter, name, stored, named(name), dtype))
    return streams


def _write_settings(
    checkpoint: Checkpoint, target: str, to: Layout, dtype: str | None, adapter: Adapter | None
) -> list[str]:
    """Everything but weights; `config.json` last, so that a folder that was cut off is no checkpoint."""
    if dtype is not None:
        checkpoint.config.dtype = DTYPES[dtype]
    if not checkpoint.whole:
        remarks = write_image_processor(checkpoint.folder, target, to=to)
        config = _encoder_config(checkpoint, to)
    else:
        folder = processor_folder(checkpoint.folder, adapter)
        processor = load_processor(folder)
        remarks = write_processor(folder, target, to=to, processor=processor)
        config = _whole_config(checkpoint, to, processor)
    if to == "plugin":
        # This package's code, for `trust_remote_code`.
        custom_object_save(checkpoint.model_class, target)
    write_json(os.path.join(target, "config.json"), config)
    return remarks


def _plugin_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = _without_common_defaults(json.loads(checkpoint.config.to_json_string(use_diff=False)))
    model_class = checkpoint.model_class
    module = model_class.__module__.rsplit(".", 1)[-1]
    configuration = type(checkpoint.config)
    auto_map = {"AutoConfig": f"{configuration.__module__.rsplit('.', 1)[-1]}.{configuration.__name__}"}
    auto_map.update({auto: f"{module}.{name}" for auto, name in model_class._auto_classes.items()})
    return {**config, "architectures": [model_class.__name__], "auto_map": auto_map}


def _without_common_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A complete dictionary but for what every configuration of transformers has at its default, at all depths."""
    common = PreTrainedConfig().to_dict()
    return {
        name: _without_common_defaults(value) if name in ("text_config", "vision_config") else value
        for name, value in config.items()
        if name not in _LABELS and (name in _SAID_ALWAYS or name not in common or common[name] != value)
    }


def _encoder_config(checkpoint: Checkpoint, to: Layout) -> dict[str, Any]:
    config = _plugin_config(checkpoint)
    translate: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "official": layouts.to_official_vision_config,
        "native": layouts.to_native_vision_config,
    }
    return translate[to](config) if to in translate else config


def _whole_config(checkpoint: Checkpoint, to: Layout, processor: Any) -> dict[str, Any]:
    config = _plugin_config(checkpoint)
    if to == "native":
        return layouts.to_native_config(config)
    if to == "official":
        official = layouts.to_official_config(
            config,
            image_token_index=placeholder_index(processor, config["image_token_id"]),
            use_token_compression=True if processor is None else processor.video_processor.use_token_compression,
        )
        # Read from the tokenizer otherwise.
        ids = {name: config[name] for name in ("image_token_id", "video_token_id")}
        if processor is None or any(getattr(processor, name) != token_id for name, token_id in ids.items()):
            official.update(ids)
        return official
    return config
