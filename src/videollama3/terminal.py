"""What the sub-commands share on a terminal: progress bars that vanish in a pipe, and argument types.

Counts enter, bars on standard error leave; the commands themselves stand in `cli.py` and beside their work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def quiet_progress_bars() -> None:
    """No bars of transformers in a pipe."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


@contextmanager
def progress_bar(label: str, *, unit: str = "frame") -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal, None in a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    from huggingface_hub.utils import tqdm

    with tqdm(total=None, desc=label, unit=unit, file=sys.stderr, leave=False) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.n = done
            bar.refresh()

        yield update


def positive_int(text: str) -> int:
    """Argument type: an integer above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value
