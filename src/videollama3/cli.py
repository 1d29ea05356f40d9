"""The `videollama3` command: `ask` a question about media, `inspect` what the model sees of a video.

Command-line arguments enter, text (and pictures in files) leave; the work is done by the model, the
processor and `contact_sheet.py`.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from .bulk import batch_command
from .conversion import card_command, convert_command, init_command
from .loading import (
    GREEDY,
    add_model_arguments,
    add_sampling_arguments,
    is_image,
    load_model_and_processor,
    naming_model,
    sampling_options,
)
from .serving import serve_command
from .streaming import chat_command, watch_command
from .terminal import positive_int, progress_bar, quiet_progress_bars
from .training import data_command, train_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 for failed work, 2 for bad usage, 130 when interrupted.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and hasattr(options, "overrides") and all("=" in text and text[0] != "-" for text in rest):
        # Settings that stand behind an option.
        options.num_settings_before = len(options.overrides)
        options.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
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
    add_model_arguments(ask)
    ask.add_argument("--max-new-tokens", type=positive_int, default=512, metavar="N")
    ask.add_argument("--no-system-prompt", action="store_true", help="leave out the released models' system prompt")
    add_sampling_arguments(ask)
    ask.set_defaults(run=run_ask)

    inspect = commands.add_parser("inspect", help="show what the model sees of a video")
    inspect.add_argument("video", metavar="VIDEO")
    inspect.add_argument("-o", "--output", metavar="SHEET.png", help="write a contact sheet, pruned tokens dimmed")
    inspect.add_argument("--plan", action="store_true", help="say what it will cost, without decoding it")
    inspect.add_argument("--model", metavar="FOLDER_OR_REPO", help="checkpoint whose processor settings to use")
    add_sampling_arguments(inspect)
    inspect.set_defaults(run=run_inspect)

    for module in (
        convert_command,
        init_command,
        card_command,
        data_command,
        train_command,
        chat_command,
        watch_command,
        serve_command,
        batch_command,
    ):
        module.add_parser(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run_ask(options: argparse.Namespace) -> None:
    """Streams the answer to standard output."""
    from transformers import TextStreamer

    quiet_progress_bars()
    model, processor = load_model_and_processor(options)
    content: list[dict[str, Any]] = [_content(media, options) for media in options.media]
    content.append({"type": "text", "text": options.question})
    with progress_bar("reading") as progress:
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
        **GREEDY,
        streamer=TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


def run_inspect(options: argparse.Namespace) -> None:
    """Prints a table of tokens per frame and draws the contact sheet."""
    from .contact_sheet import contact_sheet, dim_pruned, frames_from_patches

    quiet_progress_bars()
    video_processor = _video_processor(options.model)
    if options.plan:
        _print_plan(options, video_processor)
        _say_whose(options.model)
        return
    with progress_bar("reading") as progress:
        features = video_processor(
            [options.video],
            **sampling_options(options),
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
    _say_whose(options.model)


def _say_whose(model: str | None) -> None:
    if model is None:
        print("No --model was given: sizes and tokens are those of the released models.", file=sys.stderr)


def _print_plan(options: argparse.Namespace, video_processor: Any) -> None:
    estimate = video_processor.estimate(
        [options.video],
        **sampling_options(options),
        max_visual_tokens=options.max_visual_tokens,
    )
    (video,) = estimate.items
    print(f"{options.video}: {video.num_frames} frames, each {video.width} x {video.height} pixels after resizing")
    print(f"patches for the vision encoder: {estimate.num_patches}")
    print(f"visual tokens before pruning:   {estimate.num_visual_tokens}")
    for dtype in ("float32", "uint8"):
        print(f"pixel tensor as {dtype:<8}        {estimate.pixel_bytes(dtype) / 2**20:.1f} MiB")


def _video_processor(model: str | None) -> Any:
    from .processing.video_processing_videollama3 import VideoLlama3VideoProcessor

    if model is None:
        return VideoLlama3VideoProcessor()
    from .processing.processing_videollama3 import VideoLlama3Processor

    with naming_model(model, "--model"):
        return VideoLlama3Processor.from_pretrained(model).video_processor


def _content(media: str, options: argparse.Namespace) -> dict[str, Any]:
    """The content dict of one medium: an image by its suffix, otherwise a video."""
    if is_image(media):
        return {"type": "image", "image": media}
    return {"type": "video", "video": media, **sampling_options(options)}


def _version() -> str:
    from . import __version__

    return f"videollama3 {__version__}"
