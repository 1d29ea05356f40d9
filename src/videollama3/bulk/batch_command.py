"""The `videollama3 batch` command: many questions about many media, to a file that grows as they are answered.

Command-line arguments enter, lines in a JSONL file and a count leave; the work is done in `local_run.py` and
`ray_run.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Generator
from contextlib import closing
from typing import Any

from ..loading import add_model_arguments, add_sampling_arguments
from ..terminal import positive_int

_MAX_DEFAULT_WORKERS = 8


def add_parser(commands: Any) -> None:
    """Adds the sub-command's parser."""
    parser = commands.add_parser(
        "batch",
        help="ask about many images and videos",
        description="Answers a question about each image or video, one JSON line each. The same command again goes on "
        "where it was stopped or killed. See docs/batch.md.",
    )
    parser.add_argument("input", metavar="INPUT", help=".jsonl file, folder, glob or media file")
    parser.add_argument("-o", "--output", required=True, metavar="OUT.jsonl", help="written line by line, or resumed")
    parser.add_argument("--prompt", metavar="QUESTION", help="for rows without a question of their own")
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument("--max-new-tokens", type=positive_int, default=512, metavar="N")
    parser.add_argument("--no-system-prompt", action="store_true", help="leave out the released models' system prompt")
    parser.add_argument(
        "--max-batch-tokens",
        type=positive_int,
        default=16384,
        metavar="N",
        help="visual tokens of a batch, after pruning, padding included (default 16384)",
    )
    parser.add_argument(
        "--max-batch-rows", type=positive_int, default=32, metavar="N", help="rows of a batch (default 32)"
    )
    parser.add_argument(
        "--workers",
        type=positive_int,
        metavar="N",
        help="processes that read media (default: processors - 1, at most 8)",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="drop what OUT.jsonl holds")
    again.add_argument("--retry-failed", action="store_true", help="do rows with an error again")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument(
        "--vllm-options",
        type=_json_object,
        default={},
        metavar="JSON",
        help="for vllm.LLM, as '{\"max_model_len\": 8192}'",
    )
    parser.add_argument("--ray", metavar="ADDRESS", help="run on Ray: local, auto, or a cluster's address")
    parser.add_argument(
        "--ray-actors", type=positive_int, metavar="N", help="models on Ray (default: one per GPU, or 1)"
    )
    parser.set_defaults(run=run, usage_error=parser.error)


def run(options: argparse.Namespace) -> None:
    """Answers what is not answered yet, and prints a count.

    Raises:
        RuntimeError: where every row of the output has failed.
    """
    from ..terminal import progress_bar, quiet_progress_bars
    from .input_rows import open_input
    from .result_file import ResultFile
    from .run_settings import run_settings

    _check_usage(options)
    quiet_progress_bars()
    rows = open_input(options.input, _defaults(options))
    rows.check()
    start = time.perf_counter()
    with ResultFile(
        options.output,
        run_settings(options),
        rows,
        overwrite=options.overwrite,
        retry_failed=options.retry_failed,
    ) as output:
        pending = list(output.pending())
        done_before = len(rows) - len(pending)
        if done_before:
            print(f"{options.output}: {done_before} of {len(rows)} rows done before", file=sys.stderr)
        if pending:
            with (
                closing(_results(options, rows, pending)) as results,
                progress_bar("answering", unit="row") as progress,
            ):
                for count, result in enumerate(results, start=1):
                    output.write(result)
                    if progress is not None:
                        progress(count, len(pending))
        answered, failed = output.num_answered, output.num_failed
    print(
        f"{options.output}: {answered} of {len(rows)} rows answered, {failed} failed; "
        f"{len(pending)} done now in {time.perf_counter() - start:.1f} s"
    )
    if not answered:
        raise RuntimeError(f"Expected an answer to at least one row, got {failed} failures: see {options.output}.")


def _check_usage(options: argparse.Namespace) -> None:
    """What the parser cannot say by itself."""
    if options.prompt is None and not options.input.endswith(".jsonl"):
        options.usage_error("the following arguments are required: --prompt (unless INPUT is a .jsonl file)")
    if options.engine == "vllm" and options.model is None:
        options.usage_error("--engine vllm needs --model FOLDER_OR_REPO")
    if options.vllm_options and options.engine != "vllm":
        options.usage_error("--vllm-options needs --engine vllm")
    if options.ray_actors and options.ray is None:
        options.usage_error("--ray-actors needs --ray")
    if options.workers and options.ray is not None:
        options.usage_error("--workers is of no use with --ray, which reads on every processor that is free")


def _defaults(options: argparse.Namespace) -> Any:
    from .input_rows import RowDefaults

    return RowDefaults(
        prompt=options.prompt,
        fps=options.fps,
        max_frames=options.max_frames,
        start_time=options.start,
        end_time=options.end,
        max_visual_tokens=options.max_visual_tokens,
    )


def _results(options: argparse.Namespace, rows: Any, pending: list[int]) -> Generator[dict[str, Any], None, None]:
    from .engines import EngineSettings
    from .local_run import run_locally
    from .row_reader import RowReader

    settings = EngineSettings(
        engine=options.engine,
        model=options.model,
        dtype=options.dtype,
        device=options.device,
        attn=options.attn,
        max_new_tokens=options.max_new_tokens,
        vllm_options=options.vllm_options,
    )
    reader = RowReader(
        settings.load_processor(),
        system_prompt=not options.no_system_prompt,
        prune=False if options.no_prune else None,
    )
    reader.check()
    limits = {"max_batch_tokens": options.max_batch_tokens, "max_batch_rows": options.max_batch_rows}
    waiting = (rows[index] for index in pending)
    if options.ray is None:
        return run_locally(waiting, reader, settings, num_workers=options.workers or _default_workers(), **limits)
    from .ray_run import run_on_ray

    return run_on_ray(waiting, reader, settings, address=options.ray, num_actors=options.ray_actors, **limits)


def _default_workers() -> int:
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(processors - 1, 1), _MAX_DEFAULT_WORKERS)


def _json_object(text: str) -> dict[str, Any]:
    """Argument type: a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value
