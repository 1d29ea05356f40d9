"""The `videollama3 init` command: a checkpoint to start training from, made of an encoder and a language model.

Arguments enter, a folder and a report on standard output leave; the work is done in `initial_checkpoint.py`.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..terminal import quiet_progress_bars


def add_parser(commands: Any) -> None:
    """Adds the sub-command's parser."""
    parser = commands.add_parser("init", help="build a checkpoint to start training from")
    vision = parser.add_mutually_exclusive_group(required=True)
    vision.add_argument(
        "--vision", metavar="FOLDER_OR_REPO", help="a SigLIP, or an encoder like VL3-SigLIP-NaViT in any layout"
    )
    vision.add_argument(
        "--vision-from", metavar="FOLDER_OR_REPO", help="a whole VideoLLaMA3, whose encoder alone is taken"
    )
    parser.add_argument("--llm", required=True, metavar="FOLDER_OR_REPO", help="a Qwen2 or Qwen2.5 language model")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the new checkpoint; must not exist yet")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of all weights (default: the language model's)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the fresh weights (default 0)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Builds the checkpoint and prints what it is made of."""
    from .initial_checkpoint import build_initial_checkpoint

    quiet_progress_bars()
    report = build_initial_checkpoint(
        options.vision,
        options.llm,
        options.out,
        vision_from=options.vision_from,
        dtype=options.dtype,
        seed=options.seed,
    )
    print(report)
