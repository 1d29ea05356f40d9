"""Text files that are there in full or not at all, however the process that writes them ends."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes beside and renames: who reads meanwhile gets what was there before.

    Args:
        path: of the file; its folder exists.
        text: the content, written as UTF-8.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
