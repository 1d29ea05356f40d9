"""The benchmark of the batch command runs at toy size; its figures mean nothing here."""

import pytest

from tests.benchmarks.test_benchmarks_run import run_toy

pytestmark = pytest.mark.slow


def test_batch_gives_the_answers_of_the_loop(tmp_path):
    record, _ = run_toy("batch", tmp_path)
    assert record["same_answers"] is True
    for side in record["throughput"]["sides"].values():
        assert side["cpu_seconds"]["median"] > 0
    # The processes that read import this package, too.
    assert record["memory"]["peak"]["reading_processes_mib"] > 50
    assert record["memory"]["peak"]["model_process_mib"] > 100
