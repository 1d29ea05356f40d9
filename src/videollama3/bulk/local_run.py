"""Rows -> results on this machine: processes that read, one engine that answers.

Rows enter, records of results leave as they are ready; writing them is left to `result_file.py`, many machines to
`ray_run.py`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from typing import Any

from ..processing.read_ahead import ReadAhead
from .engines import Answer, Engine, EngineSettings
from .input_rows import BulkRow
from .reading_pool import ReadingPool
from .row_reader import FailedRow, ReadRow, RowReader
from .token_batches import token_batches

Result = dict[str, Any]
# Rows that are read or wait, per process that reads, beside those of the batch that is being filled.
_AHEAD_PER_WORKER = 3


def run_locally(
    rows: Iterable[BulkRow],
    reader: RowReader,
    settings: EngineSettings,
    *,
    num_workers: int,
    max_batch_tokens: int,
    max_batch_rows: int,
) -> Generator[Result, None, None]:
    """Answers rows.

    Args:
        rows: in order; taken as they are needed.
        reader: of the same checkpoint as `settings`.
        settings: of the engine; the model is loaded while the first rows are read.
        num_workers: processes that read.
        max_batch_tokens: see `token_batches`.
        max_batch_rows: likewise.

    Yields:
        One record per row: failures as they are met, answers in the order of the rows.

    Raises:
        RuntimeError: where something else than a medium failed.
    """
    pool = ReadingPool(reader, num_workers=num_workers, ahead=_AHEAD_PER_WORKER * num_workers)
    # The thread hands the processes their next rows while the model works.
    read = ReadAhead(pool.read(rows), depth=num_workers)
    try:
        engine = settings.build(reader)
        for batch in token_batches(read, max_tokens=max_batch_tokens, max_rows=max_batch_rows):
            yield from [failure(batch)] if isinstance(batch, FailedRow) else answer(engine, batch)
    finally:
        pool.close()
        read.close()


def answer(engine: Engine, batch: list[ReadRow]) -> list[Result]:
    """Records of one batch; its seconds are shared out evenly."""
    start = time.perf_counter()
    answers = engine.answer(batch)
    seconds = (time.perf_counter() - start) / len(batch)
    results = []
    for read, said in zip(batch, answers, strict=True):
        if not isinstance(said, Answer):
            results.append(failure(FailedRow(read.row, said.reason, read.read_seconds)))
            continue
        record = {
            "answer": said.text,
            "finished": said.finished,
            "num_new_tokens": said.num_new_tokens,
            "num_visual_tokens": read.num_visual_tokens,
            "read_seconds": round(read.read_seconds, 4),
            "answer_seconds": round(seconds, 4),
        }
        results.append({**_asked(read.row), **record, "key": read.row.key})
    return results


def failure(failed: FailedRow) -> Result:
    """The record of a row without an answer."""
    record = {"error": failed.reason, "read_seconds": round(failed.read_seconds, 4)}
    return {**_asked(failed.row), **record, "key": failed.row.key}


def _asked(row: BulkRow) -> Result:
    return {"index": row.index, "id": row.id, "media": list(row.media), "prompt": row.prompt}
