"""The `videollama3 data` command: `check` a training set without training, `show` what is learnt of a row.

Command-line arguments enter, tables, coloured text and a picture leave; the work is done in `training_dataset.py`,
`dataset_report.py` and `sample_view.py`. A file of rows is read with the options given, a recipe's data with its own
settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..loading import naming_model
from ..terminal import positive_int, progress_bar, quiet_progress_bars

if TYPE_CHECKING:
    from .dataset_report import SampleCost
    from .step_memory import StepMemory

_RANDOM_NOTICE = (
    "No --model was given: tokens are those of a tiny random model with one token per byte, so that texts count "
    "for more than they will. Pass --model FOLDER_OR_REPO for true numbers."
)
# Of a file of rows; a recipe has settings of its own.
_OPTIONS = (
    "split",
    "config_name",
    "media_root",
    "max_length",
    "overflow",
    "max_visual_tokens",
    "max_frames",
    "fps",
    "add_system_prompt",
)


def add_parser(commands: Any) -> None:
    """Adds the sub-command's parser."""
    parser = commands.add_parser("data", help="check and show training data")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    check = actions.add_parser("check", help="find bad rows and say what training will cost")
    check.add_argument("--sample", type=positive_int, metavar="N", help="measure N rows only, spread over the file")
    check.add_argument("-o", "--output", metavar="REPORT.png", help="draw the distributions")
    check.set_defaults(run=run_check)

    show = actions.add_parser("show", help="print a row as it is learnt")
    show.add_argument("--row", type=int, required=True, metavar="N", help="its number, counted from 0")
    show.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    show.set_defaults(run=run_show)

    for action in (check, show):
        action.add_argument(
            "file",
            metavar="FILE",
            help=".json or .jsonl, or what `datasets` reads; or a recipe (.yaml, or stage4, lora, ...): its data",
        )
        action.add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="settings instead of the recipe's, as for `train`"
        )
        action.add_argument("--split", help="of a dataset that is not a file (default train)")
        action.add_argument("--config-name", metavar="NAME", help="of a Hub dataset with several configurations")
        action.add_argument("--model", metavar="FOLDER_OR_REPO", help="checkpoint whose processor to use")
        action.add_argument(
            "--media-root", metavar="FOLDER", help="where relative paths start (default: FILE's folder)"
        )
        action.add_argument("--max-length", type=positive_int, metavar="N", help="tokens of a sample (default 16384)")
        action.add_argument(
            "--overflow", choices=("raise", "truncate", "skip"), help="of longer samples (default raise)"
        )
        action.add_argument(
            "--max-visual-tokens", type=positive_int, metavar="N", help="before pruning (default 10240)"
        )
        action.add_argument(
            "--max-frames", type=positive_int, metavar="N", help="of a video (default: the processor's, 180)"
        )
        action.add_argument(
            "--fps", type=float, metavar="N", help="sampled frames per second (default: the processor's, 1)"
        )
        action.add_argument(
            "--system-prompt",
            dest="add_system_prompt",
            action="store_true",
            default=None,
            help="put the released models' system prompt first",
        )
        action.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")


def run_check(options: argparse.Namespace) -> None:
    """Lists bad rows and prints the tables; of a recipe, those of its held-out rows too.

    Raises:
        ValueError: when there are bad rows.
    """
    quiet_progress_bars()
    task = _task(options, on_error="skip")
    costs, bad, count = _check(options.file, task.train, task, options)
    if costs and task.recipe is not None:
        _print_rows(task, costs)
    if costs and options.output:
        from .dataset_report import cost_picture

        picture = cost_picture(costs, task.memory)
        picture.save(options.output)
        print(f"wrote {options.output} ({picture.width} x {picture.height})")
    if task.held_out is not None:
        print()
        _, more, more_rows = _check("held out", task.held_out, task, options)
        bad, count = bad + more, count + more_rows
    if bad:
        raise ValueError(f"Expected good rows only, got {bad} bad of {count}, listed above.")


def _check(title: str, dataset: Any, task: _Task, options: argparse.Namespace) -> tuple[list[SampleCost], int, int]:
    """Costs of the rows measured, how many are bad, and how many there are; prints both."""
    from .dataset_report import cost_table, measure_cost

    with progress_bar("checking", unit="row") as progress:
        bad = dataset.check_rows(progress)
    failed = {row.name for row in bad}
    good = [i for i in range(len(dataset)) if dataset.name(i) not in failed]
    costs = []
    with progress_bar("measuring", unit="row") as progress:
        chosen = _spread(good, options.sample)
        for count, i in enumerate(chosen, start=1):
            sample = dataset[i]
            if sample is not None:
                costs.append(measure_cost(sample, dataset.row(i).kind))
            if progress is not None:
                progress(count, len(chosen))
    left_out = [row for row in dataset.skipped if row.too_long]
    bad += [row for row in dataset.skipped if not row.too_long]
    more = f", {len(left_out)} left out as too long" if left_out else ""
    print(f"{title}: {len(dataset)} rows, {len(bad)} bad{more}, {len(costs)} measured")
    if costs:
        print(cost_table(costs, task.memory))
    for row in [*left_out, *bad]:
        print(row, file=sys.stderr)
    return costs, len(bad), len(dataset)


