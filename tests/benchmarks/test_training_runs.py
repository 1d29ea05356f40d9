"""The benchmark of training runs at toy size; its speeds mean nothing here, the equality of its sides does."""

import pytest

from tests.benchmarks.test_benchmarks_run import run_toy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return run_toy("training", tmp_path_factory.mktemp("training"))[0]


def test_all_sides_compute_the_same_update(record):
    sides = record["cases"]["tiny"]["sides"]
    assert list(sides) == ["packed", "padded", "native"]
    for side in sides.values():
        # Measured 2e-8 and 6e-8 apart in float32; attention across the samples of a row: 3e-4 and 4e-2.
        assert side["loss"] == pytest.approx(sides["packed"]["loss"], rel=1e-5)
        assert side["gradient_norm"] == pytest.approx(sides["packed"]["gradient_norm"], rel=1e-4)


def test_packed_rows_have_no_padding_and_take_equally_many_passes(record):
    sides = record["cases"]["tiny"]["sides"]
    assert sides["packed"]["positions"] == sides["packed"]["tokens"]
    assert sides["padded"]["positions"] == sides["native"]["positions"] > 2 * sides["packed"]["positions"]
    assert record["cases"]["tiny"]["floor"]["passes"] == sides["packed"]["passes"]
    assert len({(side["passes"], side["supervised"], side["patches"]) for side in sides.values()}) == 1


def test_what_is_counted_is_ordered(record):
    for ratios in record["counted_at_full_depth"].values():
        assert 1 < ratios["padded_grouped_by_length"] < ratios["padded"] < ratios["native"]
