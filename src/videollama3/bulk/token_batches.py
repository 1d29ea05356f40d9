"""Read rows in order -> groups that fit the model's memory.

Rows enter as they are read; lists of rows leave, and failed rows one by one as they pass. Answering them is left to
the engines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .row_reader import FailedRow, ReadRow


def token_batches(
    rows: Iterable[ReadRow | FailedRow], *, max_tokens: int, max_rows: int
) -> Iterator[list[ReadRow] | FailedRow]:
    """Groups consecutive rows greedily.

    Rows of a batch are padded to the longest one, so padding counts: with `max_tokens` 100, rows of 40, 40, 60 and 10
    visual tokens become [40, 40], [60], [10], since 2 * 40 fits, while 3 * 60 and 2 * 60 do not. A row above the limit
    is answered alone.

    Args:
        rows: in order.
        max_tokens: of a batch: its number of rows times the most kept visual tokens of a row.
        max_rows: of a batch; rows without media take no visual tokens.

    Yields:
        A batch, or a failed row.
    """
    batch: list[ReadRow] = []
    for row in rows:
        if isinstance(row, FailedRow):
            yield row
            continue
        largest = max(item.num_visual_tokens for item in [*batch, row])
        if batch and (len(batch) == max_rows or largest * (len(batch) + 1) > max_tokens):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
