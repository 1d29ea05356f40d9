"""The benchmark of video input runs at toy size; its figures mean nothing here."""

import pytest

from tests.benchmarks.test_benchmarks_run import run_toy

pytestmark = pytest.mark.slow


def test_video_input_measures_ours_and_the_floor(tmp_path):
    record, _ = run_toy("video_input", tmp_path)
    assert list(record["cases"]) == ["4 s 96x64"]
    for case in record["cases"].values():
        assert {"ours", "ours_uint8", "everything", "floor"} <= set(case["sides"])
        sizes = {side: values["output_mib"] for side, values in case["sides"].items()}
        assert sizes["ours"] == sizes["everything"] == 4 * sizes["ours_uint8"] > 0
        assert "ours / floor" in case["ratios"]
        assert set(case["cpu_seconds_of_steps"]) == {"demux", "decode", "to RGB", "resize", "patches"}
