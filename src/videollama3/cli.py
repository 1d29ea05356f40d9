"""The `videollama3` command: `ask` a question about media, `inspect` what the model sees of a video.

Command-line arguments enter, text (and pictures in files) leave; the work is done by the model, the
processor and `contact_sheet.py`.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")

_RANDOM_NOTICE = (
    "No --model was given: a tiny model with random weights answers. Its words mean nothing; they only show that "
    "everything works. Pass --model FOLDER_OR_REPO, for instance --model DAMO-NLP-SG/VideoLLaMA3-2B."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 for failed work, 2 for bad usage, 130 when interrupted.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        run: Callable[[argparse.Namespace], None] = options.run
        run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # the outermost border: one clear line instead of a traceback
        if options.debug:
            traceback.print_exc()
        else:
            message = " ".join(str(error).split()) or type(error).__name__
            print(f"videollama3 {options.command}: {message}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands."""
    parser = argparse.ArgumentParser(prog="videollama3", description="Questions about images and videos.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    ask = commands.add_parser("ask", help="ask a question about images and videos")
    ask.add_argument("media", nargs="+", metavar="MEDIA", help="files, folders of pictures or URLs")
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument("--model", metavar="FOLDER_OR_REPO", help="checkpoint in any of the three layouts")
    ask.add_argument("--max-new-tokens", type=_positive_int, default=512, metavar="N")
    ask.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    ask.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    ask.add_argument("--attn", metavar="NAME", help="attention implementation, for instance sdpa or eager")
    ask.add_argument("--no-system-prompt", action="store_true", help="leave out the released models' system prompt")
    _add_sampling(ask)
    ask.set_defaults(run=run_ask)

    inspect = commands.add_parser("inspect", help="show what the model sees of a video")
    inspect.add_argument("video", metavar="VIDEO")
    inspect.add_argument("-o", "--output", metavar="SHEET.png", help="write a contact sheet, pruned tokens dimmed")
    inspect.add_argument("--plan", action="store_true", help="say what it will cost, without decoding it")
    inspect.add_argument("--model", metavar="FOLDER_OR_REPO", help="checkpoint whose processor settings to use")
    _add_sampling(inspect)
    inspect.set_defaults(run=run_inspect)

    for command in (ask, inspect):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--fps", type=float, metavar="N", help="sampled frames per second (default 1)")
    command.add_argument("--max-frames", type=int, metavar="N", help="at most so many frames (default 180)")
    command.add_argument("--start", type=float, metavar="SECONDS", help="beginning of the window")
    command.add_argument("--end", type=float, metavar="SECONDS", help="end of the window")
    command.add_argument("--max-visual-tokens", type=int, metavar="N", help="limit before pruning")
    command.add_argument("--no-prune", action="store_true", help="keep visual tokens that do not change")


def run_ask(options: argparse.Namespace) -> None:
    """Streams the answer to standard output."""
    from transformers import TextStreamer

    _quiet_progress_bars()
    model, processor = _load(options)
    content: list[dict[str, Any]] = [_content(media, options) for media in options.media]
    content.append({"type": "text", "text": options.question})
    with _progress_bar("reading") as progress:
        inputs = processor(
            conversation=[{"role": "user", "content": content}],
            add_system_prompt=not options.no_system_prompt,
            add_generation_prompt=True,
            return_tensors="pt",
            progress=progress,
            max_visual_tokens=options.max_visual_tokens,
            use_token_compression=False if options.no_prune else None,
        )
    model.generate(
        **inputs.to(model.device),
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        streamer=TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


def run_inspect(options: argparse.Namespace) -> None:
    """Prints a table of tokens per frame and draws the contact sheet."""
    from .contact_sheet import contact_sheet, dim_pruned, frames_from_patches

    _quiet_progress_bars()
    video_processor = _video_processor(options.model)
    if options.plan:
        _print_plan(options, video_processor)
        return
    with _progress_bar("reading") as progress:
        features = video_processor(
            [options.video],
            **_sampling(options),
            max_visual_tokens=options.max_visual_tokens,
            use_token_compression=False if options.no_prune else None,
            pixel_dtype="uint8",
            return_metadata=True,
            progress=progress,
        )
    frames, rows, columns = features["video_grid_thw"][0].tolist()
    merge = int(features["video_merge_sizes"][0])
    keep = features["video_compression_mask"].numpy()
    metadata = features["video_metadata"][0]
    per_frame = rows * columns // merge**2
    kept = keep.reshape(frames, per_frame).sum(axis=1).tolist()
    patch = video_processor.patch_size
    print(
        f"{options.video}: {metadata.duration:.2f} s, {metadata.fps:g} frames per second, "
        f"{metadata.width} x {metadata.height}"
    )
    print(f"sampled {frames} frames, each {columns * patch} x {rows * patch} pixels = {per_frame} visual tokens")
    print(f"{'frame':>5}  {'time':>8}  {'source':>7}  {'kept':>6}  {'of':>6}")
    for i, (seconds, source, count) in enumerate(zip(metadata.timestamps, metadata.frames_indices, kept, strict=True)):
        print(f"{i:>5}  {seconds:>7.1f}s  {source:>7}  {count:>6}  {per_frame:>6}")
    share = 1 - sum(kept) / (frames * per_frame)
    print(f"total: {sum(kept)} of {frames * per_frame} visual tokens kept, {share:.1%} pruned")
    if options.output:
        pictures = frames_from_patches(features["pixel_values_videos"].numpy(), (frames, rows, columns), merge)
        captions = [
            f"{seconds:.1f}s {count}/{per_frame}" for seconds, count in zip(metadata.timestamps, kept, strict=True)
        ]
        sheet = contact_sheet(dim_pruned(pictures, keep, merge * patch), captions)
        sheet.save(options.output)
        print(f"wrote {options.output} ({sheet.width} x {sheet.height})")


def _print_plan(options: argparse.Namespace, video_processor: Any) -> None:
    estimate = video_processor.estimate(
        [options.video],
        **_sampling(options),
        max_visual_tokens=options.max_visual_tokens,
    )
    (video,) = estimate.items
    print(f"{options.video}: {video.num_frames} frames, each {video.width} x {video.height} pixels after resizing")
    print(f"patches for the vision encoder: {estimate.num_patches}")
    print(f"visual tokens before pruning:   {estimate.num_visual_tokens}")
    for dtype in ("float32", "uint8"):
        print(f"pixel tensor as {dtype:<8}        {estimate.pixel_bytes(dtype) / 2**20:.1f} MiB")


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    from .modeling.modeling_videollama3 import VideoLlama3ForCausalLM
    from .processing.processing_videollama3 import VideoLlama3Processor

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bfloat16" if str(device).startswith("cuda") else "float32"
    if options.model is None:
        from .random_checkpoint import build_random

        print(_RANDOM_NOTICE, file=sys.stderr)
        model, processor = build_random()
        if options.attn:
            model.set_attn_implementation(options.attn)
        return model.to(device=device, dtype=getattr(torch, dtype)), processor
    attention = {"attn_implementation": options.attn} if options.attn else {}
    processor = VideoLlama3Processor.from_pretrained(options.model)
    loaded = VideoLlama3ForCausalLM.from_pretrained(options.model, dtype=dtype, **attention)
    return loaded.to(device).eval(), processor


def _video_processor(model: str | None) -> Any:
    from .processing.video_processing_videollama3 import VideoLlama3VideoProcessor

    if model is None:
        return VideoLlama3VideoProcessor()
    from .processing.processing_videollama3 import VideoLlama3Processor

    return VideoLlama3Processor.from_pretrained(model).video_processor


def _content(media: str, options: argparse.Namespace) -> dict[str, Any]:
    """The content dict of one medium: an image by its suffix, otherwise a video."""
    path = urlsplit(media).path if "://" in media else media
    if path.lower().endswith(IMAGE_SUFFIXES):
        return {"type": "image", "image": media}
    return {"type": "video", "video": media, **_sampling(options)}


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "fps": options.fps,
        "max_frames": options.max_frames,
        "start_time": options.start,
        "end_time": options.end,
    }


def _quiet_progress_bars() -> None:
    """No bars of transformers in a pipe."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


@contextmanager
def _progress_bar(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal, None in a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    from huggingface_hub.utils import tqdm

    with tqdm(total=None, desc=label, unit="frame", file=sys.stderr, leave=False) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.n = done
            bar.refresh()

        yield update


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _version() -> str:
    from . import __version__

    return f"videollama3 {__version__}"
