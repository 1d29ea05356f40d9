"""A training recipe: one YAML file, one tree of settings, each with one meaning.

A file and overrides of the form `section.key=value` enter, a checked `Recipe` leaves, and from it the arguments of
transformers' Trainer. Running it is left to `training_run.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]

from .packing import WINDOW
from .row_sources import FILE_SUFFIXES

# The one optimizer that transformers does not name.
MUON = "muon"
# Smallest values that make sense, by section; larger than 0 is said by a number that is nearly that.
_AT_LEAST: dict[str, dict[str, float]] = {
    "model": {"image_merge_size": 1, "video_merge_size": 1, "unpruned_share": 0},
    "data": {
        "fps": 1e-9,
        "max_frames": 1,
        "stream_max_frames": 1,
        "max_visual_tokens": 1,
        "max_length": 1,
        "workers": 0,
    },
    "rates": {"encoder": 0, "projector": 0, "llm": 0},
    "batch": {
        "samples_per_update": 1,
        "gradient_accumulation_steps": 1,
        "max_patches": 1,
        "max_visual_tokens": 1,
        "window": 1,
        "buffer_size": 1,
    },
    "schedule": {"epochs": 1e-9, "max_steps": 1, "warmup": 0, "weight_decay": 0, "max_grad_norm": 0, "seed": 0},
    "output": {"log_every": 1, "save_every": 1, "keep": 1, "eval_every": 1},
    "adapter": {"rank": 1, "alpha": 1, "dropout": 0},
}
_AT_MOST = {("model", "unpruned_share"): 1, ("adapter", "dropout"): 1}


@dataclasses.dataclass(frozen=True)
class ModelRecipe:
    """What is trained.

    Attributes:
        path: checkpoint folder or Hub repository, in any of the three layouts.
        vision_encoder: checkpoint of an encoder alone that replaces the model's; null keeps the model's.
        attention: attention implementation, as in `from_pretrained`; null for the default.
        image_merge_size: side of the block of patches that becomes one visual token of an image; null: as the
            checkpoint's processor says.
        video_merge_size: likewise for videos.
        prune: whether tokens of videos that barely change are dropped; null: as the checkpoint's processor says.
        unpruned_share: of the samples, where videos are pruned: theirs keep all tokens, so that the model answers the
            same either way.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
    """

    path: str
    vision_encoder: str | None = None
    attention: str | None = None
    image_merge_size: int | None = None
    video_merge_size: int | None = None
    prune: bool | None = None
    unpruned_share: float = 0.0
    gradient_checkpointing: bool = True


@dataclasses.dataclass(frozen=True)
class DataRecipe:
    """What it is trained on.

    Attributes:
        train: files (.json, .jsonl, .parquet, .csv), folders or Hub ids of rows.
        eval: the same, held out; empty for no evaluation.
        split: of the folders and Hub ids among `train`.
        eval_split: of those among `eval`.
        config_name: of the Hub ids, where a dataset has several configurations; null for its only one.
        media_root: folder that relative paths of media start from; null: that of the file.
        streaming: read rows as a stream, for what does not fit on disk; needs `schedule.max_steps`.
        on_error: raise at the first bad row, or skip and count.
        fps: frames per second at which videos are sampled; null: as the processor says.
        max_frames: at most so many frames of a video.
        stream_max_frames: of the video of a streaming row, whose later frames and messages are dropped.
        max_visual_tokens: visual tokens of one sample, before pruning.
        max_length: tokens of one sample and of one packed row, after pruning.
        overflow: of a longer sample: raise counts it as a bad row, truncate cuts it on the right, never inside a
            picture, skip leaves it out.
        add_system_prompt: put the released models' system prompt first.
        workers: processes that read samples, per training process.
        length_folder: folder where lengths are kept once measured, for all runs that read the same samples; null:
            `length_index` in the output folder.
    """

    train: tuple[str, ...]
    eval: tuple[str, ...] = ()
    split: str = "train"
    eval_split: str = "train"
    config_name: str | None = None
    media_root: str | None = None
    streaming: bool = False
    on_error: Literal["raise", "skip"] = "raise"
    fps: float | None = None
    max_frames: int = 180
    stream_max_frames: int = 400
    max_visual_tokens: int = 10240
    max_length: int = 16384
    overflow: Literal["raise", "truncate", "skip"] = "raise"
    add_system_prompt: bool = False
    workers: int = 4
    length_folder: str | None = None


@dataclasses.dataclass(frozen=True)
class RatesRecipe:
    """Peak learning rate of each module; null or 0 freezes it.

    Attributes:
        encoder: of the vision encoder; null freezes it.
        projector: of the two layers between encoder and language model; null freezes it.
        llm: of the language model, with an adapter of the adapter; null freezes it.
    """

    encoder: float | None = None
    projector: float | None = None
    llm: float | None = None


@dataclasses.dataclass(frozen=True)
class BatchRecipe:
    """Rows of a step and of an update.

    Attributes:
        samples_per_update: samples of an update on average, over all processes; from it and the measured lengths
            follow the rows of an update.
        gradient_accumulation_steps: rows of an update per process, instead of `samples_per_update`; for streams.
        max_patches: patches of a row, which bound the encoder's memory; null for no limit.
        max_visual_tokens: visual tokens of a row before pruning; null for no limit.
        window: samples that are sorted together for packing.
        buffer_size: samples that a stream holds for packing, per worker.
    """

    samples_per_update: int = 128
    gradient_accumulation_steps: int | None = None
    max_patches: int | None = 65536
    max_visual_tokens: int | None = None
    window: int = WINDOW
    buffer_size: int = 64


@dataclasses.dataclass(frozen=True)
class ScheduleRecipe:
    """How the learning rates and weights move.

    Attributes:
        epochs: passes over the data.
        max_steps: updates instead of `epochs`.
        warmup: share of all updates in which the rates rise.
        decay: transformers' name of the schedule after that.
        weight_decay: of AdamW, on matrices.
        max_grad_norm: gradients are scaled down to this norm.
        optimizer: transformers' name of the optimizer, or muon for torch's Muon on the matrices of the layers.
        precision: bf16 computes in bfloat16 on float32 weights; fp32 in float32.
        seed: of the order, of dropout and of fresh weights.
    """

    epochs: float = 1
    max_steps: int | None = None
    warmup: float = 0.03
    decay: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    # Fused, as is transformers' own default: no temporaries of a parameter's size, a third of the time.
    optimizer: str = "adamw_torch_fused"
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 42


@dataclasses.dataclass(frozen=True)
class OutputRecipe:
    """What is written, and when.

    Attributes:
        folder: of checkpoints, logs and the final model.
        dtype: of the final model's weights.
        log_every: updates between two lines of the log.
        save_every: updates between two checkpoints; null for none.
        keep: number of checkpoints that are kept; null for all.
        eval_every: updates between two evaluations; null for one at the end.
        overwrite: begin anew in a folder that holds checkpoints of an earlier run, and delete these.
        model_card: whether the final folder gets a README.md.
    """

    folder: str
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    log_every: int = 10
    save_every: int | None = 500
    keep: int | None = 2
    eval_every: int | None = None
    overwrite: bool = False
    model_card: bool = True


@dataclasses.dataclass(frozen=True)
class AdapterRecipe:
    """Low-rank adapters instead of all weights (needs peft).

    Attributes:
        rank: of the two factors.
        alpha: their product is scaled by alpha / rank.
        dropout: on what enters an adapter.
        targets: llm, or llm_and_encoder, which needs rates.encoder too. The projector is trained in full when it has
            a learning rate.
        four_bit: QLoRA: the frozen weights in 4 bits (needs bitsandbytes and a CUDA device).
    """

    rank: int = 64
    alpha: int = 128
    dropout: float = 0.05
    targets: Literal["llm", "llm_and_encoder"] = "llm"
    four_bit: bool = False


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole recipe; see the sections.

    Attributes:
        model: what is trained.
        data: on what.
        rates: how fast each module.
        output: what is written.
        batch: rows of a step.
        schedule: how rates move.
        adapter: low-rank adapters; null trains all weights.
    """

    model: ModelRecipe
    data: DataRecipe
    rates: RatesRecipe
    output: OutputRecipe
    batch: BatchRecipe = dataclasses.field(default_factory=BatchRecipe)
    schedule: ScheduleRecipe = dataclasses.field(default_factory=ScheduleRecipe)
    adapter: AdapterRecipe | None = None


