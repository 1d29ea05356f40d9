"""One training run, from a recipe to a folder that everything else can use.

A recipe enters; checkpoints, the final model, `training_record.json` and a model card leave. Steps are left to
`trainer.py`, reading data to `training_dataset.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from ..conversion.model_card_folder import write_card
from ..modeling.configuration_videollama3 import VideoLlama3Config
from ..modeling.modeling_videollama3 import VideoLlama3ForCausalLM
from ..modeling.vision_encoder_videollama3 import VideoLlama3VisionModel
from ..processing.processing_videollama3 import VideoLlama3Processor
from .adapters import add_adapter, four_bit_config, merge_adapter
from .length_index import Numbers, Progress, rows_for, shared_lengths
from .packing import TOKENS, Lengths, PackedBatchSampler
from .recipe import MUON, Recipe, training_arguments
from .trainer import ModuleRates, RowLimits, VideoLlama3Trainer, freeze

RECORD_NAME = "training_record.json"
# Rows that are read beyond what `max_steps` asks for, as a share of that: updates do not have equally many samples.
_SPARE_ROWS = 0.2
# In every checkpoint: a digest of the samples of all updates in their order.
_PLAN_NAME = "sample_order.sha256"

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
    _require("accelerate")
    if recipe.adapter is not None:
        _require("peft")
        if recipe.adapter.four_bit:
            _require("bitsandbytes")
    checkpoint = None if measure_for else _checkpoint(recipe, resume)
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
        if num_skipped := int((held_out_lengths[:, TOKENS] == 0).sum()):
            logger.warning("left out %d of %d held-out samples, see above", num_skipped, len(held_out_lengths))
    if measure_for is not None:
        return {"num_train_samples": 0 if lengths is None else int((lengths[:, TOKENS] > 0).sum())}
    arguments.gradient_accumulation_steps = accumulation_steps(
        recipe, lengths, world_size=arguments.world_size, name=getattr(train, "name", str)
    )
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
    if lengths is not None:
        plan = _PlanInCheckpoints(trainer.plan_digest())
        plan.compare(checkpoint)
        trainer.add_callback(plan)
    if checkpoint is None and arguments.should_save:
        # What `output.overwrite` allows; not before all samples have been measured.
        for path in _checkpoints(recipe.output.folder).values():
            shutil.rmtree(path)
    trainer.train(resume_from_checkpoint=checkpoint)
    _save_final(recipe, trainer)
    evaluation: dict[str, Any] = {}
    try:
        evaluation = trainer.evaluate() if held_out is not None else {}
    finally:
        # Whatever becomes of the evaluation, the model is trained.
        trainer.save_state()
        record = _record(recipe, trainer, lengths, rows, evaluation)
        if arguments.should_save:
            _write_record(recipe, record)
    trainer.accelerator.wait_for_everyone()
    return record


# ---------------------------------------------------------------------- parts


def build_processor(recipe: Recipe) -> VideoLlama3Processor:
    """The checkpoint's processor, with what the recipe changes."""
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
    config = VideoLlama3Config.from_pretrained(recipe.model.path)
    with torch.device("meta"):
        model: Any = VideoLlama3ForCausalLM(config)
        if recipe.adapter is not None:
            _require("peft")
            model = add_adapter(model, recipe.adapter, train_projector=bool(recipe.rates.projector))
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
    return max(1, round(samples_per_update / samples_per_row / world_size))


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


class _PlanInCheckpoints(transformers.TrainerCallback):
    """Puts which samples come in which order into every checkpoint; warns where a run that resumes reads others."""

    def __init__(self, digest: str) -> None:
        self.digest = digest

    def compare(self, checkpoint: str | None) -> None:
        """With what the run had that wrote a checkpoint."""
        kept = None if checkpoint is None else Path(checkpoint) / _PLAN_NAME
        if kept is not None and kept.is_file() and kept.read_text(encoding="utf-8").strip() != self.digest:
            logger.warning(
                "This run reads other samples, or in another order, than the one that wrote %s (another max_steps, "
                "other data, limits or number of processes): some samples will be seen twice, others not in this "
                "epoch.",
                checkpoint,
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Of transformers' Trainer, after a checkpoint was written."""
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / _PLAN_NAME).write_text(self.digest + "\n", encoding="utf-8")


def _length_folder(recipe: Recipe) -> str:
    return os.path.join(recipe.output.folder, "length_index")


def _checkpoint(recipe: Recipe, resume: str | bool) -> str | None:
    if not resume:
        old = [path.name for path in _checkpoints(recipe.output.folder).values()]
        if old and not recipe.output.overwrite:
            raise ValueError(
                f"Expected an output folder without checkpoints for a run that begins anew, got {', '.join(old)} in "
                f"{recipe.output.folder}, which a later --resume would take for its own: pass --resume to go on from "
                "the last one, choose another output.folder, or pass output.overwrite=true to delete them."
            )
        return None
    place = resume if isinstance(resume, str) else recipe.output.folder
    last = last_checkpoint(place) if resume is True else (place if _is_complete(Path(place)) else None)
    if last is None:
        raise ValueError(
            f"Expected a complete checkpoint to resume from in {place}, got none: start without --resume."
        )
    return last


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint of a run, None without one; what a killed run was just writing is passed over."""
    complete = [path for path in _checkpoints(folder).values() if _is_complete(path)]
    return str(complete[-1]) if complete else None


def _checkpoints(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Folders that Trainer writes, by their update, in order; a "checkpoint-best" is somebody else's."""
    paths = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir()]
    numbers = {path: path.name.partition("-")[2] for path in paths}
    return dict(sorted((int(number), path) for path, number in numbers.items() if number.isdigit()))


def _is_complete(checkpoint: Path) -> bool:
    """Whether the last file that Trainer writes is there in full."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


# ---------------------------------------------------------------------- results


def _save_final(recipe: Recipe, trainer: VideoLlama3Trainer) -> None:
    """Plain weights in the output folder; of a run with adapters the merged ones, and the adapter beside them."""
    folder = Path(recipe.output.folder)
    dtype = getattr(torch, recipe.output.dtype)
    if recipe.adapter is not None:
        trainer.save_whole_model(str(folder / "adapter"))
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
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


def _record(
    recipe: Recipe,
    trainer: VideoLlama3Trainer,
    lengths: Lengths | None,
    rows: Numbers | None,
    evaluation: dict[str, Any],
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


def flat_settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe as `section.key` -> number, text, true or false, or None."""
    settings: dict[str, Any] = {}
    for section, values in dataclasses.asdict(recipe).items():
        if values is None:
            settings[section] = None
        else:
            texts = {key: ", ".join(value) if isinstance(value, tuple) else value for key, value in values.items()}
            settings.update({f"{section}.{key}": value for key, value in texts.items()})
    return settings


def _write_record(recipe: Recipe, record: dict[str, Any]) -> None:
    folder = Path(recipe.output.folder)
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if recipe.output.model_card:
        # A card that the user has written or changed stays.
        with contextlib.suppress(FileExistsError):
            write_card(folder, kind="own")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _require(package: str) -> None:
    if not _installed(package):
        raise ImportError(f"Expected {package} for this recipe, found none: pip install 'videollama3[train]'.")
