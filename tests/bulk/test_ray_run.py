"""Ray Data: the same results as without it, and the same after a kill."""

import json
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from tests.media import numbered_picture, write_clip
from videollama3.bulk.ray_run import _plan_actors
from videollama3.cli import main

NUM_CLIPS = 20

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'videollama3[ray]'")


@pytest.mark.parametrize(
    ("resources", "wanted", "planned"),
    [
        ({"CPU": 2.0}, None, (1, None)),
        ({"CPU": 8.0}, 7, (7, None)),
        ({"CPU": 32.0, "GPU": 4.0}, None, (4, 1)),
        ({"CPU": 32.0, "GPU": 4.0}, 2, (2, 1)),
    ],
)
def test_one_actor_per_gpu_or_one(resources, wanted, planned):
    assert _plan_actors(resources, wanted) == planned


@pytest.mark.parametrize(
    ("resources", "wanted", "message"),
    [
        ({"CPU": 1.0}, None, "at most 0 actors on a cluster of 1 processors, .* must stay free for reading, got 1"),
        ({"CPU": 8.0}, 8, "at most 7 actors on a cluster of 8 processors"),
        ({"CPU": 4.0, "GPU": 8.0}, None, "at most 3 actors on a cluster of 4 processors"),
        ({"CPU": 32.0, "GPU": 2.0}, 3, "at most one actor for each of 2 GPUs, got 3"),
    ],
)
def test_actors_that_would_never_get_anything_to_do_are_refused(resources, wanted, message):
    with pytest.raises(ValueError, match=message):
        _plan_actors(resources, wanted)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for i in range(NUM_CLIPS):
        pictures = [numbered_picture(11 * (i % 4) + k) for k in range(100)]
        write_clip(folder / f"{i:02d}.mp4", 25 + 12 * (i % 4), pictures=pictures, options={"preset": "ultrafast"})
    (folder / "07.mp4").write_bytes((folder / "07.mp4").read_bytes()[:700])
    return folder


def arguments(clips, output):
    options = ["--prompt", "What?", "--max-new-tokens", "24", "--max-batch-rows", "4"]
    return ["batch", str(clips), "-o", str(output), *options]


def command(clips, output):
    return [sys.executable, "-m", "videollama3", *arguments(clips, output), "--ray", "local"]


def results(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(NUM_CLIPS))
    return {line["index"]: (line.get("answer"), line.get("error"), line.get("num_visual_tokens")) for line in lines}


@pytest.fixture(scope="module")
def expected(clips, tmp_path_factory):
    output = tmp_path_factory.mktemp("local") / "out.jsonl"
    assert main(arguments(clips, output)) == 0
    return results(output)


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_results_are_those_without_ray(clips, expected, tmp_path):
    output = tmp_path / "out.jsonl"
    done = subprocess.run(command(clips, output), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{NUM_CLIPS - 1} of {NUM_CLIPS} rows answered, 1 failed" in done.stdout
    assert results(output) == expected
    assert "whole video file" in expected[7][1]
    assert "Running" not in done.stderr  # no progress bar of Ray in a pipe


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_run_goes_on_with_and_without_ray(clips, expected, tmp_path):
    output = tmp_path / "out.jsonl"
    for number in (1, 2):
        before = output.read_bytes().count(b"\n") if output.exists() else 0
        process = subprocess.Popen(command(clips, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not output.exists() or output.read_bytes().count(b"\n") < before + 2:
            assert process.poll() is None, f"run {number} ended before it was killed"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    written = output.read_bytes()
    time.sleep(1)
    assert output.read_bytes() == written
    assert written.count(b"\n") < NUM_CLIPS
    assert main(arguments(clips, output)) == 0
    assert results(output) == expected
