"""A folder that appears whole or not at all.

The path of the folder to be made enters; a folder beside it, to be filled, leaves and takes the path's place when
all is written. What is written into it is left to the caller.

Beside `DST` a run of process 123 uses `DST.partial-123`, and with overwriting `DST.replaced-123` for the moment
between two renames. A later run removes what killed ones left, and says so.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .weights import sync


@contextmanager
def partial_folder(
    destination: str, *, overwrite: bool = False, say: Callable[[str], None] | None = None
) -> Iterator[str]:
    """Gives a folder to fill, and renames it to `destination` if all went well; otherwise removes it.

    Args:
        destination: the folder to be made; must be absent or empty unless `overwrite`.
        overwrite: whether a folder there is replaced, at the very end.
        say: told about leftovers of killed runs.

    Yields:
        The path of an empty folder beside `destination`.

    Raises:
        FileExistsError: where the destination has files and `overwrite` is false, or is no folder.
    """
    destination = os.path.abspath(destination)
    _clean_up(destination, say or (lambda message: None))
    _check_destination(destination, overwrite)
    os.makedirs(os.path.dirname(destination), exist_ok=True)
    partial = f"{destination}.partial-{os.getpid()}"
    os.mkdir(partial)
    try:
        yield partial
        _take_place(partial, destination, overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_destination(destination: str, overwrite: bool) -> None:
    if os.path.islink(destination) or (os.path.exists(destination) and not os.path.isdir(destination)):
        raise FileExistsError(f"Expected {destination!r} to be a folder or absent, got a file or a link.")
    if os.path.isdir(destination) and os.listdir(destination) and not overwrite:
        raise FileExistsError(
            f"Expected {destination!r} to be absent or empty, it has files: choose another, or pass --overwrite to "
            "convert."
        )


def _take_place(partial: str, destination: str, overwrite: bool) -> None:
    _sync_folder(partial)
    # Once more: somebody may have filled it meanwhile.
    _check_destination(destination, overwrite)
    replaced = f"{destination}.replaced-{os.getpid()}"
    if os.path.isdir(destination):
        if overwrite:
            os.rename(destination, replaced)
        else:
            # Fails where it has files at this very moment.
            os.rmdir(destination)
    os.rename(partial, destination)
    _sync_path(os.path.dirname(destination))
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_folder(folder: str) -> None:
    """Puts a folder's files and names on the disk."""
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.isfile(path) and not os.path.islink(path):
            _sync_path(path)
    _sync_path(folder)


def _sync_path(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def _clean_up(destination: str, say: Callable[[str], None]) -> None:
    parent, base = os.path.split(destination)
    for name in sorted(os.listdir(parent)) if os.path.isdir(parent) else ():
        found = re.fullmatch(rf"{re.escape(base)}\.(partial|replaced)-(\d+)", name)
        if found is None or _is_running(int(found[2])):
            continue
        path = os.path.join(parent, name)
        if found[1] == "replaced" and not os.path.exists(destination):
            say(f"put {destination} back, which a killed run had moved aside")
            os.rename(path, destination)
        else:
            say(f"removed {path}, left by a killed run")
            shutil.rmtree(path)


def _is_running(process_id: int) -> bool:
    """Whether another process has this id; our own cannot have left anything."""
    if process_id == os.getpid():
        return False
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
