"""Running an iterator in a thread of its own, a few items ahead of whoever consumes it.

An iterator enters, the same items leave in the same order; used so that a decoder goes on while the frame
before is converted and resized.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

_END = object()


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class ReadAhead(Iterator[Item]):
    """Yields items that a thread produces, at most `depth` of them ahead.

    The thread starts at once. An exception of the producer is raised in its place. `close` ends the thread and
    waits for it; it must be called by whoever stops early, and does no harm afterwards.

    Args:
        items: what to produce; a generator is closed in the thread that ran it.
        depth: how many finished items may wait.
    """

    def __init__(self, items: Iterable[Item], *, depth: int) -> None:
        self._buffer: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._produce, args=(items,), name="videollama3-read-ahead", daemon=True
        )
        self._thread.start()

    def __next__(self) -> Item:
        if self._stop.is_set():
            raise StopIteration
        item = self._buffer.get()
        if item is _END or isinstance(item, _Failure):
            self.close()
            if isinstance(item, _Failure):
                raise item.error
            raise StopIteration
        return item

    def close(self) -> None:
        """Ends the thread; items that wait are dropped."""
        self._stop.set()
        # Makes room for a producer that waits to hand over its item.
        with contextlib.suppress(queue.Empty):
            self._buffer.get_nowait()
        self._thread.join()

    def _produce(self, items: Iterable[Item]) -> None:
        iterator = iter(items)
        try:
            for item in iterator:
                self._buffer.put(item)
                if self._stop.is_set():
                    return
            self._buffer.put(_END)
        except BaseException as error:  # handed over, not swallowed
            self._buffer.put(_Failure(error))
        finally:
            # Closes what the producer opened, in the thread that opened it.
            close = getattr(iterator, "close", None)
            if close is not None:
                close()
