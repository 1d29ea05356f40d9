"""The Trainer of transformers with packed batches, a learning rate per module, and an exact loss on held-out data.

A model, datasets and limits of a row enter; checkpoints and metrics leave. What to train on and with which
settings is left to `recipe.py` and `training_run.py`, how rows are put together to `packing.py` and `collator.py`.

The loss of a step is the sum over the supervised tokens of all rows of the update, on all processes, divided by
their number: what one big batch would give, however rows and processes share it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ..modeling.torch_varlen import TORCH_VARLEN
from .collator import IGNORE_INDEX, PackingCollator
from .length_index import Progress, measure_sample, shared_lengths
from .muon import MuonWithAdamW, is_muon_parameter
from .packing import WINDOW, Lengths, OnlinePacking, PackedBatchSampler, PackedSamples, sample_name

logger = logging.getLogger(__name__)

# Part of a parameter's name -> module; all others belong to the language model. Adapters keep these names.
_MODULES = {"vision_model.": "encoder", "projector.": "projector"}


@dataclasses.dataclass(frozen=True)
class ModuleRates:
    """Learning rate of each module; 0 or None freezes it.

    Attributes:
        encoder: of the vision encoder.
        projector: of the two layers between encoder and language model.
        llm: of the language model, its embeddings and its head.
    """

    encoder: float | None = None
    projector: float | None = None
    llm: float | None = None

    def of(self, parameter_name: str) -> float:
        """Learning rate of a parameter; 0 when it is frozen."""
        return getattr(self, module_of(parameter_name)) or 0.0


@dataclasses.dataclass(frozen=True)
class RowLimits:
    """Limits of one packed row, that is of one step of one process.

    Attributes:
        max_length: tokens after pruning.
        max_patches: patches of all images and frames, which bound the encoder's memory; None for no limit.
        max_visual_tokens: visual tokens before pruning; None for no limit.
    """

    max_length: int = 16384
    max_patches: int | None = None
    max_visual_tokens: int | None = None


def module_of(parameter_name: str) -> str:
    """`encoder`, `projector` or `llm`."""
    return next((module for part, module in _MODULES.items() if part in parameter_name), "llm")


def freeze(model: torch.nn.Module, rates: ModuleRates) -> None:
    """Lets only the parameters of modules with a learning rate be trained; what is frozen already stays so."""
    for name, parameter in model.named_parameters():
        if not rates.of(name):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"Expected a learning rate above 0 for a module at least, got {rates}.")


class VideoLlama3Trainer(Trainer):
    """Trains on packed rows; everything else is transformers' Trainer.

    `per_device_train_batch_size` must be 1: a row is a batch. Rows of an update are
    `gradient_accumulation_steps` times the number of processes.
    """

    # Of the base class, which is not typed.
    optimizer: Any
    control: Any

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        processor: Any,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        rates: ModuleRates,
        limits: RowLimits,
        use_muon: bool = False,
        window: int = WINDOW,
        buffer_size: int = 64,
        length_folder: str | None = None,
        train_lengths: Lengths | None = None,
        eval_lengths: Lengths | None = None,
        progress: Progress | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        """Freezes modules, and prepares as `transformers.Trainer` does.

        Args:
            model: a `VideoLlama3ForCausalLM`, or a peft model around one.
            args: transformers' arguments; their learning rate is not read.
            processor: saved into every checkpoint.
            train_dataset: map-style (`TrainingDataset`) or a stream (`StreamingTrainingDataset`).
            eval_dataset: map-style, or None.
            rates: learning rate per module.
            limits: of a row.
            use_muon: whether Muon trains the matrices of the layers (`muon.py`) instead of what `args` say.
            window: see `PackedBatchSampler`.
            buffer_size: see `OnlinePacking`; for a stream.
            length_folder: where measured lengths are kept; None measures anew.
            train_lengths: int64 (samples, 3) of the training set, when they are known already.
            eval_lengths: likewise of the held-out set.
            progress: called while lengths are measured.
            callbacks: further ones.

        Raises:
            ValueError: for a batch size other than 1, for several GPUs in one process, for label smoothing, or rates
                that train nothing.
        """
        if args.per_device_train_batch_size != 1:
            raise ValueError(
                f"Expected per_device_train_batch_size=1 (a packed row is a batch), got "
                f"{args.per_device_train_batch_size}: raise gradient_accumulation_steps or max_length instead."
            )
        if args.label_smoothing_factor:
            raise ValueError(
                f"Expected label_smoothing_factor=0, got {args.label_smoothing_factor}: transformers would compute it "
                "without shifting the labels, and on logits of every position."
            )
        freeze(model, rates)
        self.rates, self.limits, self.window, self.buffer_size = rates, limits, window, buffer_size
        self.use_muon = use_muon
        self.length_folder, self.progress = length_folder, progress
        self._lengths: dict[int, Lengths] = {}
        for dataset, lengths in ((train_dataset, train_lengths), (eval_dataset, eval_lengths)):
            if lengths is not None:
                self._lengths[id(dataset)] = lengths
        self.train_sampler: PackedBatchSampler | None = None
        self._planned: PackedBatchSampler | None = None
        # Called with a checkpoint's folder: what else is to be in it.
        self.into_checkpoint: Callable[[str], None] | None = None
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(
            model=model,
            args=args,
            # Replaced below, once it is known what is shared among processes.
            data_collator=PackingCollator.for_processor(processor),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            callbacks=[*(callbacks or []), _Epochs(self), _LastLoss()],
        )
        # A model that is split over GPUs counts as on one.
        if self.args.n_gpu > 1:
            raise ValueError(
                f"Expected one GPU for each process, got one that sees {self.args.n_gpu}, among which Trainer would "
                "divide the patches of a row: start it with `accelerate launch --multi_gpu`, or let it see one "
                "(CUDA_VISIBLE_DEVICES=0)."
            )
        attention = str(model.config.text_config._attn_implementation)
        self.data_collator = PackingCollator.for_processor(
            processor,
            bounds="flash" in attention or attention == TORCH_VARLEN,
            dummy_frame=bool(rates.encoder or rates.projector) or self.is_sharded,
        )
        # Trainer writes its own choice for training into the configuration that is saved.
        if use_cache is None and hasattr(self.model.config, "use_cache"):
            del self.model.config.use_cache
        elif use_cache is not None:
            self.model.config.use_cache = use_cache

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are divided among processes, so that all must run every module equally often."""
        if self.is_deepspeed_enabled:
            return bool(self.accelerator.state.deepspeed_plugin.zero_stage == 3)
        return bool(self.is_fsdp_enabled)

    # ------------------------------------------------------------------ data

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        """Packed rows of this process; accelerate would share them out a second time, so it does not see them."""
        if self.train_dataset is None:
            raise ValueError("Expected a train_dataset to train on, got None.")
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            stream = OnlinePacking(
                self.train_dataset,
                **dataclasses.asdict(self.limits),
                buffer_size=self.buffer_size,
                measure=measure_sample,
            )
            max_workers = getattr(self.train_dataset, "max_workers", lambda: None)()
            return self._loader(stream, batch_size=None, max_workers=max_workers)
        self.train_sampler, self._planned = self._planned or self._plan(self.train_dataset), None
        samples = PackedSamples(self.train_dataset, self._lengths_of(self.train_dataset))
        return self._loader(samples, batch_sampler=self.train_sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader[Any]:
        """Packed rows of the held-out set, the same ones each time."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("Expected an eval_dataset to evaluate on, got None.")
        sampler = self._sampler(dataset, num_epochs=1, packs_per_update=self.args.world_size, seed=0)
        return self._loader(PackedSamples(dataset, self._lengths_of(dataset)), batch_sampler=sampler)

    def get_test_dataloader(self, test_dataset: Any) -> torch.utils.data.DataLoader[Any]:
        """Packed rows of any set, as of the held-out one."""
        return self.get_eval_dataloader(test_dataset)

    def plan_digest(self) -> str:
        """Changes when a run would read other samples, or in another order."""
        # Kept for the run that follows: planning a large set takes a while.
        sampler = self._planned = self._plan(self.train_dataset)
        state = [sampler.limits, sampler.seed, sampler.window, sampler.packs_per_update, sampler.num_packs]
        if hasattr(self.train_dataset, "fingerprint"):
            state.append(self.train_dataset.fingerprint())
        return hashlib.sha256(repr(state).encode() + sampler.lengths.tobytes()).hexdigest()

    def num_planned_updates(self) -> int | None:
        """How many updates a run makes; None for a stream without `max_steps`."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        if not hasattr(self.train_dataset, "__getitem__"):
            return None
        self._planned = self._planned or self._plan(self.train_dataset)
        updates_per_epoch = self._planned.num_packs // self._planned.packs_per_update
        return math.ceil(self.args.num_train_epochs * updates_per_epoch)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Of transformers' Trainer: a tied head is not missing."""
        tied = {name for name in load_result.missing_keys if name in self._tied_names()}
        if tied:
            missing = [name for name in load_result.missing_keys if name not in tied]
            load_result = load_result._replace(missing_keys=missing)
        super()._issue_warnings_after_load(load_result)

    def _tied_names(self) -> set[str]:
        model = self.accelerator.unwrap_model(self.model)
        return set(getattr(model, "all_tied_weights_keys", None) or {})

    def _loader(
        self, dataset: Any, *, max_workers: int | None = None, **options: Any
    ) -> torch.utils.data.DataLoader[Any]:
        workers = self.args.dataloader_num_workers
        if max_workers is not None and max_workers < workers:
            logger.warning("%d of %d workers read: the stream is in no more parts for a process", max_workers, workers)
            workers = max_workers
        return torch.utils.data.DataLoader(
            dataset,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=False,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            **options,
        )

    def _plan(self, dataset: Any) -> PackedBatchSampler:
        """The sampler of a run: with `max_steps`, as many epochs as those take."""
        packs_per_update = self.args.gradient_accumulation_steps * self.args.world_size
        num_epochs = math.ceil(self.args.num_train_epochs)
        if self.args.max_steps > 0:
            once = self._sampler(dataset, num_epochs=1, packs_per_update=packs_per_update, seed=self._seed)
            num_epochs = math.ceil(self.args.max_steps / (once.num_packs // packs_per_update))
        return self._sampler(dataset, num_epochs=num_epochs, packs_per_update=packs_per_update, seed=self._seed)

    @property
    def _seed(self) -> int:
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def _sampler(self, dataset: Any, *, num_epochs: int, packs_per_update: int, seed: int) -> PackedBatchSampler:
        return PackedBatchSampler(
            self._lengths_of(dataset),
            **dataclasses.asdict(self.limits),
            seed=seed,
            num_epochs=num_epochs,
            packs_per_update=packs_per_update,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            window=self.window,
            name=lambda index: sample_name(dataset, index),
        )

    def _lengths_of(self, dataset: Any) -> Lengths:
        if id(dataset) not in self._lengths:
            self._lengths[id(dataset)] = shared_lengths(
                dataset,
                self.args,
                folder=self.length_folder,
                num_workers=self.args.dataloader_num_workers,
                progress=self.progress,
            )
        return self._lengths[id(dataset)]

    # ------------------------------------------------------------------ steps

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One group of parameters for each module, with and without weight decay."""
        if self.optimizer is None:
            owner = self.model if model is None else model
            if self.use_muon:
                self.optimizer = MuonWithAdamW(self._groups(owner))
                return self.optimizer
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, owner)
            self.optimizer = optimizer(self._groups(owner), **options)
        return self.optimizer

    def _groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[str, bool, bool], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                by_muon = self.use_muon and is_muon_parameter(name, parameter)
                groups.setdefault((module_of(name), name in decayed, by_muon), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": getattr(self.rates, module),
                "weight_decay": self.args.weight_decay if decay else 0.0,
                "module": module,
                "muon": by_muon,
            }
            for (module, decay, by_muon), parameters in groups.items()
        ]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Rows of an update and their number of supervised tokens, at least 1 so that none gives no NaN."""
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        return samples, num_items.clamp(min=1) if isinstance(num_items, torch.Tensor) else num_items

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's loss; without a cache, which only generation needs."""
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs, with the learning rate of each module."""
        if "learning_rate" in logs and self.optimizer is not None:
            # What is logged is the first group's; one schedule scales all.
            group = self.optimizer.param_groups[0]
            factor = logs["learning_rate"] / group.get("initial_lr", getattr(self.rates, group["module"]))
            modules = sorted({group["module"] for group in self.optimizer.param_groups})
            logs = {**logs, **{f"learning_rate_{name}": factor * getattr(self.rates, name) for name in modules}}
        super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------ evaluation

    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The loss per supervised token over the whole set, on all processes.

        Args:
            dataloader: packed rows.
            description: unused, there for the common signature.
            prediction_loss_only: likewise; only the loss is computed.
            ignore_keys: likewise.
            metric_key_prefix: of the metrics' names.
        """
        model = self._model_to_evaluate()
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for batch in dataloader:
                inputs = self._prepare_inputs(batch)
                loss = model(**inputs, use_cache=False, skip_logits=True, num_items_in_batch=1).loss
                totals += torch.stack([loss, (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()]).to(totals)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        total, num_tokens = self.accelerator.reduce(totals, reduction="sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": total / max(num_tokens, 1)}
        num_samples = int((dataloader.dataset.lengths[:, 0] > 0).sum())  # type: ignore[attr-defined]
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=num_samples)

    def _model_to_evaluate(self) -> Any:
        if self.accelerator._models:
            return self.model
        model = self._wrap_model(self.model, training=False)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    # ------------------------------------------------------------------ saving

    def finish(self, checkpoint: str) -> None:
        """Takes up weights and state of a run that has made its last update; Trainer's own way would make one more.

        With `max_steps` that still happens where processes divide the model: shards are read in training only.
        """
        if self.is_sharded:
            if self.args.max_steps > 0:
                logger.warning(
                    "%s has made all updates: one more is made, since shards are read in training", checkpoint
                )
            self.train(resume_from_checkpoint=checkpoint)
            return
        self._load_from_checkpoint(checkpoint)
        state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        # The file says it of the process that wrote it.
        state.is_world_process_zero = self.is_world_process_zero()
        state.is_local_process_zero = self.is_local_process_zero()
        # Else TensorBoard would write what follows into the working directory.
        self.control = self.callback_handler.on_train_begin(self.args, state, self.control)
        self.control = self.callback_handler.on_train_end(self.args, state, self.control)
        self.state = state

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves as Trainer does; a checkpoint of shards gets configuration and processor, too.

        Args:
            output_dir: by default the run's folder.
            _internal_call: whether a checkpoint is being written.
        """
        super().save_model(output_dir, _internal_call)
        folder = output_dir or self.args.output_dir
        if self.is_sharded and self.args.should_save:
            self.accelerator.unwrap_model(self.model).config.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    def _save_rng_state(self, output_dir: str) -> None:
        """Of transformers' Trainer, just before the file with which a checkpoint counts as complete."""
        super()._save_rng_state(output_dir)
        if self.into_checkpoint is not None and self.args.should_save:
            self.into_checkpoint(output_dir)
        # The others' random states, too.
        self.accelerator.wait_for_everyone()

    def save_whole_model(self, output_dir: str) -> None:
        """Saves weights that `from_pretrained` reads, also of a model that is divided among processes."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.is_fsdp_enabled and plugin is not None:
            plugin.set_state_dict_type("FULL_STATE_DICT")
        self.save_model(output_dir)


class _Epochs(TrainerCallback):
    """Tells the sampler which epoch begins, also in a run that resumes."""

    def __init__(self, trainer: VideoLlama3Trainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sampler = self.trainer.train_sampler
        if sampler is not None:
            sampler.set_epoch(state.global_step // (sampler.num_packs // sampler.packs_per_update))


class _LastLoss(TrainerCallback):
    """Logs the last update's loss too, and that of a checkpoint: a run that resumes goes on from there."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps or control.should_save:
            control.should_log = True
