"""The `videollama3 chat` command: questions about one video, each of which costs only its own tokens.

A video and lines of standard input enter, streamed answers leave; the conversation itself is left to `session.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from ..loading import GREEDY, add_model_arguments, add_sampling_arguments, is_image, sampling_options
from ..terminal import positive_int

if TYPE_CHECKING:
    from .session import StreamingSession

_HELP = """\
/frames  the frames held, with their kept tokens
/state   tokens, seconds and bytes held
/reset   forget what was said, keep the video
/quit    end, as Ctrl-D does
Ctrl-C breaks off an answer."""


def add_parser(commands: Any) -> None:
    """Adds the sub-command's parser."""
    parser = commands.add_parser(
        "chat", help="ask one question after another about a video", epilog=_HELP.replace("\n", "; ")
    )
    parser.add_argument("media", metavar="VIDEO", help="file, folder of pictures or URL")
    add_model_arguments(parser)
    parser.add_argument("--max-new-tokens", type=positive_int, default=512, metavar="N", help="of each answer")
    parser.add_argument("--no-system-prompt", action="store_true", help="leave out the released models' system prompt")
    add_sampling_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Reads the video, then answers line by line."""
    from ..loading import load_model_and_processor
    from ..terminal import progress_bar, quiet_progress_bars
    from .session import StreamingSession

    if is_image(options.media):
        raise ValueError(f"Expected a video to chat about, got the picture {options.media!r}: use videollama3 ask.")
    quiet_progress_bars()
    model, processor = load_model_and_processor(options)
    if options.no_prune:
        processor.video_processor.use_token_compression = False
    session = StreamingSession(
        model,
        processor,
        system_prompt=not options.no_system_prompt,
        max_visual_tokens=options.max_visual_tokens,
    )
    with progress_bar("reading") as progress:
        labels = session.show_video(options.media, progress=progress, **sampling_options(options))
    held = session.state()
    _note(
        f"{options.media}: {len(labels)} frames from {labels[0]:.1f} to {labels[-1]:.1f} s, "
        f"{held.num_kept_tokens} visual tokens. /help lists commands."
    )
    _Chat(session, {"max_new_tokens": options.max_new_tokens, **GREEDY}).run()


class _Chat:
    """Reads lines and answers them."""

    def __init__(self, session: StreamingSession, generation: dict[str, Any]) -> None:
        # Nothing has been said in it: what /reset goes back to.
        self._fresh = session
        self._session = session.fork()
        self._generation = generation
        self._is_terminal = sys.stdin.isatty()

    def run(self) -> None:
        """Until the input ends or asks to."""
        if self._is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives input() line editing and history
        while (line := self._read()) is not None:
            if line.startswith("/"):
                if line == "/quit":
                    return
                self._command(line)
            elif line:
                self._answer(line)

    def _read(self) -> str | None:
        try:
            return input("> " if self._is_terminal else "").strip()
        except EOFError:
            if self._is_terminal:
                print()
            return None
        except KeyboardInterrupt:
            if not self._is_terminal:
                raise
            # As shells do: away with the line, not with the conversation.
            print()
            return ""

    def _answer(self, question: str) -> None:
        answer = self._session.ask(question, **self._generation)
        try:
            with contextlib.closing(answer):
                for piece in answer:
                    print(piece, end="", flush=True)
            print(flush=True)
        except KeyboardInterrupt:
            print(flush=True)
            _note("broken off: question and answer are forgotten")
        except ValueError as error:
            _note(str(error))

    def _command(self, line: str) -> None:
        if line == "/frames":
            print(f"{'frame':>5}  {'time':>8}  {'kept':>6}  {'of':>6}")
            for number, frame in enumerate(self._session.frames):
                print(f"{number:>5}  {frame.seconds:>7.1f}s  {frame.num_kept:>6}  {frame.num_visual_tokens:>6}")
        elif line == "/state":
            for name, value in dataclasses.asdict(self._session.state()).items():
                print(f"{name}: {value}")
        elif line == "/reset":
            self._session = self._fresh.fork()
            _note("forgot what was said")
        elif line == "/help":
            print(_HELP)
        else:
            _note(f"there is no command {line.split()[0]}; /help lists them")
        sys.stdout.flush()


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
