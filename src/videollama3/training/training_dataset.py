"""Datasets of torch: a row's number (or the next row of a stream) -> one labelled sample.

Files, Hub ids or rows and a processor enter; dicts of tensors leave, one sample each, neither padded nor packed.
What a row means is left to `dataset_rows.py`, what is learnt to `supervised_samples.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from .dataset_rows import TrainingRow, missing_files, read_row
from .row_sources import StreamedRow, num_parts, open_rows, stream_rows
from .supervised_samples import Overflow, SampleOptions, SampleTooLongError, build_sample

logger = logging.getLogger(__name__)

# Changes when the same row gives another sample than before: lengths that others have stored are then stale.
_SAMPLE_FORMAT = 2
# Dataloader workers that can say how many rows they skipped.
_MAX_WORKERS = 1023
# What a bad row or medium raises; other errors are bugs, and are never skipped.
_BAD_ROW = (ValueError, TypeError, OSError)


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on.

    Attributes:
        name: source and number.
        reason: what was expected and what came.
        too_long: a good row that `overflow="skip"` leaves out.
    """

    name: str
    reason: str
    too_long: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class _RowReader:
    """What both datasets share: options, and one row -> one sample or a named error."""

    def __init__(
        self,
        processor: Any,
        *,
        media_root: str | os.PathLike[str] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        pixel_dtype: Literal["uint8", "float32"] = "uint8",
        max_length: int = 16384,
        overflow: Overflow = "raise",
        max_visual_tokens: int = 10240,
        stream_max_frames: int = 400,
        add_system_prompt: bool = False,
        seed: int = 0,
        max_frames: int = 180,
        fps: float | None = None,
        unpruned_share: float = 0.0,
        **processor_options: Any,
    ) -> None:
        """Keeps the options.

        Args:
            processor: a `VideoLlama3Processor`.
            media_root: folder that relative media paths start from; by default that of the file of the rows, or
                the working directory for rows from elsewhere.
            on_error: "raise", or "skip": bad rows give None, are logged, and stand in `skipped`.
            pixel_dtype: "uint8" is a quarter of the bytes; the model normalises.
            max_length: tokens of a sample, counted after pruning.
            overflow: of longer samples: "raise" counts them as bad rows, "truncate" cuts on the right, never
                inside a picture, "skip" leaves them out.
            max_visual_tokens: of a sample, before pruning.
            stream_max_frames: later frames of a streaming row are dropped.
            add_system_prompt: put the released models' system prompt first.
            seed: of the choice among stream targets.
            max_frames: of a video, spread over it.
            fps: sampled frames per second; the processor's by default.
            unpruned_share: of the rows: their videos keep all tokens where the processor prunes, so that the model
                learns to answer either way.
            processor_options: further options of the processor's call, for instance `image_merge_size`.
        """
        if on_error not in ("raise", "skip"):
            raise ValueError(f"Expected on_error 'raise' or 'skip', got {on_error!r}.")
        if overflow not in ("raise", "truncate", "skip"):
            raise ValueError(f"Expected overflow 'raise', 'truncate' or 'skip', got {overflow!r}.")
        if not 0 <= unpruned_share <= 1:
            raise ValueError(f"Expected unpruned_share between 0 and 1, got {unpruned_share}.")
        self.processor = processor
        self.media_root = None if media_root is None else os.fspath(media_root)
        self.on_error = on_error
        self.seed = seed
        self.options = SampleOptions(
            max_length=max_length,
            overflow=overflow,
            max_visual_tokens=max_visual_tokens,
            stream_max_frames=stream_max_frames,
            add_system_prompt=add_system_prompt,
            pixel_dtype=pixel_dtype,
            unpruned_share=unpruned_share,
            processor_options={"max_frames": max_frames, "fps": fps, **processor_options},
        )
        # An unknown option would make every row a bad one: it shows here, where nothing is skipped.
        processor.estimate([{"role": "user", "content": ""}], **self.options.processor_options)
        # Of this process: dataloader workers count their own.
        self.skipped: list[BadRow] = []

    def sample(
        self, name: str, read: Callable[[], TrainingRow], seed: tuple[int, int]
    ) -> dict[str, torch.Tensor] | None:
        """One sample, or None for a skipped row."""
        try:
            return build_sample(read(), self.processor, options=self.options, seed=seed)
        except _BAD_ROW as error:
            skip_length = isinstance(error, SampleTooLongError) and self.options.overflow == "skip"
            if self.on_error == "raise" and not skip_length:
                raise ValueError(f"{name}: {error}") from error
            bad = BadRow(name, str(error), too_long=skip_length)
        self.skipped.append(bad)
        logger.warning("skipped %s", bad)
        return None


