"""Processes that read rows ahead of the model.

Rows enter in order; the same rows, read, leave in the same order. At most `ahead` rows wait, so that memory does not
grow with the input; grouping them is left to `token_batches.py`.

One row is with one process at a time. So a decoder that crashes on a damaged file takes down its process only, and
the file is known: it becomes a failed row, and a new process takes over.
"""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import signal
import threading
import traceback
from collections.abc import Generator, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from .input_rows import BulkRow
from .row_reader import FailedRow, ReadRow, RowReader, use_one_thread

# What a crash inside a decoder looks like. A process killed from outside (out of memory) is not among these.
_CRASHES = (
    signal.SIGSEGV,
    signal.SIGABRT,
    signal.SIGFPE,
    signal.SIGILL,
    *([signal.SIGBUS] if hasattr(signal, "SIGBUS") else []),
)
# How often a reader that waits looks whether it is to stop.
_POLL_SECONDS = 0.5
_SECONDS_TO_END = 5


@dataclasses.dataclass(frozen=True)
class _Fault:
    """An error in a process that is no fault of a medium: its last line, and all of its traceback."""

    summary: str
    report: str


@dataclasses.dataclass
class _Worker:
    process: Any
    connection: Connection
    row: BulkRow | None = None


class ReadingPool:
    """Reads rows in processes of its own.

    Args:
        reader: what reads a row; pickled once per process.
        num_workers: how many processes.
        ahead: how many rows may be in work or wait.
    """

    def __init__(self, reader: RowReader, *, num_workers: int, ahead: int) -> None:
        self._reader, self._ahead = reader, max(ahead, num_workers)
        self._num_workers = num_workers
        self._closing = threading.Event()
        self._context = _context()

    def close(self) -> None:
        """Makes `read` end soon, from another thread."""
        self._closing.set()

    def read(self, rows: Iterable[BulkRow]) -> Generator[ReadRow | FailedRow, None, None]:
        """Yields every row in order.

        Raises:
            RuntimeError: naming the row, where reading failed otherwise than through its media.
        """
        workers: list[_Worker] = []
        try:
            yield from self._read(iter(rows), workers)
        finally:
            for worker in workers:
                _end(worker)

    def _read(self, rows: Iterator[BulkRow], workers: list[_Worker]) -> Iterator[ReadRow | FailedRow]:
        order: list[int] = []
        finished: dict[int, ReadRow | FailedRow] = {}
        upcoming = next(rows, None)
        while not self._closing.is_set():
            while upcoming is not None and len(order) < self._ahead and self._hand_out(upcoming, workers):
                order.append(upcoming.index)
                upcoming = next(rows, None)
            if not order:
                return
            if order[0] in finished:
                yield finished.pop(order.pop(0))
                continue
            for worker in self._ready(workers):
                item = _receive(worker)
                finished[item.row.index] = item
                if worker.connection.closed:
                    workers.remove(worker)

    def _hand_out(self, row: BulkRow, workers: list[_Worker]) -> bool:
        """Gives a row to a process that has none, a new one if need be; False where all are at work."""
        worker = self._idle(workers)
        if worker is None:
            return False
        worker.row = row
        try:
            worker.connection.send(row)
        except (BrokenPipeError, ConnectionResetError):
            raise _died(worker, row) from None
        return True

    def _idle(self, workers: list[_Worker]) -> _Worker | None:
        for worker in workers:
            if worker.row is None:
                return worker
        if len(workers) == self._num_workers:
            return None
        workers.append(self._start())
        return workers[-1]

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._reader), name="read-rows", daemon=True)
        process.start()
        # Else the end of the process would not end the connection.
        theirs.close()
        return _Worker(process, ours)

    def _ready(self, workers: list[_Worker]) -> list[_Worker]:
        busy = {worker.connection: worker for worker in workers if worker.row is not None}
        return [busy[connection] for connection in wait(list(busy), timeout=_POLL_SECONDS)]  # type: ignore[index]


def _receive(worker: _Worker) -> ReadRow | FailedRow:
    row = worker.row
    assert row is not None
    try:
        item = worker.connection.recv()
    except (EOFError, OSError) as error:
        # Without a number: it ended in the middle of a message.
        if isinstance(error, OSError) and error.errno not in (None, errno.ECONNRESET):
            raise
        return _after_death(worker, row)
    if isinstance(item, _Fault):
        raise RuntimeError(f"Reading row {row.index} ({row.id}) failed: {item.summary}") from RuntimeError(item.report)
    worker.row = None
    return item


def _after_death(worker: _Worker, row: BulkRow) -> FailedRow:
    """A crash is the medium's fault; another end is not."""
    worker.connection.close()
    worker.process.join()
    if -worker.process.exitcode not in _CRASHES:
        raise _died(worker, row)
    name = signal.Signals(-worker.process.exitcode).name
    return FailedRow(row, f"The decoding process crashed ({name}) while it read this row.")


def _died(worker: _Worker, row: BulkRow) -> RuntimeError:
    worker.process.join()
    return RuntimeError(
        f"The process that was to read row {row.index} ({row.id}) ended with exit status {worker.process.exitcode}. "
        "If memory ran out (-9), use fewer --workers, or lower --max-frames or --max-visual-tokens."
    )


def _end(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.terminate()
    worker.process.join(_SECONDS_TO_END)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


def _work(connection: Connection, reader: RowReader) -> None:
    """The process: reads rows until the other end is gone."""
    # Ctrl-C goes to the whole terminal; the process that started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    use_one_thread()
    while True:
        try:
            row = connection.recv()
        except (EOFError, OSError):
            # Reset where the other end had not read all, as after Ctrl-C.
            return
        try:
            item: ReadRow | FailedRow | _Fault = reader.read(row)
        except BaseException as error:  # handed over, not swallowed
            item = _Fault(traceback.format_exception_only(error)[-1].strip(), traceback.format_exc())
        try:
            connection.send(item)
        except (BrokenPipeError, ConnectionResetError):
            return


def _context() -> Any:
    """Processes that share what they import, where there are such; never a fork of this process and its threads."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
