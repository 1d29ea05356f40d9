"""Where rows come from: JSON and JSONL files, and what `datasets` reads.

Paths, Hub ids, lists of rows or loaded datasets enter; sequences of rows with a name for each leave. What a row
means is left to `dataset_rows.py`.

Local JSON goes through a reader of our own, since `datasets` wants one schema for all rows, and conversations have
none: content is text here and a list there. A JSONL file stays on disk; only the places of its lines are held.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_JSON_SUFFIXES = (".json", ".jsonl")
# Other files, and which builder of `datasets` reads them.
_TABLES = {".parquet": "parquet", ".csv": "csv"}
# What names a file; everything else is a folder or a Hub id.
FILE_SUFFIXES = (*_JSON_SUFFIXES, *_TABLES)


class JsonLines:
    """Rows of a JSONL file, read from disk one at a time.

    Args:
        path: of the file; empty lines are no rows.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.label = os.path.basename(path)
        self.media_root: str | None = os.path.dirname(os.path.abspath(path))
        _check_begins_with_a_row(path)
        self._offsets = _line_offsets(path)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, i: int) -> Any:
        with open(self.path, "rb") as file:
            file.seek(int(self._offsets[i]))
            return _parse(file.readline(), "the row")

    def fingerprint(self) -> str:
        """Changes when the file does."""
        return _file_state(self.path)


class JsonArray:
    """Rows of a JSON file that holds one list.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.label = os.path.basename(path)
        self.media_root: str | None = os.path.dirname(os.path.abspath(path))
        with open(path, "rb") as file:
            rows = _parse(file.read(), repr(path))
        if not isinstance(rows, list):
            raise ValueError(f"Expected {path!r} as a list of rows, got {type(rows).__name__}: use .jsonl otherwise.")
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Any:
        return self._rows[i]

    def fingerprint(self) -> str:
        """Changes when the file does."""
        return _file_state(self.path)


class LoadedRows:
    """Rows in memory, or a loaded `datasets.Dataset`.

    Args:
        rows: a sequence of dicts.
        label: how errors call it.
        media_root: folder that relative paths start from; None: the working directory.
    """

    def __init__(self, rows: Any, label: str = "rows", media_root: str | None = None) -> None:
        self.label = label
        self.media_root = media_root
        self._rows = _undecoded(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Any:
        return self._rows[i]

    def fingerprint(self) -> str:
        """Changes when the rows do."""
        known = getattr(self._rows, "_fingerprint", None)
        if known is not None:
            return str(known)
        digest = hashlib.sha256()
        for row in self._rows:
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
        return digest.hexdigest()


Part = JsonLines | JsonArray | LoadedRows


class Rows:
    """Several sources, one after the other.

    Args:
        parts: in order.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in self.parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, i: int) -> tuple[Part, int]:
        """The source of row `i`, and the row's number in it."""
        if not 0 <= i < len(self):
            raise IndexError(f"Expected a row from 0 to {len(self) - 1}, got {i}.")
        part = bisect.bisect_right(self._ends, i)
        return self.parts[part], i - (self._ends[part - 1] if part else 0)

    def name(self, i: int) -> str:
        """How errors call row `i`; rows count from 0 in each source."""
        part, row = self.locate(i)
        return f"{part.label} row {row}"

    def fingerprint(self) -> str:
        """Changes when a source does."""
        return hashlib.sha256("\n".join(part.fingerprint() for part in self.parts).encode()).hexdigest()


