"""Weight files of a checkpoint folder: which there are, and what their headers say, before anything is loaded.

A folder enters, a record per stored tensor leaves: name, file, dtype, shape and place. Whether these tensors are
the model's is left to `checkpoint_checks.py`, loading them to transformers and `conversion/`.

A checkpoint comes from a stranger. Nothing here runs code of it, reads outside its folder, or allocates more than
its files hold: safetensors headers are parsed as JSON, torch's files are mapped and read with `weights_only`.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

import torch

# What transformers looks for, in its order.
SAFETENSORS_FILES = ("model.safetensors", "model.safetensors.index.json")
TORCH_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

# Names of dtypes in a safetensors header.
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What torch's reader raises for random bytes, beside UnpicklingError.
_TORCH_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)
# The limit of the safetensors library itself.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a weight file, as the file's header describes it.

    Attributes:
        name: as stored.
        path: of the file.
        dtype: of the elements.
        shape: as stored.
        start: position of its first byte in a safetensors file; in a torch file its place in the order.
    """

    name: str
    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return self.num_elements * self.dtype.itemsize


def stored_tensors(folder: str, *, use_safetensors: bool | None = None) -> dict[str, StoredTensor]:
    """Reads the headers of all weight files of a folder.

    Args:
        folder: a checkpoint folder.
        use_safetensors: True for safetensors only, False for torch's files only, None for what there is.

    Returns:
        Every stored tensor by its name, in the order of files and places.

    Raises:
        FileNotFoundError: where there are no weight files, or some named by an index are absent.
        ValueError: for a file that leaves the folder, is damaged, or holds anything but tensors; names it.
    """
    found = find_weight_file(folder, use_safetensors=use_safetensors)
    if found is None:
        wanted = ", ".join(_candidates(use_safetensors))
        raise FileNotFoundError(f"Expected weights in {folder!r} (one of {wanted}), found none.")
    if not found.endswith(".index.json"):
        return read_header(file_inside(folder, found))
    return _sharded_tensors(folder, found)


def find_weight_file(folder: str, *, use_safetensors: bool | None = None) -> str | None:
    """The name of the weight file, or of the index of several, that transformers would take."""
    for name in _candidates(use_safetensors):
        if os.path.lexists(os.path.join(folder, name)):
            return name
    return None


def _candidates(use_safetensors: bool | None) -> tuple[str, ...]:
    if use_safetensors is None:
        return SAFETENSORS_FILES + TORCH_FILES
    return SAFETENSORS_FILES if use_safetensors else TORCH_FILES


def file_inside(folder: str, name: str) -> str:
    """The path of a file that a checkpoint names, after checking that it is a file of that folder.

    Links are followed; a link that leaves the folder is refused, except into the blobs of the same repository
    in the Hub's cache, whose snapshots consist of such links.

    Raises:
        ValueError: for a name that is no plain file name, or a link that leaves the folder.
        FileNotFoundError: where there is no such file.
    """
    if name in ("", ".", "..") or any(character in name for character in "/\\\0") or os.path.isabs(name):
        raise ValueError(
            f"Expected the plain name of a file in {folder!r}, got {name!r}: a checkpoint may name no file outside "
            "its folder."
        )
    path = os.path.join(folder, name)
    real = os.path.realpath(path)
    if not any(os.path.commonpath([root, real]) == root for root in _allowed_roots(folder)):
        raise ValueError(
            f"Expected {path!r} to be a file of its own folder, got a link to {real!r}: copy the file there if you "
            "trust it."
        )
    if not os.path.isfile(real):
        raise FileNotFoundError(f"Expected a file {name!r} in {folder!r}, found none.")
    return path


def _allowed_roots(folder: str) -> list[str]:
    """The folder itself, and the blobs beside it where it is a snapshot in the Hub's cache."""
    roots = [os.path.realpath(folder)]
    parts = os.path.abspath(folder).split(os.sep)
    if "snapshots" in parts:
        repository = os.sep.join(parts[: len(parts) - 1 - parts[::-1].index("snapshots")])
        roots.append(os.path.realpath(os.path.join(repository, "blobs")))
    return roots


def shard_names(folder: str, index_name: str) -> dict[str, str]:
    """Reads an index: which shard holds each tensor.

    Raises:
        ValueError: where the index is damaged or names anything but plain files of its own kind.
    """
    path = file_inside(folder, index_name)
    content = _read_json(path)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"Expected a `weight_map` of tensors to files in {path!r}, got {type(weight_map).__name__}.")
    suffix = ".safetensors" if index_name in SAFETENSORS_FILES else ".bin"
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(suffix):
            raise ValueError(f"Expected a file name ending in {suffix!r} for {tensor!r} in {path!r}, got {shard!r}.")
    return weight_map


