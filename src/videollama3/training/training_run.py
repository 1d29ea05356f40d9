"""One training run, from a recipe to a folder that everything else can use.

A recipe enters; checkpoints, the final model, `training_record.json` and a model card leave. Steps are left to
`trainer.py`, reading data to `training_dataset.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import json
import logging
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.training_args import OptimizerNames

from ..conversion.model_card_folder import write_card
from ..loading import naming_model
from ..modeling.checkpoint_checks import weights_folder
from ..modeling.configuration_videollama3 import VideoLlama3Config
from ..modeling.modeling_videollama3 import VideoLlama3ForCausalLM
from ..modeling.vision_encoder_videollama3 import VideoLlama3VisionModel
from ..processing.processing_videollama3 import VideoLlama3Processor
from ..whole_files import write_whole
from .adapters import add_adapter, four_bit_config, merge_adapter, remove_empty_card
from .length_index import Numbers, Progress, rows_for, shared_lengths
from .packing import TOKENS, Lengths, PackedBatchSampler
from .recipe import MUON, Recipe, training_arguments
from .run_checkpoints import (
    RunInCheckpoints,
    checkpoint_to_resume,
    delete_checkpoints,
    flat_settings,
    updates_of,
    write_settings,
)
from .trainer import ModuleRates, RowLimits, VideoLlama3Trainer, freeze

RECORD_NAME = "training_record.json"
# Rows that are read beyond what `max_steps` asks for, as a share of that: updates do not have equally many samples.
_SPARE_ROWS = 0.2
# Rows are whole, so that an update has somewhat more samples than asked for; so many times as many are worth a word.
_MORE_SAMPLES = 1.5

logger = logging.getLogger(__name__)


def run_recipe(
    recipe: Recipe, *, resume: str | bool = False, measure_for: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Trains as a recipe says.

    Args:
        recipe: a checked recipe.
        resume: a checkpoint folder, or True for the last one in the output folder.
        measure_for: measure the lengths of the samples that a run of so many processes reads, and stop: worth doing
            with one process and no accelerator before a large run.
        progress: called while lengths are measured.

    Returns:
        The record that is also written to `training_record.json`; with `measure_for`, the number of samples.

    Raises:
        ValueError: when there is nothing to resume from; for data or settings that do not fit.
        ImportError: when a package that the recipe needs is missing.
    """
    checkpoint = None if measure_for else checkpoint_to_resume(recipe, resume)
    _check_what_it_needs(recipe)
    processor = build_processor(recipe)
    train, held_out = open_datasets(recipe, processor)
    # Made before anything else: it tells how many processes there are.
    arguments = training_arguments(recipe, gradient_accumulation_steps=1, tensorboard=_installed("tensorboard"))
    lengths, rows = None, None
    if not recipe.data.streaming:
        world_size = measure_for or arguments.world_size
        lengths, rows = _lengths(recipe, train, arguments, progress, world_size=world_size)
    # Before training, too: a bad row of the held-out set is found before hours of work.
    held_out_lengths = None if held_out is None else _measure(recipe, held_out, arguments, progress, None)
    if held_out is not None and held_out_lengths is not None:
        # Raises where a sample does not fit into a row, or none is left.
        packing_sampler(recipe, held_out_lengths, name=held_out.name)
        if num_left_out := int((held_out_lengths[:, TOKENS] == 0).sum()):
            logger.warning("left out %d of %d held-out samples, see above", num_left_out, len(held_out_lengths))
    if measure_for is not None:
        return {"num_train_samples": 0 if lengths is None else int((lengths[:, TOKENS] > 0).sum())}
    arguments.gradient_accumulation_steps = accumulation_steps(
        recipe, lengths, world_size=arguments.world_size, name=getattr(train, "name", str)
    )
    # Fresh weights of adapters, too: Trainer's own call comes after these.
    transformers.set_seed(recipe.schedule.seed)
    trainer = VideoLlama3Trainer(
        build_model(recipe),
        arguments,
        processor=processor,
        train_dataset=train,
        eval_dataset=held_out,
        rates=_rates(recipe),
        limits=row_limits(recipe),
        use_muon=recipe.schedule.optimizer == MUON,
        window=recipe.batch.window,
        buffer_size=recipe.batch.buffer_size,
        length_folder=_length_folder(recipe),
        train_lengths=lengths,
        eval_lengths=held_out_lengths,
        progress=progress,
    )
    remembered = RunInCheckpoints(recipe, None if lengths is None else trainer.plan_digest())
    remembered.warn_of_other_samples(checkpoint)
    trainer.into_checkpoint = remembered.write
    _warn_of_no_training(trainer)
    if checkpoint is None and arguments.should_save:
        # What `output.overwrite` allows; not before all samples have been measured.
        delete_checkpoints(recipe.output.folder)
    num_skipped: int | None = None
    if checkpoint is not None and updates_of(checkpoint) >= (trainer.num_planned_updates() or math.inf):
        # Killed after its last update.
        trainer.finish(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
        num_skipped = _num_skipped(trainer)
    _save_final(recipe, trainer)
    evaluation: dict[str, Any] = {}
    try:
        evaluation = trainer.evaluate() if held_out is not None else {}
    finally:
        # Whatever becomes of the evaluation, the model is trained.
        trainer.save_state()
        record = _record(recipe, trainer, lengths, rows, evaluation, num_skipped)
        if arguments.should_save:
            _write_record(recipe, record)
    trainer.accelerator.wait_for_everyone()
    return record


# ---------------------------------------------------------------------- parts


def build_processor(recipe: Recipe) -> VideoLlama3Processor:
    """The checkpoint's processor, with what the recipe changes."""
    with naming_model(recipe.model.path, "model.path"):
        processor = VideoLlama3Processor.from_pretrained(recipe.model.path)
    for part, merge in (("image", recipe.model.image_merge_size), ("video", recipe.model.video_merge_size)):
        if merge is not None:
            getattr(processor, f"{part}_processor").merge_size = merge
    if recipe.model.prune is not None:
        processor.video_processor.use_token_compression = recipe.model.prune
    return processor


def build_model(recipe: Recipe) -> Any:
    """The checkpoint's model in float32 (bf16 computes on float32 weights), with an adapter when asked."""
    options: dict[str, Any] = {"dtype": torch.float32}
    if recipe.model.attention is not None:
        options["attn_implementation"] = recipe.model.attention
    if recipe.adapter is not None and recipe.adapter.four_bit:
        options.update(quantization_config=four_bit_config(), dtype=torch.bfloat16)
    model = _load_model(recipe, **options)
    if recipe.adapter is not None:
        model = add_adapter(model, recipe.adapter, train_projector=bool(recipe.rates.projector))
    return model


def trained_shape(recipe: Recipe) -> Any:
    """The model that a recipe trains on the device "meta": no weights, but their shapes, and which of them learn."""
    with naming_model(recipe.model.path, "model.path"):
        config = VideoLlama3Config.from_pretrained(recipe.model.path)
    options = {} if recipe.model.attention is None else {"attn_implementation": recipe.model.attention}
    with torch.device("meta"):
        model: Any = VideoLlama3ForCausalLM._from_config(config, **options)
        if recipe.adapter is not None:
            _require("peft")
            adapter = dataclasses.replace(recipe.adapter, four_bit=False)
            model = add_adapter(model, adapter, train_projector=bool(recipe.rates.projector))
    freeze(model, _rates(recipe))
    return model


def _rates(recipe: Recipe) -> ModuleRates:
    return ModuleRates(**dataclasses.asdict(recipe.rates))


def _load_model(recipe: Recipe, **options: Any) -> Any:
    """The checkpoint, with another encoder where the recipe names one."""
    model = VideoLlama3ForCausalLM.from_pretrained(recipe.model.path, **options)
    if recipe.model.vision_encoder is not None:
        encoder = VideoLlama3VisionModel.from_pretrained(recipe.model.vision_encoder, dtype=model.dtype)
        model.model.vision_model.load_state_dict(encoder.state_dict())
    return model


def row_limits(recipe: Recipe) -> RowLimits:
    """Limits of a packed row."""
    return RowLimits(
        max_length=recipe.data.max_length,
        max_patches=recipe.batch.max_patches,
        max_visual_tokens=recipe.batch.max_visual_tokens,
    )


def accumulation_steps(
    recipe: Recipe, lengths: Lengths | None, *, world_size: int, name: Callable[[int], str] = str
) -> int:
    """Rows of an update per process: as given, or so that an update has `samples_per_update` samples on average.

    Args:
        recipe: its batch section is read.
        lengths: int64 (samples, 3); None for a stream.
        world_size: number of processes.
        name: what a sample is called in an error.
    """
    if recipe.batch.gradient_accumulation_steps is not None or lengths is None:
        return recipe.batch.gradient_accumulation_steps or 1
    sampler = packing_sampler(recipe, lengths, name=name)
    samples_per_row = sampler.num_samples / sampler.num_packs
    # No more than there are: an update would read the same ones again.
    samples_per_update = min(recipe.batch.samples_per_update, sampler.num_samples)
    steps = max(1, round(samples_per_update / samples_per_row / world_size))
    least = samples_per_row * world_size
    if steps == 1 and least > _MORE_SAMPLES * samples_per_update:
        logger.warning(
            "An update has about %d samples instead of batch.samples_per_update=%d, as a row of each of %d processes "
            "holds that many: lower data.max_length for fewer, and mind the learning rates.",
            round(least),
            recipe.batch.samples_per_update,
            world_size,
        )
    return steps


def open_datasets(recipe: Recipe, processor: Any) -> tuple[Any, Any]:
    """The datasets that a recipe trains on and holds out, the latter None where there is none."""
    from .training_dataset import StreamingTrainingDataset, TrainingDataset

    data = recipe.data
    options: dict[str, Any] = {
        "media_root": data.media_root,
        "on_error": data.on_error,
        "max_length": data.max_length,
        "overflow": data.overflow,
        "max_visual_tokens": data.max_visual_tokens,
        "add_system_prompt": data.add_system_prompt,
        "seed": recipe.schedule.seed,
        "fps": data.fps,
        "max_frames": data.max_frames,
        "stream_max_frames": data.stream_max_frames,
        "unpruned_share": recipe.model.unpruned_share,
    }
    options["config_name"] = data.config_name
    held_out = TrainingDataset(list(data.eval), processor, split=data.eval_split, **options) if data.eval else None
    options["split"] = data.split
    if data.streaming:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        source: Any = data.train[0] if len(data.train) == 1 else list(data.train)
        return StreamingTrainingDataset(source, processor, rank=rank, world_size=world_size, **options), held_out
    return TrainingDataset(list(data.train), processor, **options), held_out


def _lengths(
    recipe: Recipe, dataset: Any, arguments: Any, progress: Progress | None, *, world_size: int
) -> tuple[Lengths, Numbers | None]:
    """Lengths of the rows that a run of so many processes can come to, and the numbers of these; None for all."""
    max_steps = recipe.schedule.max_steps
    if max_steps is None or recipe.batch.gradient_accumulation_steps is not None:
        return _measure(recipe, dataset, arguments, progress, None), None
    wanted = math.ceil(max_steps * recipe.batch.samples_per_update * (1 + _SPARE_ROWS))
    first = True
    while True:
        rows = rows_for(len(dataset), wanted, seed=recipe.schedule.seed)
        lengths = _measure(recipe, dataset, arguments, progress, rows, retry_skipped=first)
        first = False
        if rows is None:
            return lengths, None
        num_samples = int((lengths[:, TOKENS] > 0).sum())
        if num_samples:
            steps = accumulation_steps(recipe, lengths, world_size=world_size, name=dataset.name)
            # Packs as they are: for an update they would be divided, or filled up, to a multiple of its own.
            num_packs = packing_sampler(recipe, lengths, name=dataset.name).num_packs
            share = max_steps * steps * world_size / num_packs
            if share <= 1:
                return lengths, rows
        # An update has more samples than asked for (it has whole rows, for each process), or many were skipped.
        wanted = math.ceil(len(rows) * (share if num_samples else 2) * (1 + _SPARE_ROWS))


def _measure(
    recipe: Recipe,
    dataset: Any,
    arguments: Any,
    progress: Progress | None,
    rows: Numbers | None,
    *,
    retry_skipped: bool = True,
) -> Lengths:
    return shared_lengths(
        dataset,
        arguments,
        folder=_length_folder(recipe),
        rows=rows,
        retry_skipped=retry_skipped,
        num_workers=recipe.data.workers,
        progress=progress,
    )


def packing_sampler(recipe: Recipe, lengths: Lengths, *, name: Callable[[int], str] = str) -> PackedBatchSampler:
    """Rows as a recipe packs them, one of them an update.

    Args:
        recipe: its limits are read.
        lengths: int64 (samples, 3), see `packing.py`.
        name: what a sample is called in an error.
    """
    return PackedBatchSampler(
        lengths,
        **dataclasses.asdict(row_limits(recipe)),
        seed=recipe.schedule.seed,
        window=recipe.batch.window,
        name=name,
    )


def _length_folder(recipe: Recipe) -> str:
    return recipe.data.length_folder or os.path.join(recipe.output.folder, "length_index")


def _warn_of_no_training(trainer: VideoLlama3Trainer) -> None:
    """A warm-up begins at a rate of 0: where there is nothing after it, nothing is trained."""
    count = trainer.num_planned_updates()
    if count is not None and count <= 1 <= trainer.args.get_warmup_steps(count):
        logger.warning(
            "This run makes %d update(s), at a rate of 0, where its warm-up begins: nothing will be trained. Set "
            "schedule.warmup=0, or let it make more updates (schedule.epochs, batch.samples_per_update, "
            "data.max_length).",
            count,
        )


# ---------------------------------------------------------------------- results


def _save_final(recipe: Recipe, trainer: VideoLlama3Trainer) -> None:
    """Plain weights in the output folder; of a run with adapters the merged ones, and the adapter beside them."""
    folder = Path(recipe.output.folder)
    dtype = getattr(torch, recipe.output.dtype)
    if recipe.adapter is not None:
        trainer.save_whole_model(str(folder / "adapter"))
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            write_settings(recipe, folder / "adapter")
            merge_adapter(_load_model(recipe, dtype=torch.float32), folder / "adapter", dtype=dtype).save_pretrained(
                folder
            )
            trainer.processing_class.save_pretrained(folder)
    else:
        trainer.save_whole_model(str(folder))
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save and dtype != torch.float32:
            VideoLlama3ForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    if trainer.args.should_save:
        # A pickle of arguments: of no use to those who load the model.
        for path in (folder / "training_args.bin", folder / "adapter" / "training_args.bin"):
            path.unlink(missing_ok=True)
        remove_empty_card(folder / "adapter")


def _num_skipped(trainer: VideoLlama3Trainer) -> int | None:
    """Rows of a stream that the processes together have skipped; None where lengths tell."""
    if not hasattr(trainer.train_dataset, "num_skipped"):
        return None
    count = torch.tensor(trainer.train_dataset.num_skipped, device=trainer.args.device)
    return int(trainer.accelerator.reduce(count, reduction="sum"))


def _record(
    recipe: Recipe,
    trainer: VideoLlama3Trainer,
    lengths: Lengths | None,
    rows: Numbers | None,
    evaluation: dict[str, Any],
    num_skipped: int | None,
) -> dict[str, Any]:
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    counts: dict[str, Any] = {"num_train_samples": None, "num_skipped_samples": None, "num_unread_samples": None}
    epochs = trainer.state.epoch
    if lengths is not None:
        usable, read = int((lengths[:, TOKENS] > 0).sum()), len(lengths) if rows is None else len(rows)
        counts = {
            "num_train_samples": usable,
            "num_skipped_samples": read - usable,
            "num_unread_samples": len(lengths) - read,
        }
        # The Trainer counts passes over what was read.
        epochs = None if epochs is None else epochs * read / len(lengths)
    else:
        # Of a stream it says 1, however much of it was read.
        epochs = None
        counts["num_skipped_samples"] = num_skipped
    return {
        "base_model": recipe.model.path,
        "recipe": flat_settings(recipe),
        "data": list(recipe.data.train),
        **counts,
        "num_updates": trainer.state.global_step,
        "num_epochs": epochs,
        "num_processes": trainer.args.world_size,
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        "mean_train_loss": mean_loss(losses),
        "final_train_loss": losses[-1][1] if losses else None,
        "eval": {key: value for key, value in evaluation.items() if key == "eval_loss"},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def mean_loss(logged: Sequence[tuple[int, float]]) -> float | None:
    """The mean over the updates of a run from (update, mean since the one before it); None without any.

    transformers' own covers only what a run that resumed did after that.
    """
    steps = [0, *(step for step, _ in logged)]
    total = sum((step - before) * loss for before, (step, loss) in zip(steps, logged, strict=False))
    return total / steps[-1] if steps[-1] else None


def _write_record(recipe: Recipe, record: dict[str, Any]) -> None:
    folder = Path(recipe.output.folder)
    name = folder.resolve().name
    folders = {name: folder} if recipe.adapter is None else {name: folder, f"{name}-adapter": folder / "adapter"}
    for title, path in folders.items():
        write_whole(path / RECORD_NAME, json.dumps(record, indent=2) + "\n")
        if recipe.output.model_card:
            # A card that the user has written or changed stays.
            with contextlib.suppress(FileExistsError):
                write_card(path, kind="own", name=title)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _require(package: str, install: str = "'videollama3[train]'") -> None:
    if not _installed(package):
        raise ImportError(f"Expected {package} for this recipe, found none: pip install {install}.")


def _check_what_it_needs(recipe: Recipe) -> None:
    """What would else fail after all samples were measured: packages, a card, schedule, attention, another encoder."""
    _require("accelerate")
    if recipe.adapter is not None:
        _require("peft")
        if recipe.adapter.four_bit:
            _require("bitsandbytes", "bitsandbytes")
            if not torch.cuda.is_available():
                raise ValueError("Expected a CUDA device for adapter.four_bit (QLoRA), got none: use the recipe lora.")
    if os.path.isfile(os.path.join(recipe.model.path, "adapter_config.json")):
        raise ValueError(
            f"Expected a whole model as model.path, got the adapter {recipe.model.path}: train from the merged model "
            "beside it, or merge it with `videollama3 convert`."
        )
    _check_decay(recipe.schedule.decay)
    _check_optimizer(recipe.schedule.optimizer)
    if os.path.exists(recipe.output.folder) and not os.path.isdir(recipe.output.folder):
        raise NotADirectoryError(f"Expected output.folder as a folder, got the file {recipe.output.folder!r}.")
    encoder = recipe.model.vision_encoder
    if encoder is not None and weights_folder(encoder, {}) is None:
        raise ValueError(f"Expected weights of a vision encoder in model.vision_encoder, got none in {encoder!r}.")
    trained_shape(recipe)


def _check_optimizer(name: str) -> None:
    names = [MUON, *(known.value for known in OptimizerNames)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or ["adamw_torch_fused", MUON]
        raise ValueError(
            f"Expected schedule.optimizer as {MUON} or a name that transformers has (near are {', '.join(near)}), got "
            f"{name!r}."
        )


def _check_decay(name: str) -> None:
    """Some of transformers' schedules need more than a recipe says."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        transformers.get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=10)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "Expected schedule.decay as a schedule of transformers that needs no settings of its own (cosine, linear, "
            f"constant_with_warmup, ...), got {name!r}: {error}."
        ) from error
