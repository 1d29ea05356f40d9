"""Files that are there in full or not at all, however the process that writes them ends, and locks beside them."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes beside and renames: who reads meanwhile gets what was there before.

    Args:
        path: of the file; its folder exists.
        text: the content, written as UTF-8.
    """
    path = Path(path)
    # A process id would not do: threads and containers share them.
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Waits until nobody else is inside with the same file, which is made; on Windows it does not wait."""
    with open(path, "ab") as file:
        try:
            import fcntl
        except ImportError:
            pass
        else:
            # Until the file is closed, or the process ends.
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
