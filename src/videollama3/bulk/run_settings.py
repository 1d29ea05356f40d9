"""What answers depend on beside the rows, as JSON that a later run compares.

The command's options enter, a flat dict leaves; keeping and comparing it is left to `result_file.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from typing import Any

from ..demonstrator import demonstrator_path

# Files of a checkpoint that change what it answers.
_MODEL_SUFFIXES = (".json", ".jinja", ".safetensors", ".bin", ".txt", ".model")


def run_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The record of a run.

    Args:
        options: of the command.

    Returns:
        JSON values by name; what only changes speed (workers, batches, Ray) is not among them.
    """
    return {
        "format": 2,
        "model": options.model,
        "model_files": _files_digest(demonstrator_path() if options.model is None else options.model),
        "engine": options.engine,
        "dtype": options.dtype,
        "prompt": options.prompt,
        "system_prompt": not options.no_system_prompt,
        "max_new_tokens": options.max_new_tokens,
        "fps": options.fps,
        "max_frames": options.max_frames,
        "start": options.start,
        "end": options.end,
        "max_visual_tokens": options.max_visual_tokens,
        "prune": not options.no_prune,
    }


def _files_digest(model: str | os.PathLike[str]) -> str | None:
    """Names, sizes and times of change of a folder's files; None for a repository of the Hub."""
    if not os.path.isdir(model):
        return None
    digest = hashlib.sha256()
    for file in sorted(os.scandir(model), key=lambda file: file.name):
        if file.name.endswith(_MODEL_SUFFIXES):
            state = file.stat()
            digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
