"""Real lengths of all samples, measured once and kept on disk.

A dataset enters, int64 lengths leave; how samples are packed by them is left to `packing.py`. A length is known
only after frames are decoded and pruned, so every sample is read once, by as many workers as asked for; a later
run with the same dataset reads the file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .packing import Lengths

Progress = Callable[[int, int], None]


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
    dataset: Any, *, folder: str | os.PathLike[str] | None, num_workers: int = 0, progress: Progress | None = None
) -> Lengths:
    """Lengths of a dataset's samples, from the folder if they are there, else measured and put there.

    Args:
        dataset: map-style, with a `fingerprint()` that changes whenever a length may change.
        folder: where files of lengths are kept; None measures without keeping.
        num_workers: processes that read samples; 0 reads here.
        progress: called with samples measured and their number.

    Returns:
        int64 (samples, 3): tokens, patches, visual tokens before pruning.
    """
    if folder is None:
        return measure_lengths(dataset, num_workers=num_workers, progress=progress)
    digest = hashlib.sha256(str(dataset.fingerprint()).encode()).hexdigest()[:16]
    path = Path(folder) / f"lengths-{digest}.npy"
    if path.is_file():
        lengths: Lengths = np.load(path, allow_pickle=False)
        if lengths.shape != (len(dataset), 3) or lengths.dtype != np.int64:
            raise ValueError(
                f"Expected {path} to hold int64 lengths of {len(dataset)} samples, got {lengths.dtype} of shape "
                f"{lengths.shape}: delete it, and it is measured again."
            )
        return lengths
    lengths = measure_lengths(dataset, num_workers=num_workers, progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Complete or not there: a killed run leaves no half file under the final name.
    unfinished = path.with_suffix(f".{os.getpid()}.npy")
    np.save(unfinished, lengths, allow_pickle=False)
    os.replace(unfinished, path)
    return lengths


def measure_lengths(dataset: Any, *, num_workers: int = 0, progress: Progress | None = None) -> Lengths:
    """Reads every sample once and measures it; arguments and result as for `sample_lengths`."""
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        _Measured(dataset), batch_size=None, num_workers=num_workers
    )
    lengths: Lengths = np.zeros((len(dataset), 3), dtype=np.int64)
    for number, row in enumerate(loader):
        lengths[number] = row
        if progress is not None:
            progress(number + 1, len(lengths))
    return lengths


class _Measured(torch.utils.data.Dataset[tuple[int, int, int]]):
    """Lengths instead of samples, so that no pixels travel between processes."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        return measure_sample(self.dataset[index])
