"""Which samples share a row: best fit by their real lengths, in an order that is drawn anew every epoch.

Lengths of samples enter (see `length_index.py`), lists of sample numbers leave, one list per packed row.
Reading samples and joining their tensors is left to the dataset and to `collator.py`.

A **pack** is the samples of one row; an **update** is the packs between two steps of the optimizer, over all
processes. The plan of an epoch is one list that depends on seed, epoch, lengths and packs per update only:
neither on the number of processes (as long as the update is the same) nor on workers.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Lengths = npt.NDArray[np.int64]
# Columns of lengths: kept tokens of the row, patches and visual tokens before pruning.
TOKENS, PATCHES, VISUAL_TOKENS = 0, 1, 2
# Samples that are sorted together. Larger windows pack tighter and mix long and short samples less.
WINDOW = 4096


def as_lengths(lengths: Any) -> Lengths:
    """Brings tokens per sample, or all three columns, to int64 (samples, 3).

    Args:
        lengths: (samples,) tokens, or (samples, 3): tokens, patches, visual tokens.

    Raises:
        ValueError: for other shapes.
    """
    array: Lengths = np.asarray(lengths, dtype=np.int64)
    if array.ndim == 1:
        array = np.stack([array, np.zeros_like(array), np.zeros_like(array)], axis=1)
    if array.ndim != 2 or array.shape[1] != 3:
        raise ValueError(f"Expected lengths of shape (samples,) or (samples, 3), got {array.shape}.")
    return array


def best_fit(
    lengths: Any,
    *,
    max_length: int,
    max_patches: int | None = None,
    max_visual_tokens: int | None = None,
    name: Callable[[int], str] = str,
) -> list[list[int]]:
    """Packs samples by best fit, longest first: each goes where it leaves the least room.

    Samples of 6, 3, 5, 2 and 4 tokens into rows of 10, longest first (6, 5, 4, 3, 2):

        6 opens row 0                  row 0: 6         room 4
        5 does not fit, opens row 1    row 1: 5         room 5
        4 fits both, row 0 tighter     row 0: 6 4       room 0
        3 fits row 1                   row 1: 5 3       room 2
        2 fits row 1                   row 1: 5 3 2     room 0

    so `best_fit([6, 3, 5, 2, 4], max_length=10)` is `[[0, 4], [2, 1, 3]]`.

    Args:
        lengths: (samples,) tokens, or (samples, 3): tokens, patches and visual tokens. A sample of no tokens
            (one that was skipped) is in no row.
        max_length: tokens of a row.
        max_patches: patches of a row, that is of one pass of the vision encoder; None for no limit.
        max_visual_tokens: visual tokens of a row, before pruning; None for no limit.
        name: what a sample is called in an error.

    Returns:
        Sample numbers of each row.

    Raises:
        ValueError: naming the sample, when one alone exceeds a limit.
    """
    sizes = as_lengths(lengths)
    limits = _limits(max_length, max_patches, max_visual_tokens)
    check_fit(sizes, limits, name=name)
    rows: list[list[int]] = []
    room: list[Lengths] = []
    # (room in tokens, row), ascending: the first that fits is the tightest.
    open_rows: list[tuple[int, int]] = []
    for sample in np.argsort(-sizes[:, TOKENS], kind="stable").tolist():
        size = sizes[sample]
        if size[TOKENS] == 0:
            continue
        place = bisect.bisect_left(open_rows, (int(size[TOKENS]), -1))
        while place < len(open_rows) and (size > room[open_rows[place][1]]).any():
            place += 1
        if place == len(open_rows):
            row = len(rows)
            rows.append([])
            room.append(limits.copy())
        else:
            _, row = open_rows.pop(place)
        rows[row].append(sample)
        room[row] -= size
        if room[row][TOKENS] > 0:
            bisect.insort(open_rows, (int(room[row][TOKENS]), row))
    return rows


def _limits(max_length: int, max_patches: int | None, max_visual_tokens: int | None) -> Lengths:
    no_limit = np.iinfo(np.int64).max
    limits = [no_limit if limit is None else limit for limit in (max_length, max_patches, max_visual_tokens)]
    return np.array(limits, dtype=np.int64)


def check_fit(sizes: Lengths, limits: Lengths, *, name: Callable[[int], str] = str) -> None:
    """Raises a ValueError that names the first sample that exceeds a limit alone.

    Args:
        sizes: int64 (samples, 3).
        limits: int64 (3,).
        name: what a sample is called.
    """
    too_long = np.argwhere(sizes > limits)
    if len(too_long):
        sample, column = too_long[0].tolist()
        limit = ("max_length", "max_patches", "max_visual_tokens")[column]
        what = ("tokens", "patches", "visual tokens")[column]
        raise ValueError(
            f"Expected every sample to fit {limit}={limits[column]}, got {sizes[sample, column]} {what} in sample "
            f"{name(sample)}: raise the limit, lower max_frames or the token budget of a video, or drop the sample."
        )


class PackedBatchSampler(torch.utils.data.Sampler[list[int]]):
    """The packs that one process reads, for `DataLoader(batch_sampler=...)`.

    Every process walks the same plan: with two processes and two packs per process and update, the plan

        pack      0  1  2  3 | 4  5  6  7
        process   0  1  0  1 | 0  1  0  1

    gives the updates that one process with four packs per update would make. All processes make equally many
    steps and every sample counts once per epoch: the number of packs is brought to a multiple of the update (and
    is the same in all epochs) by dividing packs of several samples. Where there are fewer samples than places, the
    shortest pack is read again with its number inverted (`~7` for sample 7): `PackedSamples` gives it no labels.
    """

    def __init__(
        self,
        lengths: Any,
        *,
        max_length: int,
        max_patches: int | None = None,
        max_visual_tokens: int | None = None,
        seed: int = 0,
        num_epochs: int = 1,
        packs_per_update: int = 1,
        rank: int = 0,
        world_size: int = 1,
        window: int = WINDOW,
        name: Callable[[int], str] = str,
    ) -> None:
        """Plans the packs.

        Args:
            lengths: (samples,) or (samples, 3), see `best_fit`.
            max_length: tokens of a row.
            max_patches: patches of a row.
            max_visual_tokens: visual tokens of a row, before pruning.
            seed: of the order.
            num_epochs: epochs that will be asked for; their plans get equally many packs.
            packs_per_update: packs of all processes between two steps of the optimizer.
            rank: number of this process.
            world_size: number of processes.
            window: samples that are packed together.
            name: what a sample is called in an error.

        Raises:
            ValueError: when a sample alone exceeds a limit, when there is no sample, or when the processes
                cannot share an update evenly.
        """
        if packs_per_update % world_size:
            raise ValueError(
                f"Expected packs_per_update as a multiple of {world_size} processes, got {packs_per_update}."
            )
        self.lengths = as_lengths(lengths)
        self.limits: dict[str, Any] = {
            "max_length": max_length,
            "max_patches": max_patches,
            "max_visual_tokens": max_visual_tokens,
        }
        self.seed, self.window, self.packs_per_update = seed, window, packs_per_update
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.num_samples = int((self.lengths[:, TOKENS] > 0).sum())
        if not self.num_samples:
            raise ValueError(f"Expected at least one sample to pack, got none of {len(self.lengths)} (all skipped).")
        check_fit(self.lengths, _limits(**self.limits), name=name)
        longest = max(len(self._pack(epoch)) for epoch in range(max(1, num_epochs)))
        self.num_packs = math.ceil(longest / packs_per_update) * packs_per_update
        self._planned: tuple[int, list[list[int]]] | None = None

    def __len__(self) -> int:
        """Packs of this process in an epoch."""
        return self.num_packs // self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        """Sample numbers of each pack of this process."""
        return iter(self.plan(self.epoch)[self.rank :: self.world_size])

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration reads."""
        self.epoch = epoch

    def plan(self, epoch: int) -> list[list[int]]:
        """The packs of all processes in an epoch, in order."""
        if self._planned is None or self._planned[0] != epoch:
            packs = self._divide(self._pack(epoch))
            order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(packs))
            packs = [packs[i] for i in order.tolist()]
            shortest = min(packs, key=self._tokens)
            packs += [[~sample for sample in shortest]] * (self.num_packs - len(packs))
            self._planned = (epoch, packs)
        return self._planned[1]

    def _pack(self, epoch: int) -> list[list[int]]:
        # Rows that were skipped or not read would leave windows with few samples.
        present = np.flatnonzero(self.lengths[:, TOKENS])
        order = np.random.default_rng([self.seed, epoch, 0]).permutation(present)
        packs: list[list[int]] = []
        for start in range(0, len(order), self.window):
            samples = order[start : start + self.window]
            rows = best_fit(self.lengths[samples], **self.limits)
            packs += [samples[row].tolist() for row in rows]
        return packs

    def _divide(self, packs: list[list[int]]) -> list[list[int]]:
        """Halves the longest packs of several samples until there are enough, or only single samples are left."""
        packs = sorted(packs, key=self._tokens, reverse=True)
        while len(packs) < self.num_packs:
            place = next((i for i, pack in enumerate(packs) if len(pack) > 1), None)
            if place is None:
                return packs
            pack = packs.pop(place)
            packs += [pack[::2], pack[1::2]]
        return packs

    def _tokens(self, pack: list[int]) -> int:
        return int(self.lengths[pack, TOKENS].sum())


