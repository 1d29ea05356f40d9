"""Copies the trained demonstrator into the package.

A folder that `videollama3 train` wrote and the reports of its evaluation enter; the folder of the package leaves with
the weights in bfloat16, the tokenizer, the settings and the card, without the copies of the code that Hub folders
carry.

    python -m demonstrator.install FOLDER REPORT.json [WATCHING.json]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from videollama3.conversion.partial_folder import partial_folder

from .card import render_card

TARGET = Path(__file__).parents[1] / "src" / "videollama3" / "demonstrator_checkpoint"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "training_record.json",
)
MAX_BYTES = 16 * 2**20


def install(source: Path, card: str, target: Path = TARGET) -> int:
    """Copies the checkpoint.

    Args:
        source: folder of the last stage.
        card: text of its README.md.
        target: is replaced.

    Returns:
        Bytes written.

    Raises:
        ValueError: when it is larger than a package may carry.
    """
    # The one before stays until this one is whole.
    with partial_folder(str(target), overwrite=True) as beside:
        folder = Path(beside)
        for name in FILES:
            shutil.copyfile(source / name, folder / name)
        for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
            _without_remote_code(folder / name)
        (folder / "README.md").write_text(card, encoding="utf-8")
        size = sum(path.stat().st_size for path in folder.iterdir())
        if size > MAX_BYTES:
            raise ValueError(f"Expected at most {MAX_BYTES} bytes in {source}, got {size}.")
    return size


def _without_remote_code(path: Path) -> None:
    """Takes the names of code files out: the package that carries the checkpoint has that code."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        part.pop("auto_map", None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Copies, and says how much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("watching", type=Path, nargs="?")
    options = parser.parse_args()
    report, watching = (
        None if path is None else json.loads(path.read_text(encoding="utf-8"))
        for path in (options.report, options.watching)
    )
    print(f"wrote {TARGET}: {install(options.folder, render_card(report, watching)) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
