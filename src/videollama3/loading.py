"""What the sub-commands share about models and videos: their arguments, and a model made of them.

Command-line options enter, a model with its processor or options of sampling leave; what is done with them stands in
`cli.py` and in the command modules.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from .demonstrator import NOTICE, demonstrator_path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
# One of these is in every folder that a model, an adapter or a processor can be loaded from.
_FOLDER_FILES = ("config.json", "adapter_config.json", "processor_config.json", "preprocessor_config.json")
# Greedy decoding: what a checkpoint's own generation config says about sampling would only be warned about.
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `load_model_and_processor` reads."""
    parser.add_argument("--model", metavar="FOLDER_OR_REPO", help="checkpoint in any of the three layouts")
    add_placement_arguments(parser)


def add_placement_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how the model is held: number format, device, attention."""
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--attn", metavar="NAME", help="attention implementation, for instance sdpa or eager")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `sampling_options` reads, and two limits on visual tokens."""
    parser.add_argument(
        "--fps", type=float, metavar="N", help="sampled frames per second (default: as the checkpoint says)"
    )
    parser.add_argument(
        "--max-frames", type=int, metavar="N", help="at most so many frames (default: as the checkpoint says)"
    )
    parser.add_argument("--start", type=float, metavar="SECONDS", help="beginning of the window")
    parser.add_argument("--end", type=float, metavar="SECONDS", help="end of the window")
    parser.add_argument("--max-visual-tokens", type=int, metavar="N", help="limit before pruning")
    parser.add_argument("--no-prune", action="store_true", help="keep visual tokens that do not change")


def sampling_options(options: argparse.Namespace) -> dict[str, Any]:
    """Options of one video, as the processor takes them; None where nothing was said."""
    return {
        "fps": options.fps,
        "max_frames": options.max_frames,
        "start_time": options.start,
        "end_time": options.end,
    }


def is_image(media: str) -> bool:
    """Whether a path or URL names a picture rather than a video, by its suffix."""
    path = urlsplit(media).path if "://" in media else media
    return path.lower().endswith(IMAGE_SUFFIXES)


@contextlib.contextmanager
def naming_model(name: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Says in errors which checkpoint could not be found; for the time in which it is loaded.

    Args:
        name: folder or Hub id.
        what: how the user gave it, such as "--model".

    Raises:
        OSError: where no checkpoint is.
    """
    name = os.fspath(name)
    expected = f"Expected {what} as a checkpoint folder or a Hub id such as owner/name"
    if os.path.isdir(name):
        if not any(os.path.isfile(os.path.join(name, file)) for file in _FOLDER_FILES):
            raise FileNotFoundError(f"{expected}, got the folder {name!r} without a config.json.")
    elif os.path.exists(name):
        raise NotADirectoryError(f"{expected}, got the file {name!r}.")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{expected}, got {name!r}, where nothing is.")
    try:
        yield
    except OSError as error:
        if os.path.isdir(name):
            raise
        raise OSError(f"{expected}, got {name!r}, which is no folder here, and on the Hub: {error}") from error


def load_model_and_processor(options: argparse.Namespace) -> tuple[Any, Any]:
    """Loads the checkpoint that `--model` names, or the demonstrator and says so.

    Args:
        options: `model`, `dtype`, `device` and `attn`.

    Returns:
        The model on its device, in evaluation mode, and the processor.
    """
    import torch

    from .modeling.modeling_videollama3 import VideoLlama3ForCausalLM
    from .processing.processing_videollama3 import VideoLlama3Processor

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bfloat16" if str(device).startswith("cuda") else "float32"
    checkpoint = options.model
    if checkpoint is None:
        print(NOTICE, file=sys.stderr)
        checkpoint = demonstrator_path()
    attention = {"attn_implementation": options.attn} if options.attn else {}
    with naming_model(checkpoint, "--model"):
        processor = VideoLlama3Processor.from_pretrained(checkpoint)
        loaded = VideoLlama3ForCausalLM.from_pretrained(checkpoint, dtype=dtype, **attention)
    return loaded.to(device).eval(), processor