def _print_rows(task: _Task, costs: list[SampleCost]) -> None:
    """How the recipe packs the samples measured, and what its steps hold."""
    from .dataset_report import lengths_of, rows_table
    from .step_memory import HeldMemory
    from .training_run import accumulation_steps, packing_sampler, trained_shape

    recipe = task.recipe
    lengths = lengths_of(costs)
    packs = packing_sampler(recipe, lengths).plan(0)
    rows = accumulation_steps(recipe, lengths, world_size=1)
    print(f"packed: {len(packs)} rows of at most {recipe.data.max_length} tokens; an update of one process has {rows}")
    four_bit = recipe.adapter is not None and recipe.adapter.four_bit
    held = None if four_bit else HeldMemory.of(trained_shape(recipe))
    print(rows_table(packs, costs, task.memory, held))
    if held is not None and not recipe.schedule.optimizer.startswith("adamw"):
        print(f"Moments are counted as AdamW has them; those of {recipe.schedule.optimizer} may be fewer.")
    if four_bit:
        print("What weights in 4 bits take is not estimated.")
    if not recipe.model.gradient_checkpointing:
        print("The recipe has no gradient checkpointing: its steps hold the activations of all layers, far more.")


def run_show(options: argparse.Namespace) -> None:
    """Prints one row's sequence and its counts per message."""
    from .sample_view import message_table, show_sequence

    quiet_progress_bars()
    task = _task(options, on_error="raise")
    dataset, processor = task.train, task.processor
    if not 0 <= options.row < len(dataset):
        raise ValueError(f"Expected --row from 0 to {len(dataset) - 1}, got {options.row}.")
    sample = dataset[options.row]
    if sample is None:
        raise ValueError(f"Expected a row that is trained on, got {dataset.skipped[-1]}")
    ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
    color = _use_color(options.color)
    print(show_sequence(ids, labels, processor, color=color))
    print(message_table(ids, labels, processor))
    print(f"learnt tokens are {'green' if color else 'in [[ ]]'}")


def _use_color(choice: str) -> bool:
    if choice == "auto":
        return sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return choice == "always"


@dataclasses.dataclass(frozen=True)
class _Task:
    """What is looked at: rows, the processor that reads them, the memory of a step; the recipe that says so."""

    train: Any
    held_out: Any
    processor: Any
    memory: StepMemory
    recipe: Any = None


def _task(options: argparse.Namespace, *, on_error: Any) -> _Task:
    given = {name: getattr(options, name) for name in _OPTIONS if getattr(options, name) is not None}
    if _is_recipe(options.file):
        if given or options.model is not None:
            raise ValueError(
                f"Expected settings of the recipe {options.file} as KEY=VALUE behind it (data.max_length=..., "
                f"model.path=...), got {', '.join('--' + name.replace('_', '-') for name in given) or '--model'}."
            )
        return _task_of_recipe(options, on_error=on_error)
    if options.overrides:
        raise ValueError(
            f"Expected KEY=VALUE behind a recipe only, got {options.overrides[0]!r} behind {options.file!r}, which is "
            "neither a .yaml file nor the name of a recipe."
        )
    return _task_of_file(options, given, on_error=on_error)


def _is_recipe(name: str) -> bool:
    from .recipe import recipe_names

    return name.endswith((".yaml", ".yml")) or (name in recipe_names() and not Path(name).exists())


def _task_of_recipe(options: argparse.Namespace, *, on_error: Any) -> _Task:
    from ..modeling.configuration_videollama3 import VideoLlama3Config
    from .recipe import load_recipe
    from .step_memory import ModelSize, StepMemory
    from .training_run import build_processor, open_datasets

    recipe = load_recipe(options.file, options.overrides)
    if recipe.data.streaming:
        raise ValueError(
            "Expected data that has an end to look at, got data.streaming=true: pass data.streaming=false, or a file "
            "of some of the rows."
        )
    processor = build_processor(recipe)
    read = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, on_error=on_error))
    train, held_out = open_datasets(read, processor)
    memory = StepMemory(
        ModelSize.of(VideoLlama3Config.from_pretrained(recipe.model.path)),
        bf16=recipe.schedule.precision == "bf16",
        encoder_learns=bool(recipe.rates.encoder),
    )
    return _Task(train, held_out, processor, memory, recipe)


def _task_of_file(options: argparse.Namespace, given: dict[str, Any], *, on_error: Any) -> _Task:
    from .step_memory import ModelSize, StepMemory
    from .training_dataset import TrainingDataset

    if options.model is None:
        from ..random_checkpoint import build_random

        print(_RANDOM_NOTICE, file=sys.stderr)
        network, processor = build_random()
        config = network.config
    else:
        from ..modeling.configuration_videollama3 import VideoLlama3Config
        from ..processing.processing_videollama3 import VideoLlama3Processor

        with naming_model(options.model, "--model"):
            processor = VideoLlama3Processor.from_pretrained(options.model)
            config = VideoLlama3Config.from_pretrained(options.model)
    dataset = TrainingDataset(options.file, processor, on_error=on_error, **given)
    return _Task(dataset, None, processor, StepMemory(ModelSize.of(config)))


def _spread(rows: list[int], count: int | None) -> list[int]:
    """`count` of the rows, evenly spread."""
    if count is None or count >= len(rows):
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]
