"""What a run remembers in its checkpoints, and from which it may go on."""

import json
import logging
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from videollama3.training.recipe import load_recipe
from videollama3.training.run_checkpoints import RunInCheckpoints, checkpoint_to_resume, updates_of, write_settings
from videollama3.training.training_run import run_recipe

from .tiny_task import RECIPES, recipe_overrides

# peft calls transformers by names that are on their way out; Python 3.12 warns of forks beside torch's threads.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def _checkpoint(recipe, step=7):
    """As a run leaves it, but for weights."""
    path = Path(recipe.output.folder) / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    write_settings(recipe, path)
    return str(path)


def _recipe(name, checkpoint_and_rows, folder, *more):
    return load_recipe(RECIPES / f"{name}.yaml", recipe_overrides(checkpoint_and_rows, folder, *more))


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("stage2", ["rates.llm=1e-1"], "got rates.llm=0.1 instead of 1e-05:"),
        ("stage2", ["rates.encoder=0"], "got rates.encoder=0.0 instead of 2e-06:"),
        ("stage2", ["schedule.optimizer=muon"], "got schedule.optimizer=muon instead of adamw_torch_fused:"),
        ("stage2", ["schedule.weight_decay=0.1"], "got schedule.weight_decay=0.1 instead of 0.0:"),
        (
            "lora",
            ["adapter.alpha=8", "adapter.rank=4"],
            "got adapter.rank=4 instead of 64, adapter.alpha=8 instead of 128:",
        ),
    ],
)
def test_settings_that_come_from_the_checkpoint_must_be_those_of_before(task, tmp_path, name, changes, told):
    checkpoint = _checkpoint(_recipe(name, task, tmp_path))
    assert checkpoint_to_resume(_recipe(name, task, tmp_path), True) == checkpoint
    with pytest.raises(ValueError, match=re.escape(told)):
        checkpoint_to_resume(_recipe(name, task, tmp_path, *changes), True)


def test_a_full_run_does_not_go_on_from_adapters(task, tmp_path):
    _checkpoint(_recipe("lora", task, tmp_path))
    with pytest.raises(ValueError, match=re.escape("adapter.rank=None instead of 64")):
        checkpoint_to_resume(_recipe("stage2", task, tmp_path), True)


def test_other_settings_and_old_checkpoints_go_on(task, tmp_path):
    checkpoint = _checkpoint(_recipe("stage1", task, tmp_path))
    # Frozen is frozen; a longer run, other logs and another shape of the schedule are the user's.
    more = ["rates.llm=0", "schedule.max_steps=99", "schedule.decay=constant", "output.log_every=3"]
    assert checkpoint_to_resume(_recipe("stage1", task, tmp_path, *more), True) == checkpoint
    (tmp_path / "checkpoint-7" / "run_settings.json").unlink()
    assert checkpoint_to_resume(_recipe("stage1", task, tmp_path, "rates.projector=9"), True) == checkpoint
    assert updates_of(checkpoint) == 7


def test_a_stream_with_other_settings_warns(task, tmp_path, caplog):
    steps = ["data.streaming=true", "schedule.max_steps=9"]
    checkpoint = _checkpoint(_recipe("stage2", task, tmp_path, *steps))
    with caplog.at_level(logging.WARNING):
        RunInCheckpoints(_recipe("stage2", task, tmp_path, *steps), None).warn_of_other_samples(checkpoint)
        assert not caplog.records
        other = _recipe("stage2", task, tmp_path, *steps, "data.max_frames=3", "batch.buffer_size=2")
        RunInCheckpoints(other, None).warn_of_other_samples(checkpoint)
    (record,) = caplog.records
    assert "(data.max_frames=3 instead of 180, batch.buffer_size=2 instead of 64)" in record.getMessage()


