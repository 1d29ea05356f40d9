"""Results of a run, written one line at a time, and what a later run finds of them.

Records of results enter and stand in the file when `write` returns; which rows are done leaves. Making results is
left to `local_run.py` and `ray_run.py`.

Beside `OUT` stands `OUT.run.json`, which says what the answers depend on and is locked by the run that writes. It is
written before the first result; a run that is killed leaves at most a last line without its end, which the next run
cuts off.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, BinaryIO

from ..whole_files import lock
from .input_rows import InputRows

_PENDING, _ANSWERED, _FAILED = 0, 1, 2
_BLOCK = 2**16


class ResultFile:
    """The output of a run; a context manager.

    Args:
        path: of the JSONL file; its folder is made.
        settings: everything but the rows that the answers depend on; JSON values.
        rows: the input.
        overwrite: drop what is there.
        retry_failed: drop failures, so that their rows are done again.

    Raises:
        FileExistsError: for a file that no run has written.
        RuntimeError: while another run writes it.
        ValueError: for a file that belongs to other settings or another input, or is damaged.
    """

    def __init__(
        self,
        path: str,
        settings: Mapping[str, Any],
        rows: InputRows,
        *,
        overwrite: bool = False,
        retry_failed: bool = False,
    ) -> None:
        self.path = path
        self.record_path = f"{path}.run.json"
        self._settings, self._rows = dict(settings), rows
        self._state = bytearray(len(rows))
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with contextlib.ExitStack() as stack:
            if not overwrite and _size(path) and not os.path.exists(self.record_path):
                raise FileExistsError(
                    f"Expected {path!r} to be absent or written by this command, got a file without "
                    f"{self.record_path!r} beside it: pass --overwrite, or another -o."
                )
            record = stack.enter_context(open(self.record_path, "a+b"))
            if not lock(record, wait=False):
                raise RuntimeError(
                    f"Expected {path!r} to be written by one run at a time, got another that is at work."
                )
            self._prepare(record, overwrite, retry_failed)
            self._file = stack.enter_context(open(path, "ab"))
            self._stack = stack.pop_all()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def num_answered(self) -> int:
        """Rows with an answer."""
        return self._state.count(_ANSWERED)

    @property
    def num_failed(self) -> int:
        """Rows with an error."""
        return self._state.count(_FAILED)

    def pending(self) -> Iterator[int]:
        """Numbers of the rows that are neither, ascending."""
        return (index for index, state in enumerate(self._state) if state == _PENDING)

    def write(self, result: Mapping[str, Any]) -> None:
        """Adds one result; afterwards the death of this process does not take it away."""
        # Surrogates of undecodable file names are kept as escapes.
        self._file.write(json.dumps(result).encode("ascii") + b"\n")
        self._file.flush()
        self._state[result["index"]] = _FAILED if "error" in result else _ANSWERED

    # ------------------------------------------------------------------ what is there

    def _prepare(self, record: BinaryIO, overwrite: bool, retry_failed: bool) -> None:
        if overwrite and _size(self.path):
            os.truncate(self.path, 0)
        if _size(self.path):
            self._check_settings(record)
            _cut_torn_line(self.path)
            self._read_results()
            if retry_failed and self.num_failed:
                self._drop_failures()
        else:
            # Only where there are no results yet: a record that was cut off by a kill says nothing.
            record.truncate(0)
            record.write(json.dumps(self._settings, indent=2).encode("ascii") + b"\n")
            record.flush()

    def _check_settings(self, record: BinaryIO) -> None:
        record.seek(0)
        try:
            written = json.loads(record.read())
        except ValueError as error:
            raise ValueError(
                f"Expected {self.record_path!r} as a record of this command, got {error}: pass --overwrite, or "
                "another -o."
            ) from error
        names = [name for name in {**self._settings, **written} if written.get(name) != self._settings.get(name)]
        if names:
            raise ValueError(
                f"Expected {self.path!r} to hold results of this run, got some with "
                + ", ".join(
                    f"{name} {written.get(name)!r:.80} (now {self._settings.get(name)!r:.80})" for name in names
                )
                + ": pass --overwrite to drop them, or another -o."
            )

    def _read_results(self) -> None:
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                result = self._check_result(line, number)
                self._state[result["index"]] = _FAILED if "error" in result else _ANSWERED

    def _check_result(self, line: bytes, number: int) -> dict[str, Any]:
        where = f"{self.path!r} line {number + 1}"
        try:
            result: dict[str, Any] = json.loads(line)
            index, key = result["index"], result["key"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Expected {where} as a result of this command, got {line[:80]!r}: pass --overwrite, or another -o."
            ) from error
        if not 0 <= index < len(self._rows) or key != self._rows.key(index):
            raise ValueError(
                f"Expected {where} to answer row {index} of {self._rows.name!r}, got the answer to another row "
                f"(id {result.get('id')!r}): the input is another one, or was changed otherwise than at its end. "
                "Pass --overwrite to drop the results, or another -o."
            )
        if self._state[index] != _PENDING:
            raise ValueError(f"Expected each row once in {self.path!r}, got row {index} again in line {number + 1}.")
        return result

    def _drop_failures(self) -> None:
        partial = f"{self.path}.partial"
        with open(self.path, "rb") as file, open(partial, "wb") as kept:
            for line in file:
                if "error" not in json.loads(line):
                    kept.write(line)
            kept.flush()
            os.fsync(kept.fileno())
        shutil.copymode(self.path, partial)
        os.replace(partial, self.path)
        self._state = self._state.replace(bytes([_FAILED]), bytes([_PENDING]))


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def _cut_torn_line(path: str) -> None:
    """Drops what follows the last newline: a line that a killed process began."""
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _BLOCK)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            end = start
        file.truncate(0)
