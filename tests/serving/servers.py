"""A tiny checkpoint that answers in letters, media, and real servers of both in processes of their own."""

import base64
import contextlib
import functools
import http.server
import os
import signal
import string
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from PIL import Image

from tests.media import numbered_picture, write_clip
from videollama3.random_checkpoint import build_random

MAX_NEW_TOKENS = 12


def write_checkpoint(folder):
    """Writes it.

    Weights large enough, of a seed whose answers differ in every case of the tests; letters only, since half a
    character of several bytes is shown by one decoder and held back by another.
    """
    model, processor = build_random(seed=7, hidden_size=128, num_hidden_layers=2, max_tokens=512)
    vocabulary = processor.tokenizer.get_vocab()
    letters = [vocabulary[letter] for letter in string.ascii_letters + string.digits]
    others = sorted(set(range(model.lm_head.weight.shape[0])) - set(letters))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3 if "language_model" in name else 5)
        model.lm_head.weight[others] = 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_media(folder):
    """A picture, a clip of four frames and one of forty, as the model samples them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(numbered_picture(77, 60, 182)).save(folder / "picture.png")
    write_clip(folder / "clip.mp4", 100, 25)
    write_clip(folder / "long.mp4", 80, 2)
    return folder


def data_url(path):
    kind = "image/png" if path.suffix == ".png" else "video/mp4"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


class Server:
    """`videollama3 serve` as a user starts it, listening."""

    def __init__(self, process, log):
        self.process = process
        deadline = time.monotonic() + 600
        while "/v1 (Ctrl-C ends)" not in log.read_text():
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        self.url = log.read_text().split(" at ")[1].split(" (Ctrl-C")[0]

    def client(self):
        import openai

        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0)

    def end(self, number=signal.SIGTERM):
        """Sends a signal; returns the exit status and how many seconds the end took."""
        began = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(60), time.monotonic() - began


@contextlib.contextmanager
def running_server(log, *arguments):
    """Its output goes to the file `log`."""
    command = [sys.executable, "-m", "videollama3", "serve", *map(str, arguments), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            yield Server(process, log)
        finally:
            process.kill()


@contextlib.contextmanager
def web_server(folder):
    """The files of a folder behind http; what lies under /slow/ is sent once `release` is set.

    Yields the address and `release`.
    """
    release = threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/slow/"):
                release.wait(60)
                self.path = self.path.removeprefix("/slow")
            super().do_GET()

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", release
        release.set()
        server.shutdown()