def open_rows(source: Any, *, split: str = "train", config_name: str | None = None) -> Rows:
    """Opens what the user named.

    Args:
        source: a .json, .jsonl, .parquet or .csv file, a folder or Hub id that `datasets.load_dataset` reads, a list
            of these, a loaded `datasets.Dataset`, or a list of dicts.
        split: of a folder or Hub id.
        config_name: of a Hub id whose dataset has several configurations.

    Raises:
        FileNotFoundError: for a file that does not exist.
        ImportError: for what `datasets` has to read, without it.
        ValueError: for a file that is none of these.
    """
    if isinstance(source, (str, os.PathLike)):
        return Rows([_open_one(os.fspath(source), split, config_name)])
    if isinstance(source, (list, tuple)) and source and all(isinstance(item, (str, os.PathLike)) for item in source):
        return Rows([_open_one(os.fspath(item), split, config_name) for item in source])
    if _has_numbers(source):
        return Rows([LoadedRows(source)])
    raise TypeError(
        f"Expected rows as a path, a Hub id, a list or a dataset with a length, got {type(source).__name__}: a "
        "streamed dataset goes to StreamingTrainingDataset."
    )


def _has_numbers(source: Any) -> bool:
    """Whether rows can be asked for by number (an iterable dataset has the method, but no length)."""
    return hasattr(source, "__getitem__") and hasattr(source, "__len__")


@dataclasses.dataclass(frozen=True)
class StreamedRow:
    """One row of a stream.

    Attributes:
        name: how errors call it.
        read: gives the row, or raises where it is no JSON.
        media_root: folder that its relative paths start from, where its source says one.
    """

    name: str
    read: Callable[[], Any]
    media_root: str | None


def stream_rows(
    source: Any, *, split: str = "train", config_name: str | None = None, rank: int, world_size: int
) -> Iterator[StreamedRow]:
    """Rows for one process (and its dataloader worker) without holding them.

    Args:
        source: as in `open_rows`, or a `datasets.IterableDataset`; what `datasets` reads is streamed.
        split: of a folder or Hub id.
        config_name: as in `open_rows`.
        rank: of this process.
        world_size: number of processes.
    """
    for part, media_root in _streams(source, split, config_name):
        if not isinstance(part, Rows):
            label = getattr(getattr(part, "info", None), "dataset_name", None) or "stream"
            for i, row in enumerate(_split_by_process(part, rank, world_size)):
                yield StreamedRow(f"{label} row {i} of process {rank}", functools.partial(dict, row), media_root)
            continue
        for i in _own_numbers(len(part), rank, world_size):
            file, number = part.locate(i)
            yield StreamedRow(part.name(i), functools.partial(file.__getitem__, number), file.media_root)