@pytest.mark.parametrize("length", ["schedule.max_steps=3", "schedule.epochs=1.5"])
def test_a_run_that_was_killed_after_its_last_update_makes_no_other(task, tmp_path, monkeypatch, length):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    more = [length, "output.save_every=1", "schedule.decay=constant", "output.dtype=float32"]
    recipe = _recipe("stage2", task, tmp_path, *more, "output.keep=null")
    whole = run_recipe(recipe)
    before = load_file(tmp_path / "model.safetensors")
    checkpoint = tmp_path / f"checkpoint-{whole['num_updates']}"
    for path in tmp_path.iterdir():
        if path.name not in (checkpoint.name, "length_index", "here"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = run_recipe(recipe, resume=True)
    assert again["num_updates"] == whole["num_updates"]
    for name in ("final_train_loss", "mean_train_loss", "eval"):
        assert again[name] == whole[name]
    assert list(tmp_path.glob("checkpoint-*")) == [checkpoint]
    assert list((tmp_path / "here").iterdir()) == []
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_state_with_which_a_checkpoint_counts_comes_last(task, tmp_path, monkeypatch):
    there = []
    save = TrainerState.save_to_json

    def look(state, path):
        there.append({path.name for path in Path(path).parent.iterdir()})
        save(state, path)

    monkeypatch.setattr(TrainerState, "save_to_json", look)
    run_recipe(_recipe("stage2", task, tmp_path, "schedule.max_steps=1", "output.save_every=1", "data.eval=[]"))
    wanted = {"run_settings.json", "sample_order.sha256", "rng_state.pth", "optimizer.pt", "scheduler.pt"}
    # The second is of the finished run.
    assert wanted < there[0]
    assert len(there) == 2


def test_two_runs_with_adapters_are_the_same(task, tmp_path):
    """Fresh weights come from the recipe's seed, whatever was drawn before."""
    pytest.importorskip("peft")
    more = ["adapter.rank=4", "schedule.max_steps=1", "data.eval=[]", "schedule.optimizer=adamw_torch"]
    weights = []
    for number in range(2):
        torch.randn(number + 1)
        run_recipe(_recipe("lora", task, tmp_path / str(number), *more))
        weights.append(load_file(tmp_path / str(number) / "adapter" / "adapter_model.safetensors"))
    assert any("lora_A" in name for name in weights[0])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# --- what is found before samples are measured ---


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (["schedule.decay=warmup_stable_decay"], ValueError, "needs no settings of its own (cosine, linear"),
        (["schedule.decay=cosin"], ValueError, "cosin"),
        (["model.attention=flash_attention_9"], ValueError, "flash_attention_9"),
        (["model.vision_encoder=EMPTY"], ValueError, "Expected weights of a vision encoder in model.vision_encoder"),
    ],
)
def test_settings_that_cannot_be_are_found_at_once(task, tmp_path, changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        run_recipe(_recipe("stage2", task, tmp_path, *(change.replace("EMPTY", str(tmp_path)) for change in changes)))
    assert not (tmp_path / "length_index").exists()


def test_an_adapter_is_no_model_to_train(task, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    recipe = _recipe("stage2", task, tmp_path / "out", f"model.path={tmp_path / 'adapter'}")
    with pytest.raises(ValueError, match=r"Expected a whole model as model\.path, got the adapter"):
        run_recipe(recipe)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_four_bits_without_a_card(task, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr("videollama3.training.training_run._installed", lambda package: True)
    with pytest.raises(ValueError, match=re.escape("Expected a CUDA device for adapter.four_bit")):
        run_recipe(_recipe("qlora", task, tmp_path))


def test_rows_that_hold_more_samples_than_an_update_should_warn(task, tmp_path, caplog):
    more = ["batch.gradient_accumulation_steps=null", "batch.samples_per_update=1", "schedule.max_steps=1"]
    with caplog.at_level(logging.WARNING):
        run_recipe(_recipe("stage1", task, tmp_path, *more, "data.max_length=2000", "data.eval=[]"))
    assert "instead of batch.samples_per_update=1, as a row of each of 1 processes holds" in caplog.text


_WRITER = """
import sys
from videollama3.training.recipe import load_recipe
from videollama3.training.run_checkpoints import write_settings

recipe = load_recipe(sys.argv[1], sys.argv[3:])
while True:
    write_settings(recipe, sys.argv[2])
"""


def test_settings_are_never_half_written(task, tmp_path):
    # A checkpoint counts as soon as its trainer state is there: a run killed just then must be able to go on.
    overrides = recipe_overrides(task, tmp_path)
    command = [sys.executable, "-c", _WRITER, str(RECIPES / "stage2.yaml"), str(tmp_path), *overrides]
    process = subprocess.Popen(command)
    path = tmp_path / "run_settings.json"
    try:
        deadline = time.monotonic() + 120
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(3000):
            assert json.loads(path.read_text())["output.folder"] == str(tmp_path)
    finally:
        process.kill()
        process.wait()
