"""The `videollama3 serve` command: a checkpoint behind transformers' own OpenAI-compatible server.

Arguments enter, answers over HTTP leave until Ctrl-C or SIGTERM; the application is built in
`transformers_server.py`.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from importlib.util import find_spec
from typing import Any

from ..loading import add_placement_arguments

_PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic")
# Answers under way get so long to end when the server is asked to.
_SECONDS_TO_FINISH = 3


def add_parser(commands: Any) -> None:
    """Adds the sub-command's parser."""
    parser = commands.add_parser(
        "serve",
        help="answer OpenAI clients over HTTP",
        description="Starts transformers' OpenAI-compatible server with one VideoLLaMA3; see docs/serving.md.",
    )
    parser.add_argument("model", metavar="FOLDER_OR_REPO", help="checkpoint in any of the three layouts")
    add_placement_arguments(parser)
    parser.add_argument("--model-name", metavar="NAME", help="what clients call it (default: as given here)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1)")
    parser.add_argument("--port", type=_port, default=8000, metavar="N", help="0 takes a free one (default 8000)")
    parser.add_argument(
        "--media-root", type=_folder, metavar="DIR", help="let clients name files below this folder (default: none)"
    )
    parser.add_argument("--no-system-prompt", action="store_true", help="leave out the released models' system prompt")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Serves until a signal ends it."""
    _check_packages()
    from transformers.utils import logging

    from ..loading import load_model_and_processor
    from ..terminal import quiet_progress_bars

    quiet_progress_bars()
    # The port first: it may be taken, and loading may take minutes.
    with _listen(options.host, options.port) as listener:
        model, processor = load_model_and_processor(options)
        # Its server warns of every request; the log of requests is uvicorn's.
        logging.set_verbosity_error()
        _serve(options, listener, model, processor)
    # At once: threads that still generate or fetch for clients now gone would be torn down in the middle of native
    # code, or waited for.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _serve(options: argparse.Namespace, listener: socket.socket, model: Any, processor: Any) -> None:
    import uvicorn

    from .media_access import MediaAccess
    from .transformers_server import build_application

    name = options.model_name or options.model
    application = build_application(
        model,
        processor,
        name=name,
        access=MediaAccess(options.media_root),
        add_system_prompt=not options.no_system_prompt,
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets=sockets)
            print(f"serving {name} at http://{shown}:{port}/v1 (Ctrl-C ends)", flush=True)

    server = Server(uvicorn.Config(application, log_level="info", timeout_graceful_shutdown=_SECONDS_TO_FINISH))

    def end(*_: Any) -> None:
        server.should_exit = True

    # Uvicorn raises the signal that ended it once more: with the usual handlers the process would die of it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    server.run(sockets=[listener])


def _check_packages() -> None:
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise ImportError(
            f"Expected the packages of a server, {', '.join(missing)} missing: pip install 'videollama3[serve]'."
        )


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        raise OSError(
            f"Expected a free address of this machine to listen at, got {host}:{port}: {error.strerror}."
        ) from error


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text}")
    return value


def _folder(text: str) -> str:
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"expected a folder, got {text!r}")
    return text
