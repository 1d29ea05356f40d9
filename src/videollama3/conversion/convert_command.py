"""The `videollama3 convert` command: a checkpoint from one layout to another.

Command-line arguments enter, a folder and a short report on standard output leave; the work is done by
`convert.py`.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..terminal import progress_bar, quiet_progress_bars


def add_parser(commands: Any) -> None:
    """Adds the sub-command's parser."""
    parser = commands.add_parser("convert", help="convert a checkpoint between the three layouts")
    parser.add_argument("source", metavar="SRC", help="folder or Hub id: a checkpoint in any layout, or an adapter")
    parser.add_argument("destination", metavar="DST", help="folder to be made")
    parser.add_argument(
        "--to",
        required=True,
        choices=("plugin", "official", "native"),
        help="this package's layout, the authors', or that of the class inside transformers",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of weights (default: unchanged)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default 5GB)")
    parser.add_argument("--base", metavar="FOLDER_OR_REPO", help="base of an adapter, if not the one that it names")
    parser.add_argument("--verify", action="store_true", help="compare logits of both sides on generated media")
    parser.add_argument("--overwrite", action="store_true", help="replace a destination that has files")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Converts and prints what was done."""
    from .convert import convert_checkpoint

    quiet_progress_bars()
    with progress_bar("converting", unit="B") as progress:
        report = convert_checkpoint(
            options.source,
            options.destination,
            to=options.to,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            base=options.base,
            verify=options.verify,
            overwrite=options.overwrite,
            progress=progress,
        )
    print(f"{options.source}: {report.source_layout} layout -> {report.layout} layout in {report.destination}")
    print(f"{report.num_tensors} tensors, {report.num_bytes / 1e6:.1f} MB in {report.num_shards} weight file(s)")
    print(f"head: {report.head}")
    if report.merged:
        print(f"adapter: merged into {report.merged} weights")
    for remark in report.remarks:
        print(f"note: {remark}")
    if report.largest_difference is not None:
        print(f"verified: logits differ by at most {report.largest_difference:.1e} of the largest one")
