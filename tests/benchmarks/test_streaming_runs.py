"""The benchmark of streaming runs at toy size; its figures mean nothing here."""

import pytest

from tests.benchmarks.test_benchmarks_run import run_toy

pytestmark = pytest.mark.slow


def test_streaming_compares_the_same_logits(tmp_path):
    record, _ = run_toy("streaming", tmp_path)
    assert list(record["cases"]) == ["2", "5"]
    for case in record["cases"].values():
        tick = case["session"]["tick"]
        assert min(tick["wall_ms"], tick["cpu_ms"]) > 0
        # Medians of parts do not add up to the median of the whole, but nearly.
        assert 0.5 * tick["cpu_ms"] < sum(case["tick_parts_ms"].values()) < 2 * tick["cpu_ms"]
        assert min(case["tick_parts_ms"].values()) > 0
        assert {side: set(ratio) for side, ratio in case["offline / second question"].items()} == {
            side: {"wall", "cpu"} for side in ("ours", "native")
        }
        # Measured 3e-7 on logits of 0.1; a frame that is missing moves them by more than 1e-3.
        assert max(case["largest logit difference from offline"].values()) < 1e-5
