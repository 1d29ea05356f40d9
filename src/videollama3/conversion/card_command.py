"""The `videollama3 card` command: writes the model card of a checkpoint.

A folder and options enter, the names of the written files leave; the work is done by `model_card_folder.py`.
"""

from __future__ import annotations

import argparse
from typing import Any

_KINDS = ("2B", "7B", "2B-Image", "7B-Image", "encoder", "own")


def add_parser(commands: Any) -> None:
    """Adds the sub-command's parser."""
    parser = commands.add_parser("card", help="write the model card of a checkpoint")
    parser.add_argument("folder", metavar="DIR", help="checkpoint; README.md is written into it")
    parser.add_argument(
        "--kind", choices=_KINDS, help="of which release, or own; found out where the folder leaves no doubt"
    )
    parser.add_argument("--name", metavar="FOLDER_OR_REPO", help="what the snippets load (default: the folder's name)")
    parser.add_argument("--overwrite", action="store_true", help="replace a README.md that this command did not write")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Writes the card."""
    from .model_card_folder import write_card

    for path in write_card(options.folder, kind=options.kind, name=options.name, overwrite=options.overwrite):
        print(f"wrote {path}")
