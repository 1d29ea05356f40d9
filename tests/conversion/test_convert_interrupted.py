"""Conversions that are killed, and how much memory they take: real processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from videollama3.conversion.convert import convert_checkpoint
from videollama3.conversion.partial_folder import partial_folder

from .twins import read_json, stored

CONVERT = """
import sys, time
from videollama3.conversion.convert import convert_checkpoint

def slowly(done, total):
    print(done, total, flush=True)
    time.sleep(0.05)

convert_checkpoint(sys.argv[1], sys.argv[2], to="native", max_shard_size="100KB", overwrite=True, progress=slowly)
"""


@pytest.mark.slow
@pytest.mark.parametrize("there", [False, True])
def test_a_killed_run_leaves_nothing_that_looks_whole(golden_folder, tmp_path, there):
    destination = tmp_path / "out"
    if there:
        convert_checkpoint(golden_folder / "ckpt", destination, to="plugin")
    before = stored(destination)
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERT, str(golden_folder / "ckpt"), str(destination)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(30):
            assert process.stdout.readline()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
    leftover = tmp_path / f"out.partial-{process.pid}"
    assert {path.name for path in tmp_path.iterdir()} == {leftover.name} | ({"out"} if there else set())
    assert list(leftover.glob("*.safetensors"))
    assert not (leftover / "config.json").exists()
    assert stored(destination) == before
    report = convert_checkpoint(golden_folder / "ckpt", destination, to="native", overwrite=there)
    assert report.remarks == (f"removed {leftover}, left by a killed run",)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert read_json(destination / "config.json")["model_type"] == "video_llama_3"


def test_an_error_leaves_nothing(tmp_path):
    def fail():
        with partial_folder(str(tmp_path / "out")) as folder:
            (tmp_path / os.path.basename(folder) / "x").write_text("x")
            raise RuntimeError("full disk")

    with pytest.raises(RuntimeError, match="full disk"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_between_two_renames(tmp_path):
    """The old folder stands aside: it is put back, or removed where the new one is in place."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    aside = tmp_path / f"out.replaced-{gone.pid}"
    aside.mkdir()
    (aside / "old").write_text("old")
    said = []
    with pytest.raises(FileExistsError), partial_folder(str(tmp_path / "out"), say=said.append):
        pass
    assert said == [f"put {tmp_path / 'out'} back, which a killed run had moved aside"]
    assert (tmp_path / "out" / "old").read_text() == "old"
    aside.mkdir()
    with partial_folder(str(tmp_path / "out"), overwrite=True, say=said.append) as folder:
        (tmp_path / os.path.basename(folder) / "new").write_text("new")
    assert said[1:] == [f"removed {aside}, left by a killed run"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folders_of_running_processes_and_other_names_stay(tmp_path):
    others = [f"out.partial-{os.getppid()}", "out.partial-x", "out.partial-99999999x", "another.partial-99999999"]
    for name in others:
        (tmp_path / name).mkdir()
    with partial_folder(str(tmp_path / "out")):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*others, "out"}


def test_destinations_that_are_taken(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    with partial_folder(str(folder)) as partial:
        (tmp_path / os.path.basename(partial) / "x").write_text("1")
    message = "Expected '.*out' to be absent or empty, it has files: choose another, or pass --overwrite"
    with pytest.raises(FileExistsError, match=message), partial_folder(str(folder)):
        pass
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "file").write_text("x")
    for name in ("link", "file"):
        with (
            pytest.raises(FileExistsError, match="to be a folder or absent, got a file or a link"),
            partial_folder(str(tmp_path / name), overwrite=True),
        ):
            pass
    assert (folder / "x").read_text() == "1"


def test_a_destination_that_is_filled_meanwhile_stays(tmp_path):
    folder = tmp_path / "out"

    def convert():
        with partial_folder(str(folder)):
            folder.mkdir()
            (folder / "x").write_text("1")

    with pytest.raises(FileExistsError, match="to be absent or empty, it has files"):
        convert()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (folder / "x").read_text() == "1"


