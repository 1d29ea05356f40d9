"""Files that are there in full or not at all, however the process that writes them ends, and locks beside them."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO


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
    """Waits until nobody else is inside with the same file, which is made; without locks it does not wait."""
    with open(path, "ab") as file:
        lock(file, wait=True)
        yield


def lock(file: IO[bytes], *, wait: bool) -> bool:
    """Locks an open file until it is closed, or the process ends.

    Args:
        file: whose lock it is.
        wait: until another process gives it up.

    Returns:
        False where another process has it; True otherwise, also on Windows and on disks that know no such locks
        (Lustre and NFS as some mount them), where two at once are the user's own care.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
    return True