class PackedSamples(torch.utils.data.Dataset[Any]):
    """A dataset as `PackedBatchSampler` asks for it: numbers may be inverted, and lengths must be as measured."""

    def __init__(self, dataset: Any, lengths: Any) -> None:
        """Wraps a map-style dataset of samples.

        Args:
            dataset: gives dictionaries of tensors, see `collator.py`.
            lengths: (samples,) or (samples, 3), as packed.
        """
        self.dataset = dataset
        self.lengths = as_lengths(lengths)

    def __len__(self) -> int:
        """Samples of the dataset."""
        return len(self.lengths)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """A sample; of an inverted number, without labels.

        Raises:
            ValueError: when the sample's length is not the one it was packed with.
        """
        index = ~number if number < 0 else number
        sample: dict[str, torch.Tensor] | None = self.dataset[index]
        num_tokens = 0 if sample is None else len(sample["input_ids"])
        if sample is None or num_tokens != self.lengths[index, TOKENS]:
            raise ValueError(
                f"Expected sample {sample_name(self.dataset, index)} to have the {self.lengths[index, TOKENS]} tokens "
                f"it was measured with, got {num_tokens}: its media changed since; delete the measured lengths "
                "(length_index in the output folder) and start again."
            )
        if number < 0:
            sample = {**sample, "labels": torch.full_like(sample["labels"], -100)}
        return sample


