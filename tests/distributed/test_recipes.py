"""`videollama3 train` in two processes: rows left out and skipped, evaluation, the final model and its record."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.tiny_task import write_checkpoint, write_rows

from .launch import ROOT, start


def _train(folder, overrides, *, processes, recipe="stage2"):
    """Runs a recipe; returns its record, the logged losses, and what was printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", "videollama3", "train", recipe, f"output.folder={folder}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))}
    done = subprocess.run(
        [*command, *overrides],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((folder / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return json.loads((folder / "training_record.json").read_text()), losses, done.stdout


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    start, rows = write_checkpoint(tmp_path / "start"), write_rows(tmp_path / "data", repeats=4)
    held_out = write_rows(tmp_path / "held_out", repeats=1)
    with open(rows, "a") as file:
        # Two that cannot be read: one of them, or both, among the rows that are drawn.
        for _ in range(2):
            row = json.loads(Path(rows).read_text().splitlines()[0])
            file.write(json.dumps({**row, "image": ["none.png"]}) + "\n")
    overrides = [
        f"model.path={start}",
        f"data.train={rows}",
        f"data.eval={held_out}",
        "data.workers=1",
        "data.on_error=skip",
        "data.max_length=170",
        "batch.samples_per_update=4",
        "schedule.max_steps=3",
        "schedule.precision=fp32",
        "schedule.optimizer=sgd",
        "rates.llm=1e-2",
        "output.log_every=1",
        "output.dtype=float32",
    ]
    one, losses, _ = _train(tmp_path / "one", overrides, processes=1)
    two, others, printed = _train(tmp_path / "two", overrides, processes=2)
    counts = ("num_train_samples", "num_skipped_samples", "num_unread_samples", "num_updates")
    assert [two[name] for name in counts] == [one[name] for name in counts]
    assert one["num_unread_samples"] > 0
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert one["gradient_accumulation_steps"] == 2 * two["gradient_accumulation_steps"]
    assert printed.count("trained 3 updates") == 1
    # Measured worst case 0: the same rows in every update, summed in another order.
    assert others == pytest.approx(losses, abs=1e-4)
    assert two["eval"]["eval_loss"] == pytest.approx(one["eval"]["eval_loss"], abs=1e-4)
    weights, other_weights = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, atol=1e-5, rtol=0, msg=name)
    assert (tmp_path / "two" / "README.md").is_file()


@pytest.mark.slow
def test_adapters_in_two_processes_and_resumed_equal_one(tmp_path):
    """Losses, adapter and merged weights; the run that resumes begins in mid-epoch."""
    pytest.importorskip("peft")
    checkpoint, rows = write_checkpoint(tmp_path / "start"), write_rows(tmp_path / "data", repeats=4)
    overrides = [
        f"model.path={checkpoint}",
        f"data.train={rows}",
        "data.workers=0",
        "data.max_length=170",
        "batch.samples_per_update=4",
        "adapter.rank=4",
        # It would be drawn otherwise in each process.
        "adapter.dropout=0",
        "rates.llm=1e-2",
        "rates.projector=1e-3",
        "schedule.max_steps=4",
        "schedule.precision=fp32",
        "output.log_every=1",
        "output.save_every=2",
        "output.keep=null",
        "output.dtype=float32",
    ]
    one, losses, _ = _train(tmp_path / "one", overrides, processes=1, recipe="lora")
    two, others, _ = _train(tmp_path / "two", overrides, processes=2, recipe="lora")
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert len(losses) == 4
    assert losses[0] != losses[-1]
    assert others == pytest.approx(losses, abs=1e-4)
    files = ("model.safetensors", "adapter/adapter_model.safetensors")
    weights = {name: [load_file(tmp_path / run / name) for run in ("one", "two")] for name in files}
    for whole, shared in weights.values():
        assert whole.keys() == shared.keys()
        for name, weight in whole.items():
            # Measured worst case 0: the same rows in every update, summed in another order.
            torch.testing.assert_close(shared[name], weight, atol=1e-4, rtol=0, msg=name)

    for path in (tmp_path / "two").iterdir():
        if path.name not in ("checkpoint-2", "length_index"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, resumed, _ = _train(tmp_path / "two", [*overrides, "--resume"], processes=2, recipe="lora")
    assert resumed == others
    for name in files:
        after = load_file(tmp_path / "two" / name)
        assert all(torch.equal(after[key], weight) for key, weight in weights[name][1].items())


@pytest.mark.slow
def test_a_process_waits_for_lengths_as_long_as_it_takes(tmp_path):
    """Longer than the group that computes would: 6 against 2 seconds."""
    told = json.loads(start("slow_measuring.py", tmp_path, {}, processes=2, timeout=200).read_text())
    assert told[0] == told[1]
    assert all(length[0] > 0 for length in told[0])