class TrainingDataset(torch.utils.data.Dataset[Any]):
    """Rows by number; to be pickled, sent to dataloader workers and shuffled.

    Args:
        source: a .json, .jsonl, .parquet or .csv file, a folder or Hub id that `datasets.load_dataset` reads, a list
            of these, a loaded `datasets.Dataset`, or a list of dicts.
        processor: a `VideoLlama3Processor`.
        split: of a folder or Hub id.
        config_name: of a Hub id whose dataset has several configurations.
        options: as in `_RowReader`: `media_root`, `on_error`, `pixel_dtype`, `max_length`, `overflow`,
            `max_visual_tokens`, `stream_max_frames`, `add_system_prompt`, `seed`, `max_frames`, `fps`,
            `unpruned_share`, and options of the processor's call.
    """

    def __init__(
        self, source: Any, processor: Any, *, split: str = "train", config_name: str | None = None, **options: Any
    ) -> None:
        self.rows = open_rows(source, split=split, config_name=config_name)
        self.reader = _RowReader(processor, **options)
        if len(self.rows) == 0:
            raise ValueError(f"Expected rows in {', '.join(part.label for part in self.rows.parts)}, got none.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor] | None:
        """The tensors of row `i`.

        Returns:
            `input_ids` and `labels`, int64 (tokens,), labels unshifted and -100 where nothing is learnt, and of the
            media tensors those that the row has; None for a row that is skipped.

        Raises:
            ValueError: for a bad row, with its source, number and reason.
        """
        return self.reader.sample(self.name(i), functools.partial(self.row, i), (self.reader.seed, i))

    def name(self, i: int) -> str:
        """Source and number of row `i`, for instance "train.jsonl row 17"; rows count from 0."""
        return self.rows.name(i)

    def row(self, i: int) -> TrainingRow:
        """Row `i` in the one form, its media not opened."""
        part, number = self.rows.locate(i)
        return read_row(part[number], media_root=self.reader.media_root or part.media_root)

    @property
    def skipped(self) -> list[BadRow]:
        """Rows that this process has skipped."""
        return self.reader.skipped

    def check_rows(self, progress: Callable[[int, int], None] | None = None) -> list[BadRow]:
        """Checks every row without opening media: form, tags, answers, files that exist.

        Args:
            progress: called with (rows checked, rows).

        Returns:
            The bad rows; with on_error="raise" there are none.

        Raises:
            ValueError: with on_error="raise", listing bad rows.
        """
        bad = []
        for i in range(len(self)):
            reason = self._check_row(i)
            if reason:
                bad.append(BadRow(self.name(i), reason))
            if progress is not None:
                progress(i + 1, len(self))
        if bad and self.reader.on_error == "raise":
            shown = "; ".join(str(row) for row in bad[:10])
            more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
            raise ValueError(
                f"Expected good rows only, got {len(bad)} bad of {len(self)}: {shown}{more}. Repair them, or choose "
                "on_error='skip'."
            )
        return bad

    def _check_row(self, i: int) -> str | None:
        try:
            missing = missing_files(self.row(i))
        except _BAD_ROW as error:
            return str(error)
        return f"Expected media at existing paths, got {', '.join(missing)}." if missing else None

    def fingerprint(self) -> str:
        """Changes when a sample may: with the rows, the processor's settings and the options.

        Files count by name, size and time of change; media files do not count.
        """
        processor = self.reader.processor
        state = {
            "format": _SAMPLE_FORMAT,
            "rows": self.rows.fingerprint(),
            "media_root": self.reader.media_root,
            "seed": self.reader.seed,
            "options": dataclasses.asdict(self.reader.options),
            "image": processor.image_processor.to_dict(),
            "video": processor.video_processor.to_dict(),
            "template": processor.chat_template,
            "tokenizer": hashlib.sha256(processor.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        }
        return hashlib.sha256(json.dumps(state, sort_keys=True, default=repr).encode()).hexdigest()


class StreamingTrainingDataset(torch.utils.data.IterableDataset[Any]):
    """Rows one after the other, for what does not fit on the disk or has no length.

    Every process and every dataloader worker gets rows of its own, so whatever loads it must not share rows out
    among processes again (accelerate: `dispatch_batches=False`, `split_batches=False`, and no sharding).

    Args:
        source: as in `TrainingDataset`, or a `datasets.IterableDataset`; Hub ids and folders are streamed.
        processor: a `VideoLlama3Processor`.
        split: of a folder or Hub id.
        config_name: as in `TrainingDataset`.
        rank: of this process; that of torch.distributed by default.
        world_size: number of processes, likewise.
        options: as in `TrainingDataset`.
    """

    def __init__(
        self,
        source: Any,
        processor: Any,
        *,
        split: str = "train",
        config_name: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        **options: Any,
    ) -> None:
        self.source = source
        self.split, self.config_name = split, config_name
        self.reader = _RowReader(processor, **options)
        # Asked for here: dataloader workers do not belong to the process group.
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = rank if rank is not None else torch.distributed.get_rank() if together else 0
        self.world_size = world_size or (torch.distributed.get_world_size() if together else 1)
        # Of this process and of each of its dataloader workers, which write into the same memory.
        self._num_skipped = torch.zeros(1 + _MAX_WORKERS, dtype=torch.int64).share_memory_()
        self._current_name = ""

    @property
    def skipped(self) -> list[BadRow]:
        """Rows that this process itself has skipped; `num_skipped` counts those of its dataloader workers too."""
        return self.reader.skipped

    @property
    def num_skipped(self) -> int:
        """Rows that this process and its dataloader workers have skipped, each once in however many passes."""
        return int(self._num_skipped.sum())

    @property
    def current_name(self) -> str:
        """Source and number of the row that this process or worker read last."""
        return self._current_name

    def max_workers(self) -> int | None:
        """Workers of this process that get rows of their own: as many as shards, or rows; None: any number."""
        return num_parts(
            self.source, split=self.split, config_name=self.config_name, rank=self.rank, world_size=self.world_size
        )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """The samples of this process, skipped rows left out; tensors as in `TrainingDataset`."""
        rows = stream_rows(
            self.source, split=self.split, config_name=self.config_name, rank=self.rank, world_size=self.world_size
        )
        worker = torch.utils.data.get_worker_info()
        slot = 0 if worker is None else 1 + worker.id
        for row in rows:
            read = functools.partial(self._read, row)
            sample = self.reader.sample(row.name, read, (self.reader.seed, zlib.crc32(row.name.encode())))
            if sample is None:
                self._num_skipped[slot] = len({bad.name for bad in self.reader.skipped})
            else:
                self._current_name = row.name
                yield sample

    def _read(self, row: StreamedRow) -> TrainingRow:
        return read_row(row.read(), media_root=self.reader.media_root or row.media_root)