def find_recipe(name: str | os.PathLike[str]) -> str:
    """The file of a recipe: a path as it is, or one of those that come with this package by its name, as `stage4`.

    Raises:
        FileNotFoundError: where there is neither, with the names that there are.
    """
    if Path(name).is_file():
        return os.fspath(name)
    there = recipe_names()
    if os.fspath(name) in there:
        return there[os.fspath(name)]
    raise FileNotFoundError(
        f"Expected a recipe as a YAML file or as one of {', '.join(there)}, got {os.fspath(name)!r}, which is neither."
    )


def recipe_names() -> dict[str, str]:
    """The recipes that come with this package: name -> file."""
    # In the wheel beside the code; in a clone at its root.
    package = Path(__file__).parents[1]
    folder = next((place for place in (package / "recipes", package.parents[1] / "recipes") if place.is_dir()), None)
    return {} if folder is None else {file.stem: os.fspath(file) for file in sorted(folder.glob("*.yaml"))}


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: of a YAML file, or the name of a recipe of this package, see `find_recipe`.
        overrides: `section.key=value`, the value in YAML: `rates.llm=1e-5`, `data.train=[a.jsonl, b.jsonl]`.

    Raises:
        ValueError: for keys that do not exist (with the nearest ones that do), missing ones, and values of
            another type.
    """
    path = find_recipe(path)
    with open(path, encoding="utf-8") as file:
        try:
            tree = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"Expected {os.fspath(path)} as YAML, got something else: {error}.") from error
    if not isinstance(tree, dict):
        raise ValueError(f"Expected {os.fspath(path)} to hold sections such as model and data, got {tree!r}.")
    for override in overrides:
        _override(tree, override)
    return recipe_from_dict(tree)


def recipe_from_dict(tree: Mapping[str, Any]) -> Recipe:
    """Builds a recipe from nested dictionaries; errors as for `load_recipe`."""
    recipe: Recipe = _build(Recipe, tree, where="")
    if recipe.data.streaming and (
        recipe.schedule.max_steps is None or recipe.batch.gradient_accumulation_steps is None
    ):
        raise ValueError(
            "Expected schedule.max_steps and batch.gradient_accumulation_steps with data.streaming (a stream has no "
            f"length), got {recipe.schedule.max_steps} and {recipe.batch.gradient_accumulation_steps}."
        )
    _check_ranges(recipe)
    if not recipe.data.train:
        raise ValueError("Expected data.train with files, folders or Hub ids of rows, got none.")
    if not any(dataclasses.astuple(recipe.rates)):
        raise ValueError("Expected rates.encoder, rates.projector or rates.llm above 0, got none: nothing is trained.")
    _check_adapter(recipe)
    _check_held_out(recipe.data)
    return recipe


def _check_ranges(recipe: Recipe) -> None:
    for section, keys in _AT_LEAST.items():
        for key, least in keys.items():
            value = getattr(getattr(recipe, section), key, None)
            most = _AT_MOST.get((section, key))
            if value is None or (value >= least and (most is None or value <= most)):
                continue
            expected = f"of at least {least}" if least in (0, 1) else "above 0"
            expected += "" if most is None else f" and at most {most}"
            raise ValueError(f"Expected {section}.{key} {expected}, got {value}.")
    if recipe.schedule.warmup >= 1:
        raise ValueError(
            f"Expected schedule.warmup as a share of all updates, below 1, got {recipe.schedule.warmup:g}."
        )


def _check_held_out(data: DataRecipe) -> None:
    """The same file in both lists is somebody's wish; the same split of a Hub id or folder is a split not named."""
    both = [name for name in data.eval if name in data.train and not name.endswith(FILE_SUFFIXES)]
    if both and data.split == data.eval_split:
        raise ValueError(
            f"Expected other rows in data.eval than in data.train, got the split {data.split!r} of {both[0]} in both: "
            "set data.eval_split."
        )


