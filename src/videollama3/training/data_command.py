"""The `videollama3 data` command: `check` a training set without training, `show` what is learnt of a row.

Command-line arguments enter, tables, coloured text and a picture leave; the work is done in `training_dataset.py`,
`dataset_report.py` and `sample_view.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from ..terminal import positive_int, progress_bar, quiet_progress_bars

_RANDOM_NOTICE = (
    "No --model was given: tokens are those of a tiny random model with one token per byte, so that texts count "
    "for more than they will. Pass --model FOLDER_OR_REPO for true numbers."
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
        action.add_argument("file", metavar="FILE", help=".json or .jsonl, or what `datasets` reads")
        action.add_argument("--split", default="train", help="of a dataset that is not a file (default train)")
        action.add_argument("--config-name", metavar="NAME", help="of a Hub dataset with several configurations")
        action.add_argument("--model", metavar="FOLDER_OR_REPO", help="checkpoint whose processor to use")
        action.add_argument(
            "--media-root", metavar="FOLDER", help="where relative paths start (default: FILE's folder)"
        )
        action.add_argument("--max-length", type=positive_int, default=16384, metavar="N", help="tokens of a sample")
        action.add_argument(
            "--overflow",
            choices=("raise", "truncate", "skip"),
            default="raise",
            help="of longer samples (default raise)",
        )
        action.add_argument(
            "--max-visual-tokens", type=positive_int, default=10240, metavar="N", help="before pruning"
        )
        action.add_argument("--max-frames", type=positive_int, default=180, metavar="N", help="of a video")
        action.add_argument("--fps", type=float, metavar="N", help="sampled frames per second (default 1)")
        action.add_argument(
            "--system-prompt", action="store_true", help="put the released models' system prompt first"
        )
        action.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")


def run_check(options: argparse.Namespace) -> None:
    """Lists bad rows and prints the table.

    Raises:
        ValueError: when there are bad rows.
    """
    from .dataset_report import cost_picture, cost_table, measure_cost

    quiet_progress_bars()
    processor, size = _load(options.model)
    dataset = _dataset(options, processor, on_error="skip")
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
    print(f"{options.file}: {len(dataset)} rows, {len(bad)} bad{more}, {len(costs)} measured")
    if costs:
        print(cost_table(costs, size))
    if costs and options.output:
        picture = cost_picture(costs, size)
        picture.save(options.output)
        print(f"wrote {options.output} ({picture.width} x {picture.height})")
    for row in [*left_out, *bad]:
        print(row, file=sys.stderr)
    if bad:
        raise ValueError(f"Expected good rows only, got {len(bad)} bad of {len(dataset)}, listed above.")


def run_show(options: argparse.Namespace) -> None:
    """Prints one row's sequence and its counts per message."""
    from .sample_view import message_table, show_sequence

    quiet_progress_bars()
    processor, _ = _load(options.model)
    dataset = _dataset(options, processor, on_error="raise")
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


def _dataset(options: argparse.Namespace, processor: Any, *, on_error: Any) -> Any:
    from .training_dataset import TrainingDataset

    return TrainingDataset(
        options.file,
        processor,
        split=options.split,
        config_name=options.config_name,
        media_root=options.media_root,
        on_error=on_error,
        max_length=options.max_length,
        overflow=options.overflow,
        max_visual_tokens=options.max_visual_tokens,
        max_frames=options.max_frames,
        fps=options.fps,
        add_system_prompt=options.system_prompt,
    )


def _load(model: str | None) -> tuple[Any, Any]:
    """The processor, and the size of the model that it belongs to."""
    from .dataset_report import ModelSize

    if model is None:
        from ..random_checkpoint import build_random

        print(_RANDOM_NOTICE, file=sys.stderr)
        network, processor = build_random()
        return processor, ModelSize.of(network.config)
    from ..modeling.configuration_videollama3 import VideoLlama3Config
    from ..processing.processing_videollama3 import VideoLlama3Processor

    processor = VideoLlama3Processor.from_pretrained(model)
    return processor, ModelSize.of(VideoLlama3Config.from_pretrained(model))


def _spread(rows: list[int], count: int | None) -> list[int]:
    """`count` of the rows, evenly spread."""
    if count is None or count >= len(rows):
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]
