"""Running an iterator in a thread of its own, a few items ahead of whoever consumes it.

An iterator enters, the same items leave in the same order; used so that a decoder goes on while the frame
before is converted and resized.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

_END = object()


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def read_ahead(items: Iterable[Item], *, depth: int) -> Iterator[Item]:
    """Yields `items`, produced in a thread that is at most `depth` items ahead.

    An exception of the producer is raised here in its place. When the consumer stops early, the thread ends
    before this generator is closed.
    """
    buffer: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                buffer.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        iterator = iter(items)
        try:
            for item in iterator:
                if not put(item):
                    return
            put(_END)
        except BaseException as error:  # handed over, not swallowed
            put(_Failure(error))
        finally:
            # Closes what the producer opened, in the thread that opened it.
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=produce, name="videollama3-read-ahead", daemon=True)
    thread.start()
    try:
        while (item := buffer.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        stop.set()
        thread.join()