MEASURE = """
import resource, sys
from videollama3.conversion.convert import convert_checkpoint

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

source, destination, dtype, size = sys.argv[1:]
tiny = sys.argv[1] + "-tiny"
convert_checkpoint(tiny, destination + "-tiny", to="native")  # everything imported and used once
before = peak()
report = convert_checkpoint(source, destination, to="native", dtype=dtype or None, max_shard_size=size)
print(before, peak(), report.num_bytes, report.num_shards)
"""
NUM_SHARDS = 40


@pytest.fixture(scope="module")
def many_shards(golden_folder, tmp_path_factory):
    """40 shards of 30 MB: the golden twin with wide MLPs, in safetensors and as torch's files."""
    folder = tmp_path_factory.mktemp("many")
    config = read_json(golden_folder / "ckpt" / "config.json")
    layers, width = NUM_SHARDS, 64
    # Three matrices of 64 x 40960 in float32 are 31 MB per layer.
    changes = {"num_hidden_layers": layers, "intermediate_size": 40960, "max_window_layers": layers}
    tiny = folder / "safetensors-tiny"
    tiny.mkdir()
    for name in ("config.json", "model.safetensors"):
        (tiny / name).write_bytes((golden_folder / "ckpt" / name).read_bytes())
    from safetensors.torch import load_file

    golden = load_file(golden_folder / "ckpt" / "model.safetensors")
    other = {name: tensor for name, tensor in golden.items() if not name.startswith("model.layers.")}
    shapes = {"gate_proj": (40960, width), "up_proj": (40960, width), "down_proj": (width, 40960)}
    random = torch.Generator().manual_seed(0)
    for kind in ("safetensors", "bin"):
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text(json.dumps({**config, **changes}))
    (folder / "bin-tiny").symlink_to("safetensors-tiny")
    weight_map = {"safetensors": {}, "bin": {}}
    for i in range(layers):
        part = {re.sub(r"layers\.0", f"layers.{i}", name): t for name, t in golden.items() if "model.layers.0" in name}
        part.update({f"model.layers.{i}.mlp.{n}.weight": torch.randn(*s, generator=random) for n, s in shapes.items()})
        part.update(other if i == 0 else {})
        save_file(part, folder / "safetensors" / f"model-{i:05d}.safetensors", metadata={"format": "pt"})
        torch.save(part, folder / "bin" / f"pytorch_model-{i:05d}.bin")
        weight_map["safetensors"].update(dict.fromkeys(part, f"model-{i:05d}.safetensors"))
        weight_map["bin"].update(dict.fromkeys(part, f"pytorch_model-{i:05d}.bin"))
    for kind, index in (("safetensors", "model.safetensors.index.json"), ("bin", "pytorch_model.bin.index.json")):
        (folder / kind / index).write_text(json.dumps({"weight_map": weight_map[kind]}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype", "size"),
    [("safetensors", "", "100MB"), ("safetensors", "bfloat16", "5GB"), ("bin", "", "5GB")],
)
def test_memory_does_not_grow_with_the_checkpoint(many_shards, tmp_path, kind, dtype, size):
    """The bound is the largest shard and 200 MB (the promise: and 1 GB); the checkpoint has 1.26 GB."""
    destination = tmp_path / "out"
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(many_shards / kind), str(destination), dtype, size],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    before, after, num_bytes, num_shards = map(int, result.stdout.split())
    growth, largest = after - before, 33_000_000
    print(f"{kind} {dtype or 'as it is'}: {growth / 1e6:.0f} MB more, {time.monotonic() - started:.1f} s")
    assert num_bytes > (0.6e9 if dtype else 1.2e9)
    assert num_shards == (14 if size == "100MB" else 1)
    assert growth < largest + 200_000_000
