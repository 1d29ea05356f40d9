"""Weights from stored tensors to new safetensors files, a few megabytes at a time.

Named streams of bytes enter, one `model.safetensors` or numbered shards with their index leave. Which tensor gets
which name is left to `convert.py`, merging adapters to `adapter.py`.

Files are written here rather than by the safetensors library, which wants all tensors of a file in memory: the
format is a length, a JSON header and the bytes. Peak memory does not depend on the checkpoint's size.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..modeling.checkpoint_files import SAFETENSORS_DTYPES, StoredTensor, load_torch_file

# Bytes held at a time; a multiple of every element's size.
CHUNK_BYTES = 16 * 2**20

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

# Bytes done and bytes in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TensorStream:
    """A tensor to be written: `chunks` gives its bytes, in order, when asked.

    Attributes:
        name: in the file to be written.
        dtype: of the elements.
        shape: of the tensor.
        chunks: produces the bytes; may be called several times.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def stored_chunks(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    """The elements of a stored tensor as flat pieces of its dtype, each at most `CHUNK_BYTES`.

    Raises:
        ValueError: for elements that are not a number.
    """
    read = _safetensors_chunks if tensor.path.endswith(".safetensors") else _torch_chunks
    for chunk in read(tensor):
        # The sum is a much faster pass, and NaN whenever any element is.
        if chunk.is_floating_point() and chunk.itemsize >= 2 and chunk.sum().isnan() and bool(chunk.isnan().any()):
            raise ValueError(
                f"Expected weights that are numbers, got NaN in {tensor.name!r} of {tensor.path!r}: the checkpoint is "
                "damaged or its training diverged."
            )
        yield chunk


def _safetensors_chunks(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    with open(tensor.path, "rb", buffering=0) as file:
        file.seek(tensor.start)
        left = tensor.num_bytes
        while left:
            content = bytearray(min(left, CHUNK_BYTES))
            if file.readinto(content) != len(content):
                raise ValueError(f"Expected {left} more bytes of {tensor.name!r} in {tensor.path!r}: it was cut off.")
            left -= len(content)
            yield torch.frombuffer(content, dtype=tensor.dtype)


def _torch_chunks(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    flat = _open_torch_file(tensor.path)[tensor.name].reshape(-1)
    size = CHUNK_BYTES // tensor.dtype.itemsize
    for start in range(0, len(flat), size):
        yield flat[start : start + size]


@functools.lru_cache(maxsize=1)
def _open_torch_file(path: str) -> dict[str, torch.Tensor]:
    """One mapped file at a time: what was read of it counts as this process's memory."""
    return load_torch_file(path)


def read_whole(tensor: StoredTensor) -> torch.Tensor:
    """A stored tensor in memory, of its own dtype and shape."""
    whole = torch.empty(tensor.num_elements, dtype=tensor.dtype)
    position = 0
    for chunk in stored_chunks(tensor):
        whole[position : position + len(chunk)] = chunk
        position += len(chunk)
    return whole.reshape(tensor.shape)


def stored_stream(tensor: StoredTensor, name: str, dtype: torch.dtype | None) -> TensorStream:
    """A stored tensor under a new name; floating-point elements in another dtype where one is given."""
    if dtype is None or dtype == tensor.dtype or not tensor.dtype.is_floating_point:
        return TensorStream(name, tensor.dtype, tensor.shape, lambda: stored_chunks(tensor))
    wanted = dtype
    return TensorStream(
        name, wanted, tensor.shape, lambda: (cast(chunk, wanted, tensor.name) for chunk in stored_chunks(tensor))
    )


def cast(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Values in another dtype.

    Raises:
        ValueError: for values that do not fit into it.
    """
    result = values.to(dtype)
    if bool((result.isinf() & ~values.isinf()).any()):
        raise ValueError(
            f"Expected values of {name!r} that fit into {str(dtype).removeprefix('torch.')}, got "
            f"{float(values.abs().max()):.4g}: bfloat16 has the range of float32."
        )
    return result


def parse_size(text: str | int) -> int:
    """Bytes of a size such as "5GB", "300MB", "2GiB" or a number.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", str(text).upper())
    size = int(float(found[1]) * _UNITS.get(found[2], 1)) if found else 0
    if size < 1:
        raise ValueError(f"Expected a size such as 5GB or 300MB, got {text!r}.")
    return size


def write_weights(
    folder: str, streams: list[TensorStream], *, max_shard_bytes: int, progress: Progress | None = None
) -> list[str]:
    """Writes all tensors, in one file or in shards with an index.

    Args:
        folder: an existing folder.
        streams: the tensors, in the order in which they are read best.
        max_shard_bytes: tensors of one file take at most so much, unless a single one is larger.
        progress: called with bytes done and bytes in all.

    Returns:
        The names of the weight files.
    """
    shards = _split(streams, max_shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    total = sum(stream.num_bytes for stream in streams)
    done = 0
    for name, shard in zip(names, shards, strict=True):
        done = _write_file(os.path.join(folder, name), shard, done, total, progress)
    if len(shards) > 1:
        weight_map = {stream.name: name for name, shard in zip(names, shards, strict=True) for stream in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(os.path.join(folder, "model.safetensors.index.json"), index)
    return names


def _split(streams: list[TensorStream], max_shard_bytes: int) -> list[list[TensorStream]]:
    shards: list[list[TensorStream]] = [[]]
    size = 0
    for stream in streams:
        if shards[-1] and size + stream.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(stream)
        size += stream.num_bytes
    return shards


def _write_file(path: str, streams: list[TensorStream], done: int, total: int, progress: Progress | None) -> int:
    # Wide elements first, so that every tensor stands at a multiple of its element's size.
    streams = sorted(streams, key=lambda stream: -stream.dtype.itemsize)
    with open(path, "wb") as file:
        file.write(_header(streams))
        for stream in streams:
            written = 0
            for chunk in stream.chunks():
                content = chunk.contiguous().view(torch.uint8).numpy()
                file.write(content.data)
                written += content.nbytes
                if progress is not None:
                    progress(done + written, total)
            if written != stream.num_bytes:
                raise ValueError(f"Expected {stream.num_bytes} bytes of {stream.name!r}, got {written}.")
            done += written
        sync(file.fileno())
    return done


def _header(streams: list[TensorStream]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for stream in streams:
        entries[stream.name] = {
            "dtype": _DTYPE_NAMES[stream.dtype],
            "shape": list(stream.shape),
            "data_offsets": [position, position + stream.num_bytes],
        }
        position += stream.num_bytes
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def write_json(path: str, content: object) -> None:
    """Writes a JSON file that is on the disk afterwards."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        sync(file.fileno())


def sync(descriptor: int) -> None:
    """Waits until a file or folder is on the disk."""
    os.fsync(descriptor)
