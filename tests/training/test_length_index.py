"""Lengths of samples: measured as they are, once."""

import re

import numpy as np
import pytest

from videollama3.training import length_index
from videollama3.training.length_index import measure_sample, rows_for, sample_lengths

from .synthetic import IMAGE, MIXED, TEXT, VIDEO, Samples, tiny_model

# Python 3.12 warns of every fork in a process that has threads; torch has some.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def dataset():
    return Samples(tiny_model()[1], [TEXT, IMAGE, None, VIDEO, MIXED])


def test_tokens_patches_and_visual_tokens(dataset):
    lengths = sample_lengths(dataset, folder=None)
    assert lengths[:, 0].tolist() == [
        0 if s is None else len(s["input_ids"]) for s in map(dataset.__getitem__, range(5))
    ]
    # An image of 2 x 3 patches, a video of two frames of 4 x 4 patches merged 2 x 2.
    assert lengths[:, 1:].tolist() == [[0, 0], [6, 6], [0, 0], [32, 8], [38, 14]]
    assert measure_sample(None) == (0, 0, 0)


def test_workers_and_progress_change_nothing(dataset):
    seen = []
    lengths = sample_lengths(
        dataset, folder=None, num_workers=2, progress=lambda done, total: seen.append((done, total))
    )
    assert np.array_equal(lengths, sample_lengths(dataset, folder=None))
    assert seen == [(i, 5) for i in range(1, 6)]


def test_they_are_measured_once(dataset, tmp_path, monkeypatch):
    first = sample_lengths(dataset, folder=tmp_path)
    monkeypatch.setattr(Samples, "__getitem__", None)
    assert np.array_equal(sample_lengths(dataset, folder=tmp_path, retry_skipped=False), first)
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock", ".npy"}


def test_rows_that_are_not_asked_for_are_not_read(dataset, tmp_path):
    whole, read, seen = sample_lengths(dataset, folder=None), [], []
    get = Samples.__getitem__

    class Watched(Samples):
        def __getitem__(self, index):
            read.append(index)
            return get(self, index)

    watched = Watched(tiny_model()[1], [TEXT, IMAGE, None, VIDEO, MIXED])
    rows = np.array([1, 3])
    lengths = sample_lengths(
        watched, folder=tmp_path, rows=rows, progress=lambda done, total: seen.append((done, total))
    )
    assert read == [1, 3]
    assert seen == [(1, 2), (2, 2)]
    assert np.array_equal(lengths[rows], whole[rows])
    assert not lengths[[0, 2, 4]].any()
    # The others are added when they are asked for.
    assert np.array_equal(sample_lengths(watched, folder=tmp_path), whole)
    assert np.array_equal(sample_lengths(watched, folder=tmp_path, rows=rows), lengths)
    assert read == [1, 3, 0, 2, 4]


def test_a_row_that_was_skipped_is_read_again(dataset, tmp_path):
    """Its media may be there now; of several processes only one tries, so that all have the same lengths."""

    class Repaired(Samples):
        def __getitem__(self, index):
            return super().__getitem__(1 if index == 2 else index)

    for _ in range(2):
        assert sample_lengths(dataset, folder=tmp_path)[2].tolist() == [0, 0, 0]
    repaired = Repaired(tiny_model()[1], [TEXT, IMAGE, None, VIDEO, MIXED])
    assert sample_lengths(repaired, folder=tmp_path, retry_skipped=False)[2].tolist() == [0, 0, 0]
    lengths = sample_lengths(repaired, folder=tmp_path)
    assert lengths[2].tolist() == lengths[1].tolist() != [0, 0, 0]
    assert np.array_equal(sample_lengths(dataset, folder=tmp_path, retry_skipped=False), lengths)


def test_what_was_measured_before_a_bad_row_is_kept(tmp_path):
    read = []

    class Broken(Samples):
        broken = True

        def __getitem__(self, index):
            if index == 3 and self.broken:
                raise ValueError("rows.jsonl row 3: bad")
            read.append(index)
            return super().__getitem__(index)

    dataset = Broken(tiny_model()[1], [TEXT, IMAGE, None, VIDEO, MIXED])
    with pytest.raises(ValueError, match="row 3: bad"):
        sample_lengths(dataset, folder=tmp_path)
    Broken.broken = False
    sample_lengths(dataset, folder=tmp_path, retry_skipped=False)
    assert read == [0, 1, 2, 3, 4]


def test_a_killed_run_keeps_what_it_had_measured_a_while_ago(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(length_index, "_SECONDS_BETWEEN_FILES", 0.0)
    on_disk = []

    def look(done, total):
        on_disk.append([np.count_nonzero(np.load(path)[:, 0]) for path in tmp_path.glob("lengths-*.npy")])

    sample_lengths(dataset, folder=tmp_path, progress=look)
    # Before the row that was just measured is written.
    assert on_disk == [[], [1], [2], [3], [4]]


def test_runs_that_measure_at_the_same_time_keep_both(dataset, tmp_path):
    whole = sample_lengths(dataset, folder=None)

    def another(done, total):
        if done == 1:
            sample_lengths(dataset, folder=tmp_path, rows=np.array([3, 4]))

    sample_lengths(dataset, folder=tmp_path, rows=np.array([0, 1]), progress=another)
    (path,) = tmp_path.glob("lengths-*.npy")
    assert np.array_equal(np.load(path)[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])


def test_rows_are_drawn_by_a_seed():
    assert rows_for(10, 10, seed=0) is None
    rows = rows_for(1000, 100, seed=0)
    assert len(rows) == len(set(rows.tolist())) == 100
    assert (np.diff(rows) > 0).all()
    assert rows.max() > 900 > 100 > rows.min()
    assert np.array_equal(rows, rows_for(1000, 100, seed=0))
    assert not np.array_equal(rows, rows_for(1000, 100, seed=1))
    assert set(rows) < set(rows_for(1000, 120, seed=0)), "a longer run reads these and others"


def test_another_dataset_is_measured_anew(dataset, tmp_path):
    sample_lengths(dataset, folder=tmp_path)
    other = Samples(tiny_model()[1], [TEXT, IMAGE, None, VIDEO, TEXT])
    assert sample_lengths(other, folder=tmp_path)[4, 1] == 0
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_a_file_that_does_not_fit_is_named(dataset, tmp_path):
    sample_lengths(dataset, folder=tmp_path)
    (path,) = tmp_path.glob("*.npy")
    np.save(path, np.zeros((4, 3), dtype=np.int64))
    message = f"Expected {path} to hold int64 lengths of 5 samples, got int64 of shape (4, 3): delete it"
    with pytest.raises(ValueError, match=re.escape(message)):
        sample_lengths(dataset, folder=tmp_path)