def _check_adapter(recipe: Recipe) -> None:
    """Modules that have an adapter need a rate, and of those without one the encoder has nothing to train."""
    if recipe.adapter is None:
        return
    if not recipe.rates.llm:
        raise ValueError("Expected rates.llm with an adapter, which the language model gets, got none.")
    if recipe.adapter.targets == "llm_and_encoder" and not recipe.rates.encoder:
        raise ValueError(
            "Expected rates.encoder with adapter.targets=llm_and_encoder, got none: the encoder's adapter would stay "
            "as it began."
        )
    if recipe.adapter.targets == "llm" and recipe.rates.encoder:
        raise ValueError(
            f"Expected adapter.targets=llm_and_encoder with rates.encoder={recipe.rates.encoder:g}, got llm: the "
            "encoder has no adapter then, and nothing of it would be trained."
        )


def _override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"Expected an override as section.key=value, got {override!r}.")
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ValueError(f"Expected {section!r} in {override!r} to be a section, got {tree!r}.")
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"Expected the value of {key} in YAML, got {text!r}: {error}.") from error


def _build(kind: Any, tree: Any, *, where: str) -> Any:
    """An instance of a dataclass from a dictionary."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"Expected {where.rstrip('.') or 'the recipe'} as a section of keys, got {tree!r}.")
    types_of = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in tree:
        if key not in fields:
            nearest = difflib.get_close_matches(str(key), fields, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"there are {', '.join(fields)}."
            raise ValueError(f"Expected a key of the recipe, got {where}{key}: {hint}")
    missing = [where + name for name, field in fields.items() if name not in tree and _is_required(field)]
    if missing:
        raise ValueError(f"Expected {', '.join(missing)} in the recipe, got none: set {missing[0]}=...")
    return kind(**{key: _value(types_of[key], value, where=where + key) for key, value in tree.items()})


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(kind: Any, value: Any, *, where: str) -> Any:
    options = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where=where + ".")
    if typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
        raise ValueError(f"Expected {where} as one of {', '.join(map(str, typing.get_args(kind)))}, got {value!r}.")
    if typing.get_origin(kind) is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items):
            return tuple(items)
        raise ValueError(f"Expected {where} as a list of strings, got {value!r}.")
    return _scalar(kind, value, where=where)


def _scalar(kind: Any, value: Any, *, where: str) -> Any:
    # YAML reads 1e-5 as a string.
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    raise ValueError(f"Expected {where} as {names[kind]}, got {value!r}.")


def training_arguments(recipe: Recipe, *, gradient_accumulation_steps: int, tensorboard: bool, **changes: Any) -> Any:
    """The recipe as transformers' `TrainingArguments`.

    Args:
        recipe: a checked recipe.
        gradient_accumulation_steps: rows of an update per process.
        tensorboard: whether to log for TensorBoard.
        changes: further arguments, which win.
    """
    import torch
    from transformers import TrainingArguments

    schedule, output = recipe.schedule, recipe.output
    # The older name says the same; the newer one came after transformers 5.16.
    checkpointing = (
        "activation_checkpointing"
        if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
        else "gradient_checkpointing"
    )
    options: dict[str, Any] = {
        "output_dir": output.folder,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "num_train_epochs": schedule.epochs,
        "max_steps": -1 if schedule.max_steps is None else schedule.max_steps,
        "learning_rate": max(rate or 0.0 for rate in dataclasses.astuple(recipe.rates)),
        "lr_scheduler_type": schedule.decay,
        "warmup_steps": schedule.warmup,
        "weight_decay": schedule.weight_decay,
        "max_grad_norm": schedule.max_grad_norm,
        # Muon is made by the trainer; transformers does not know it.
        "optim": "adamw_torch" if schedule.optimizer == MUON else schedule.optimizer,
        "bf16": schedule.precision == "bf16",
        # transformers computes in bfloat16 on the CPU only where the CPU was asked for.
        "use_cpu": not torch.accelerator.is_available(),
        "seed": schedule.seed,
        checkpointing: recipe.model.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if recipe.model.gradient_checkpointing else None,
        "average_tokens_across_devices": True,
        "logging_steps": output.log_every,
        "logging_first_step": True,
        # A NaN is to be seen, not averaged away.
        "logging_nan_inf_filter": False,
        "save_strategy": "no" if output.save_every is None else "steps",
        "save_steps": output.save_every or 500,
        "save_total_limit": output.keep,
        "eval_strategy": "no" if output.eval_every is None or not recipe.data.eval else "steps",
        "eval_steps": output.eval_every,
        "disable_tqdm": not sys.stderr.isatty(),
        "report_to": ["tensorboard"] if tensorboard else [],
        "dataloader_num_workers": recipe.data.workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        # The collator lets every module run in every step.
        "ddp_find_unused_parameters": False,
    }
    if schedule.precision == "fp32" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        # Else `accelerate launch` decides by its own configuration.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    return TrainingArguments(**{**options, **changes})