def num_parts(
    source: Any, *, split: str = "train", config_name: str | None = None, rank: int, world_size: int
) -> int | None:
    """Into how many parts what one process reads can be divided among its workers; None: any number.

    `datasets` gives workers whole shards, and a worker without one nothing; of other rows each needs one.
    """
    parts = [part for part, _ in _streams(source, split, config_name)]
    streams = [part for part in parts if not isinstance(part, Rows)]
    if not streams:
        return max((len(part) // world_size for part in parts), default=None)
    shards = [getattr(_split_by_process(part, rank, world_size), "num_shards", None) for part in streams]
    return min((count for count in shards if count is not None), default=None)


def _streams(source: Any, split: str, config_name: str | None) -> Iterator[tuple[Any, str | None]]:
    """One after the other: `Rows` of files and tables, or iterables of `datasets`; with these their media root."""
    several = isinstance(source, (list, tuple)) and bool(source) and isinstance(source[0], (str, os.PathLike))
    # Files that follow each other are shared out as one: each alone may have fewer rows than there are workers.
    files: list[Any] = []
    for item in source if several else [source]:
        is_path = isinstance(item, (str, os.PathLike))
        if is_path and os.fspath(item).endswith(_JSON_SUFFIXES):
            files.append(item)
            continue
        if files:
            yield open_rows(files), None
            files = []
        if is_path:
            path = os.fspath(item)
            yield _load_dataset(path, split, config_name, streaming=True), _folder_of(path)
        else:
            yield open_rows(item) if _has_numbers(item) else item, None
    if files:
        yield open_rows(files), None


def _own_numbers(count: int, rank: int, world_size: int) -> Iterable[int]:
    """Every `world_size * workers`-th row, so that no two workers of any process share one."""
    import torch

    worker = torch.utils.data.get_worker_info()
    workers = 1 if worker is None else worker.num_workers
    first = rank * workers + (0 if worker is None else worker.id)
    return range(first, count, world_size * workers)


def _split_by_process(rows: Any, rank: int, world_size: int) -> Any:
    """Among processes; `datasets` shares out among the workers of one by itself."""
    rows = _undecoded(rows)
    if world_size == 1:
        return rows
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(rows, rank=rank, world_size=world_size)


def _open_one(path: str, split: str, config_name: str | None) -> Part:
    if path.endswith(_JSON_SUFFIXES):
        if not os.path.isfile(path):
            hint = ": several files are a list, [a.json, b.json]" if "," in path else ""
            raise FileNotFoundError(f"Expected rows in {path!r}, got no such file{hint}.")
        return JsonLines(path) if path.endswith(".jsonl") else JsonArray(path)
    rows = _load_dataset(path, split, config_name, streaming=False)
    return LoadedRows(rows, label=os.path.basename(path.rstrip("/")), media_root=_folder_of(path))


def _folder_of(path: str) -> str | None:
    """Where relative paths of a local file or folder start; None for a Hub id."""
    full = os.path.abspath(path)
    return full if os.path.isdir(full) else os.path.dirname(full) if os.path.isfile(full) else None


def _load_dataset(path: str, split: str, config_name: str | None, *, streaming: bool) -> Any:
    suffix = os.path.splitext(path)[1].lower()
    if suffix in _TABLES and not os.path.isfile(path):
        raise FileNotFoundError(f"Expected rows in {path!r}, got no such file.")
    if os.path.isfile(path) and suffix not in _TABLES:
        raise ValueError(
            f"Expected rows as a file that ends in {', '.join(FILE_SUFFIXES)}, a folder or a Hub id, "
            f"got the file {path!r}."
        )
    if os.path.isdir(path) and not glob.glob(os.path.join(glob.escape(path), "**", "*.*"), recursive=True):
        raise ValueError(f"Expected a folder with data files, got {path!r} with none.")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"Expected the package `datasets` to read {path!r}, which is no .json or .jsonl file, found none: "
            "pip install 'videollama3[train]'."
        ) from error
    if suffix in _TABLES:
        return datasets.load_dataset(_TABLES[suffix], data_files=path, split="train", streaming=streaming)
    return datasets.load_dataset(path, config_name, split=split, streaming=streaming)


def _undecoded(rows: Any) -> Any:
    """Videos of a `datasets` table as paths or bytes: its own decoding needs torchcodec and samples otherwise."""
    features = getattr(rows, "features", None) or {}
    for column, feature in features.items():
        if type(feature).__name__ in ("Video", "Image"):
            rows = rows.cast_column(column, type(feature)(decode=False))
    return rows


def _line_offsets(path: str) -> npt.NDArray[np.int64]:
    offsets = []
    position = 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                offsets.append(position)
            position += len(line)
    return np.array(offsets, dtype=np.int64)


def _parse(text: bytes, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        hint = ": one row a line is a .jsonl file" if "Extra data" in str(error) and text.lstrip()[:1] == b"{" else ""
        raise ValueError(f"Expected {name} as JSON, got something else: {error}{hint}.") from error


def _check_begins_with_a_row(path: str) -> None:
    """A list over several lines would be as many bad rows as it has lines."""
    with open(path, "rb") as file:
        first = next((line.strip() for line in file if line.strip()), b"")
    if first.startswith(b"["):
        raise ValueError(f"Expected one row as a JSON object in each line of {path!r}, got a list: name it .json.")


def _file_state(path: str) -> str:
    """Name, size and time of change: reading gigabytes for a hash would take longer than what it saves."""
    state = os.stat(path)
    return f"{os.path.basename(path)} {state.st_size} {state.st_mtime_ns}"
