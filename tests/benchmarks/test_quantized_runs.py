"""The comparison of quantised answers at toy size; how many stay unchanged means something for trained weights only."""

import pytest

from tests.benchmarks.test_benchmarks_run import run_toy

pytestmark = pytest.mark.slow


def test_quantized(tmp_path):
    pytest.importorskip("torchao")
    record = run_toy("quantized", tmp_path)[0]
    sides = record["sides"]
    assert list(sides) == ["as it is", "language model in int8", "all but the head in int8"]
    assert sides["as it is"]["unchanged_percent"] == 100.0
    sizes = [side["weights_mib"] for side in sides.values()]
    assert sizes[0] > sizes[1] > sizes[2]
    assert record["reached"] == (sides["language model in int8"]["unchanged_percent"] >= 95)
    changed = round(record["setting"]["questions"] * (1 - sides["language model in int8"]["unchanged_percent"] / 100))
    assert len(record["changed"]) == changed
    assert "torchao" in record["versions"]