def sample_name(dataset: Any, index: int) -> str:
    """What the dataset calls a sample, else its number."""
    return str(dataset.name(index)) if hasattr(dataset, "name") else str(index)


class OnlinePacking(torch.utils.data.IterableDataset[list[Any]]):
    """Packs a stream of samples whose lengths nobody knows before, without end.

    It holds `buffer_size` samples; a pack begins with the one that has waited longest and takes the longest that
    still fits until none does. A stream that ends begins again (with `set_epoch`, where it has that), so that no
    process stops before the others: give `max_steps`. A run that resumes reads the stream again up to where it was.
    """

    def __init__(
        self,
        stream: Iterable[Any],
        *,
        max_length: int,
        max_patches: int | None = None,
        max_visual_tokens: int | None = None,
        buffer_size: int = 64,
        measure: Callable[[Any], Sequence[int]],
    ) -> None:
        """Wraps a stream.

        Args:
            stream: of samples; None for one that was skipped. Its `current_name`, where it has one, names the sample
                that it gave last.
            max_length: tokens of a row.
            max_patches: patches of a row.
            max_visual_tokens: visual tokens of a row, before pruning.
            buffer_size: samples held in memory in each worker.
            measure: gives tokens, patches and visual tokens of a sample.
        """
        self.stream, self.buffer_size, self.measure = stream, buffer_size, measure
        self.limits = _limits(max_length, max_patches, max_visual_tokens)

    def __iter__(self) -> Iterator[list[Any]]:
        """Packs: lists of samples.

        Raises:
            ValueError: when a sample alone exceeds a limit, or the stream has no sample.
        """
        samples = self._samples()
        buffer: list[tuple[Lengths, Any]] = []
        while True:
            while len(buffer) < self.buffer_size:
                buffer.append(next(samples))
            room = self.limits.copy()
            pack = []
            place: int | None = 0
            while place is not None:
                size, sample = buffer.pop(place)
                pack.append(sample)
                room -= size
                fitting = [i for i, (other, _) in enumerate(buffer) if (other <= room).all()]
                place = max(fitting, key=lambda i: int(buffer[i][0][TOKENS]), default=None)
            yield pack

    def _samples(self) -> Iterator[tuple[Lengths, Any]]:
        epoch = 0
        while True:
            if hasattr(self.stream, "set_epoch"):
                self.stream.set_epoch(epoch)
            count = 0
            for number, sample in enumerate(self.stream):
                if sample is None:
                    continue
                size: Lengths = np.array(self.measure(sample), dtype=np.int64)
                position = getattr(self.stream, "current_name", f"number {number} of the stream")
                check_fit(size[None], self.limits, name=lambda _, position=position: position)  # type: ignore[misc]
                count += 1
                yield size, sample
            if not count:
                raise ValueError("Expected a stream with at least one sample for each worker, got none.")
            epoch += 1
