"""Real lengths of all samples, measured once and kept on disk.

A dataset enters, int64 lengths leave; how samples are packed by them is left to `packing.py`. A length is known
only after frames are decoded and pruned, so every sample is read once, by as many workers as asked for; a later
run with the same dataset reads the file. A run that ends before it has seen all rows reads no more than it needs.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..whole_files import locked
from .packing import TOKENS, Lengths

Progress = Callable[[int, int], None]
Numbers = npt.NDArray[np.int64]
# In the file, in place of the tokens of a row that was read and skipped; 0 is a row that nobody has read yet.
_SKIPPED = -1
# What was measured is kept this often, so that a killed run, or one that meets a bad row, does not begin anew.
_SECONDS_BETWEEN_FILES = 60.0
# Processes wait for the one that measures for as long as it takes.
_PATIENCE = datetime.timedelta(days=7)
# Tells the choice of rows from what else is drawn by the same seed.
_CHOICE_OF_ROWS = (0, 0, 1)


def measure_sample(sample: dict[str, torch.Tensor] | None) -> tuple[int, int, int]:
    """Tokens, patches and visual tokens before pruning of a sample; zeros for one that was skipped."""
    if sample is None:
        return 0, 0, 0
    patches = tokens = 0
    for kind in ("image", "video"):
        grids, merges = sample.get(f"{kind}_grid_thw"), sample.get(f"{kind}_merge_sizes")
        if grids is not None and merges is not None:
            patches += int(grids.prod(dim=1).sum())
            tokens += int((grids.prod(dim=1) // merges**2).sum())
    return len(sample["input_ids"]), patches, tokens


def sample_lengths(
    dataset: Any,
    *,
    folder: str | os.PathLike[str] | None,
    rows: Numbers | None = None,
    retry_skipped: bool = True,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> Lengths:
    """Lengths of a dataset's samples, from the folder if they are there, else measured and put there.

    Args:
        dataset: map-style, with a `fingerprint()` that changes whenever a length may change.
        folder: where files of lengths are kept; None measures without keeping.
        rows: int64, ascending: numbers of the rows that are read; the others get zeros, and so are in no pack. None
            reads all.
        retry_skipped: whether rows that an earlier run had to skip are read again, as their media may be there now.
        num_workers: processes that read samples; 0 reads here.
        progress: called with samples measured and their number.

    Returns:
        int64 (samples, 3): tokens, patches, visual tokens before pruning; zeros for rows that are skipped.
    """
    known = np.zeros((len(dataset), 3), dtype=np.int64)
    path = None
    if folder is not None:
        digest = hashlib.sha256(str(dataset.fingerprint()).encode()).hexdigest()[:16]
        path = Path(folder) / f"lengths-{digest}.npy"
        if path.is_file():
            known = _load(path, len(dataset))
    wanted = np.arange(len(dataset)) if rows is None else rows
    tokens = known[wanted, 0]
    missing = wanted[(tokens == 0) | (retry_skipped & (tokens == _SKIPPED))]
    if len(missing):
        _measure(dataset, missing, known, path, num_workers=num_workers, progress=progress)
    lengths: Lengths = np.zeros_like(known)
    lengths[wanted] = known[wanted].clip(min=0)
    return lengths


def shared_lengths(dataset: Any, arguments: Any, **options: Any) -> Lengths:
    """`sample_lengths`, measured by one process and the same on all: what is skipped may be there a moment later.

    Args:
        dataset: as for `sample_lengths`.
        arguments: `TrainingArguments`, which know the other processes.
        options: as for `sample_lengths`.
    """
    if arguments.world_size == 1:
        return sample_lengths(dataset, **options)
    # Made before the one measures, as all have to come together for it; in the group that computes, the others would
    # give up after half an hour.
    group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    told = [sample_lengths(dataset, **options) if arguments.process_index == 0 else None]
    torch.distributed.broadcast_object_list(told, src=0, group=group)
    torch.distributed.destroy_process_group(group)
    assert told[0] is not None
    return told[0]


def _load(path: Path, num_rows: int) -> Lengths:
    lengths: Lengths = np.load(path, allow_pickle=False)
    if lengths.shape != (num_rows, 3) or lengths.dtype != np.int64:
        raise ValueError(
            f"Expected {path} to hold int64 lengths of {num_rows} samples, got {lengths.dtype} of shape "
            f"{lengths.shape}: delete it, and it is measured again."
        )
    return lengths


def _store(path: Path, lengths: Lengths) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        if path.is_file():
            # What another run has measured meanwhile.
            others = _load(path, len(lengths))
            theirs = (lengths[:, TOKENS] <= 0) & (others[:, TOKENS] != 0)
            lengths[theirs] = others[theirs]
        # Complete or not there: a killed run leaves no half file under the final name.
        unfinished = path.with_suffix(".unfinished.npy")
        np.save(unfinished, lengths, allow_pickle=False)
        os.replace(unfinished, path)


def _measure(
    dataset: Any,
    numbers: Numbers,
    known: Lengths,
    path: Path | None,
    *,
    num_workers: int,
    progress: Progress | None,
) -> None:
    """Reads samples once and writes their lengths into `known`, and into its file now and then, and at the end."""
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        _Measured(dataset, numbers), batch_size=None, num_workers=num_workers
    )
    stored = time.monotonic()
    try:
        for i, length in enumerate(loader):
            known[numbers[i]] = length if length[0] else (_SKIPPED, 0, 0)
            if progress is not None:
                progress(i + 1, len(numbers))
            if path is not None and time.monotonic() - stored > _SECONDS_BETWEEN_FILES:
                _store(path, known)
                stored = time.monotonic()
    finally:
        # Also where a bad row ends the run.
        if path is not None:
            _store(path, known)


def rows_for(num_rows: int, wanted: int, *, seed: int) -> Numbers | None:
    """Rows of a dataset that a run of `wanted` samples reads, drawn by a seed; None where it needs them all.

    Those of a shorter run are among those of a longer one.

    Args:
        num_rows: of the dataset.
        wanted: samples.
        seed: of the choice.

    Returns:
        int64 (wanted,), ascending.
    """
    if wanted >= num_rows:
        return None
    return np.sort(np.random.default_rng([seed, *_CHOICE_OF_ROWS]).permutation(num_rows)[:wanted])


class _Measured(torch.utils.data.Dataset[tuple[int, int, int]]):
    """Lengths instead of samples, so that no pixels travel between processes."""

    def __init__(self, dataset: Any, numbers: Numbers) -> None:
        self.dataset = dataset
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        return measure_sample(self.dataset[int(self.numbers[index])])
