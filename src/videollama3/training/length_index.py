"""Real lengths of all samples, measured once and kept on disk.

A dataset enters, int64 lengths leave; how samples are packed by them is left to `packing.py`. A length is known
only after frames are decoded and pruned, so every sample is read once, by as many workers as asked for; a later
run with the same dataset reads the file. A run that ends before it has seen all rows reads no more than it needs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .packing import Lengths

Progress = Callable[[int, int], None]
Numbers = npt.NDArray[np.int64]


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
    num_workers: int = 0,
    progress: Progress | None = None,
) -> Lengths:
    """Lengths of a dataset's samples, from the folder if they are there, else measured and put there.

    Args:
        dataset: map-style, with a `fingerprint()` that changes whenever a length may change.
        folder: where files of lengths are kept; None measures without keeping.
        rows: int64, ascending: numbers of the rows that are read; the others get zeros, and so are in no pack. None
            reads all.
        num_workers: processes that read samples; 0 reads here.
        progress: called with samples measured and their number.

    Returns:
        int64 (samples, 3): tokens, patches, visual tokens before pruning.
    """
    if folder is None:
        return measure_lengths(dataset, rows=rows, num_workers=num_workers, progress=progress)
    state = hashlib.sha256(str(dataset.fingerprint()).encode())
    if rows is not None:
        state.update(rows.tobytes())
    path = Path(folder) / f"lengths-{state.hexdigest()[:16]}.npy"
    if path.is_file():
        lengths: Lengths = np.load(path, allow_pickle=False)
        if lengths.shape != (len(dataset), 3) or lengths.dtype != np.int64:
            raise ValueError(
                f"Expected {path} to hold int64 lengths of {len(dataset)} samples, got {lengths.dtype} of shape "
                f"{lengths.shape}: delete it, and it is measured again."
            )
        return lengths
    lengths = measure_lengths(dataset, rows=rows, num_workers=num_workers, progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Complete or not there: a killed run leaves no half file under the final name.
    unfinished = path.with_suffix(f".{os.getpid()}.npy")
    np.save(unfinished, lengths, allow_pickle=False)
    os.replace(unfinished, path)
    return lengths


def measure_lengths(
    dataset: Any, *, rows: Numbers | None = None, num_workers: int = 0, progress: Progress | None = None
) -> Lengths:
    """Reads samples once and measures them; arguments and result as for `sample_lengths`."""
    numbers = np.arange(len(dataset)) if rows is None else rows
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        _Measured(dataset, numbers), batch_size=None, num_workers=num_workers
    )
    lengths: Lengths = np.zeros((len(dataset), 3), dtype=np.int64)
    for done, (number, length) in enumerate(zip(numbers, loader, strict=True), start=1):
        lengths[number] = length
        if progress is not None:
            progress(done, len(numbers))
    return lengths


def rows_for(num_rows: int, wanted: int, *, seed: int) -> Numbers | None:
    """Rows of a dataset that a run of `wanted` samples reads, drawn by a seed; None where it needs them all.

    Args:
        num_rows: of the dataset.
        wanted: samples.
        seed: of the choice.

    Returns:
        int64 (wanted,), ascending.
    """
    if wanted >= num_rows:
        return None
    return np.sort(np.random.default_rng(seed).permutation(num_rows)[:wanted])


class _Measured(torch.utils.data.Dataset[tuple[int, int, int]]):
    """Lengths instead of samples, so that no pixels travel between processes."""

    def __init__(self, dataset: Any, numbers: Numbers) -> None:
        self.dataset = dataset
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        return measure_sample(self.dataset[int(self.numbers[index])])
