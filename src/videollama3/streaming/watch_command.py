"""The `videollama3 watch` command: the model looks at a stream and speaks when there is something to say.

A file, URL or camera and an instruction enter, lines with times leave; the stream itself is left to `session.py` and
`feed.py`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..loading import GREEDY, add_model_arguments
from ..terminal import positive_int


def add_parser(commands: Any) -> None:
    """Adds the sub-command's parser."""
    parser = commands.add_parser(
        "watch",
        help="let the model speak by itself while a video runs",
        description="Prints what the model says by itself, with the time of the frame after which it says it.",
    )
    parser.add_argument("source", metavar="SOURCE", help="file, URL or camera (/dev/video0)")
    parser.add_argument("instruction", metavar="INSTRUCTION", help="what to look out for")
    add_model_arguments(parser)
    parser.add_argument(
        "--threshold", type=float, default=0.5, metavar="P", help="speak from this probability on (default 0.5)"
    )
    parser.add_argument("--fps", type=float, metavar="N", help="ticks per second (default: the processor's)")
    parser.add_argument("--max-new-tokens", type=positive_int, default=64, metavar="N", help="of each message")
    parser.add_argument("--horizon", type=float, default=180, metavar="SECONDS", help="sizes are planned for so long")
    parser.add_argument("--max-cache-tokens", type=positive_int, metavar="N", help="forget old frames beyond")
    parser.add_argument("--forget", choices=("oldest", "thin"), default="oldest", help="which frames go first")
    parser.add_argument("--realtime", action="store_true", help="play a file at its own pace")
    parser.add_argument("--drop", action="store_true", help="leave out ticks when the model is behind")
    parser.add_argument("--reconnect", type=int, default=0, metavar="N", help="open a source that broke off again")
    parser.add_argument("--seconds", type=float, metavar="N", help="end after so much of the source's time")
    parser.add_argument("--camera-format", metavar="NAME", help="libav's capture device: v4l2, avfoundation, dshow")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Watches until the source ends or Ctrl-C."""
    from ..loading import load_model_and_processor
    from ..terminal import quiet_progress_bars
    from .session import StreamingSession

    quiet_progress_bars()
    model, processor = load_model_and_processor(options)
    session = StreamingSession(
        model,
        processor,
        form="stream",
        fps=options.fps,
        horizon_seconds=options.horizon,
        max_cache_tokens=options.max_cache_tokens,
        forget=options.forget,
    )
    feed = session.open(
        options.source,
        realtime=options.realtime,
        when_behind="drop" if options.drop else "block",
        reconnect_attempts=options.reconnect,
        stop_after_seconds=options.seconds,
        camera_format=options.camera_format,
    )
    generation = {"max_new_tokens": options.max_new_tokens, **GREEDY}
    try:
        for message in session.watch(options.instruction, feed, threshold=options.threshold, **generation):
            print(f"[{message.seconds:.1f}s] {message.text}", flush=True)
    finally:
        feed.close()
        print(_summary(feed.report), file=sys.stderr, flush=True)


def _summary(report: Any) -> str:
    """The report in one line, without the counts that are zero."""
    counts = {
        "dropped": report.num_dropped_ticks,
        "in gaps": report.num_skipped_ticks,
        "damaged packets or frames": report.num_corrupt,
        "frames out of order": report.num_unordered_frames,
        "clock jumps": report.num_clock_jumps,
        "reconnects": report.num_reconnects,
    }
    said = [f"{count} {name}" for name, count in counts.items() if count]
    return ", ".join([f"watched {report.num_ticks} ticks", *said])