def _sharded_tensors(folder: str, index_name: str) -> dict[str, StoredTensor]:
    weight_map = shard_names(folder, index_name)
    shards = sorted(set(weight_map.values()))
    # First all names: a hostile one is an error of its own, also where its file is absent.
    absent = [name for name in shards if not _is_there(folder, name)]
    if absent:
        raise FileNotFoundError(
            f"Expected the {len(shards)} weight files that {index_name} names in {folder!r}, {len(absent)} absent: "
            f"{shorten(absent)}. Download the checkpoint again."
        )
    found: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in read_header(os.path.join(folder, shard)).items():
            if name in found:
                raise ValueError(f"Expected each tensor once in {folder!r}, got {name!r} in {shard} and another file.")
            found[name] = tensor
    lost = [name for name, shard in weight_map.items() if name not in found or _file_name(found[name]) != shard]
    if lost:
        raise ValueError(
            f"Expected every tensor in the file that {index_name} names for it in {folder!r}, {len(lost)} are not "
            f"there: {shorten(lost)}."
        )
    return found


def _is_there(folder: str, name: str) -> bool:
    try:
        file_inside(folder, name)
    except FileNotFoundError:
        return False
    return True


def _file_name(tensor: StoredTensor) -> str:
    return os.path.basename(tensor.path)


def read_header(path: str) -> dict[str, StoredTensor]:
    """What one weight file holds, without reading the tensors.

    Raises:
        ValueError: for a damaged file, naming it and what is wrong.
    """
    return _safetensors_header(path) if path.endswith(".safetensors") else _torch_header(path)


def _safetensors_header(path: str) -> dict[str, StoredTensor]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise damaged(path, f"its header claims {length} bytes, the file has {size}")
        header = _parse_json(file.read(length), path)
    if not isinstance(header, dict):
        raise damaged(path, f"its header is a {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    tensors = [_safetensors_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.num_bytes))
    position = 8 + length
    for tensor in tensors:
        if tensor.start != position:
            raise damaged(path, f"{tensor.name!r} starts at byte {tensor.start}, the one before ends at {position}")
        position += tensor.num_bytes
    if position != size:
        raise damaged(path, f"its tensors end at byte {position}, the file has {size}")
    return {tensor.name: tensor for tensor in tensors}


def _safetensors_entry(path: str, name: str, entry: Any, base: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise damaged(path, f"the entry of {name!r} is no object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
        raise damaged(path, f"the dtype of {name!r} is {dtype!r}")
    shape, offsets = (_sizes(path, name, label, entry.get(label)) for label in ("shape", "data_offsets"))
    if len(offsets) != 2:
        raise damaged(path, f"the data_offsets of {name!r} are {offsets!r}")
    tensor = StoredTensor(name, path, SAFETENSORS_DTYPES[dtype], tuple(shape), base + offsets[0])
    if offsets[1] - offsets[0] != tensor.num_bytes:
        raise damaged(
            path, f"{name!r} of shape {shape} takes {tensor.num_bytes} bytes, its place has {offsets[1] - offsets[0]}"
        )
    return tensor


def _sizes(path: str, name: str, label: str, numbers: Any) -> list[int]:
    if not isinstance(numbers, list) or any(type(number) is not int or number < 0 for number in numbers):
        raise damaged(path, f"the {label} of {name!r} is {str(numbers)[:200]}")
    return numbers


def _torch_header(path: str) -> dict[str, StoredTensor]:
    tensors = load_torch_file(path)
    return {
        name: StoredTensor(name, path, tensor.dtype, tuple(tensor.shape), place)
        for place, (name, tensor) in enumerate(tensors.items())
    }


def load_torch_file(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin` file, mapped rather than read where the file allows it.

    Raises:
        ValueError: for a damaged file, one with Python objects other than tensors, and tensors that claim more
            elements than are stored.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Expected only tensors in {path!r}, got something else (Python objects could run code): not loaded. Ask "
            f"its author for safetensors. ({str(error).splitlines()[0]})"
        ) from error
    except _TORCH_ERRORS as error:
        raise damaged(path, (str(error).splitlines() or [type(error).__name__])[0]) from error
    if not isinstance(content, dict):
        raise damaged(path, f"it holds a {type(content).__name__}, not a dictionary of tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise damaged(path, f"{name!r} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise damaged(path, f"{name!r} of shape {list(tensor.shape)} claims more than is stored for it")
    return content


def damaged(path: str, what: str) -> ValueError:
    """The error of a weight file that is not what it should be."""
    return ValueError(f"Expected an intact weight file, got {path!r}: {what}. Download or save it again.")


def shorten(names: list[str], *, most: int = 20) -> str:
    """A list for an error message: all names, or the first ones and how many more."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _read_json(path: str) -> Any:
    with open(path, "rb") as file:
        return _parse_json(file.read(), path)


def _parse_json(content: bytes, path: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            raise ValueError("a name stands there twice")
        return keys

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    # ValueError covers broken UTF-8 and broken JSON, RecursionError JSON nested thousands of levels deep.
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"no valid JSON ({error})") from error
