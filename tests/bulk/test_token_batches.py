"""Greedy groups of rows within a budget of visual tokens."""

from types import SimpleNamespace

from videollama3.bulk.row_reader import FailedRow
from videollama3.bulk.token_batches import token_batches


def group(counts, *, max_tokens=100, max_rows=8):
    """Rows of so many kept tokens; None is a failed row."""
    rows = [FailedRow(None, "bad") if count is None else SimpleNamespace(num_visual_tokens=count) for count in counts]
    return [
        "failed" if isinstance(batch, FailedRow) else [row.num_visual_tokens for row in batch]
        for batch in token_batches(rows, max_tokens=max_tokens, max_rows=max_rows)
    ]


def test_the_example_of_the_docstring():
    assert group([40, 40, 60, 10]) == [[40, 40], [60], [10]]


def test_padding_counts():
    assert group([10] * 12) == [[10] * 8, [10] * 4]
    assert group([10, 10, 10, 34]) == [[10, 10, 10], [34]]
    assert group([33, 10, 10, 10]) == [[33, 10, 10], [10]]


def test_a_row_above_the_budget_is_alone():
    assert group([10, 500, 10]) == [[10], [500], [10]]


def test_rows_without_media_are_limited_by_their_number():
    assert group([0] * 7, max_rows=3) == [[0] * 3, [0] * 3, [0]]


def test_failures_pass_at_once():
    assert group([None, 10, None, 10]) == ["failed", "failed", [10, 10]]
    assert group([]) == []
