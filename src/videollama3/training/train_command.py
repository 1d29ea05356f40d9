"""The `videollama3 train` command: its arguments; the work is done in `training_run.py`.

A recipe's file and overrides enter, a line about the result leaves; many processes are started by
`accelerate launch`, see docs/finetuning.md.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from ..terminal import positive_int


def add_parser(commands: Any) -> None:
    """Adds the sub-command's parser."""
    parser = commands.add_parser(
        "train",
        help="train as a recipe says",
        description="Trains as a recipe says; see recipes/ and docs/finetuning.md.",
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="YAML file, or one that comes with the package: stage4, lora, ..."
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings instead of the recipe's, as rates.llm=1e-5"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="go on from a checkpoint folder, by default the last one in the output folder",
    )
    parser.add_argument(
        "--measure-only",
        nargs="?",
        type=positive_int,
        const=1,
        metavar="PROCESSES",
        help="measure the samples that a run of so many processes (default 1) will read, keep that, and stop",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Trains, and prints where the result is."""
    from ..terminal import progress_bar, quiet_progress_bars
    from .recipe import load_recipe
    from .training_run import run_recipe

    if isinstance(options.resume, str) and "=" in options.recipe:
        # `--resume RECIPE KEY=VALUE`: the recipe was taken for a checkpoint.
        options.overrides.insert(0, options.recipe)
        options.recipe, options.resume = options.resume, True
    elif isinstance(options.resume, str) and "=" in options.resume and not os.path.exists(options.resume):
        # `--resume KEY=VALUE`; of two that set the same, the later one counts.
        options.overrides.insert(getattr(options, "num_settings_before", len(options.overrides)), options.resume)
        options.resume = True
    quiet_progress_bars()
    recipe = load_recipe(options.recipe, options.overrides)
    with progress_bar("measuring samples", unit="sample") as progress:
        record = run_recipe(recipe, resume=options.resume, measure_for=options.measure_only, progress=progress)
    # One process of several speaks.
    if os.environ.get("RANK", "0") != "0":
        return
    if options.measure_only is not None:
        print(f"measured {record['num_train_samples']} samples; their lengths are in {recipe.output.folder}")
        return
    held_out = f", loss on held-out data {record['eval']['eval_loss']:.4f}" if record["eval"] else ""
    print(f"trained {record['num_updates']} updates, last loss {record['final_train_loss']:.4f}{held_out}")
    if record["num_skipped_samples"]:
        print(
            f"left out {record['num_skipped_samples']} samples that could not be used "
            "(`videollama3 data check` says why)"
        )
    print(f"wrote {recipe.output.folder}")
