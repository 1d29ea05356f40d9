"""Fixtures of the tests that run vLLM: what transformers answers, and engines in processes of their own."""

import json
import os
import subprocess
import sys

import pytest

from tests.vllm import cases

ENGINE = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
}


def run_module(name, *arguments, **environment):
    """Runs a module of this folder; its output is shown when it fails."""
    command = [sys.executable, "-m", f"tests.vllm.{name}", *map(str, arguments)]
    done = subprocess.run(
        command, env={**ENGINE, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return cases.write_checkpoint(tmp_path_factory.mktemp("vllm") / "checkpoint")


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    return cases.write_media(tmp_path_factory.mktemp("vllm") / "media")


@pytest.fixture(scope="session")
def expected(checkpoint, media, tmp_path_factory):
    """What transformers answers, by name of the case."""
    output = tmp_path_factory.mktemp("vllm") / "reference.json"
    run_module("reference", checkpoint, media["moving"].parent, output)
    return json.loads(output.read_text())


@pytest.fixture(scope="session")
def ask_offline(checkpoint, media, tmp_path_factory):
    """Runs vLLM's offline engine with settings; returns what it answered."""

    def ask(folder=checkpoint, **settings):
        output = tmp_path_factory.mktemp("vllm") / "answers.json"
        # On one NUMA node vLLM wants to be told the cores of each of two ranks.
        binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if settings.get("tensor_parallel_size", 1) > 1 else {}
        run_module("offline", folder, media["moving"].parent, output, json.dumps(settings), **binding)
        return json.loads(output.read_text())

    return ask
