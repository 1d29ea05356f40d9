"""Recipes: what a file may say, and that the shipped ones train."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from videollama3 import cli
from videollama3.training.packing import PackedBatchSampler
from videollama3.training.recipe import load_recipe, recipe_from_dict, training_arguments
from videollama3.training.run_checkpoints import last_checkpoint
from videollama3.training.training_run import accumulation_steps, mean_loss, row_limits, run_recipe

from .tiny_task import RECIPES, recipe_overrides, write_rows

# Python 3.12 warns of every fork in a process that has threads; torch has some.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def _minimal(**sections):
    return {
        "model": {"path": "start"},
        "data": {"train": ["rows.jsonl"]},
        "rates": {"llm": 1e-5},
        "output": {"folder": "out"},
        **sections,
    }


# --- what a file may say ---


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_read(path):
    recipe = load_recipe(path)
    assert recipe.output.folder == f"runs/{path.stem}"
    opening = path.read_text().split("model:")[0]
    assert f"train recipes/{path.name}" in opening


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_stages_have_the_papers_settings(number):
    recipe = load_recipe(RECIPES / f"stage{number}.yaml")
    rates = {1: (1e-5, 1e-3, None)}.get(number, (2e-6, 1e-5, 1e-5))
    assert dataclasses.astuple(recipe.rates) == rates
    assert recipe.model.prune is (number >= 3)
    assert recipe.model.image_merge_size == (2 if number == 4 else None)
    assert recipe.model.gradient_checkpointing
    assert (recipe.data.max_length, recipe.data.max_visual_tokens, recipe.data.max_frames) == (16384, 10240, 180)
    schedule = recipe.schedule
    assert (schedule.decay, schedule.warmup, schedule.weight_decay) == ("cosine", 0.03, 0.0)
    assert (schedule.epochs, schedule.precision, recipe.batch.samples_per_update) == (1, "bf16", 128)


def test_every_field_has_a_meaning():
    recipe = recipe_from_dict(_minimal(adapter={}))
    for section in (recipe, *(getattr(recipe, field.name) for field in dataclasses.fields(recipe))):
        text = type(section).__doc__
        for field in dataclasses.fields(section):
            assert re.search(rf"^        {field.name}: \w", text, flags=re.MULTILINE), field.name


def test_overrides_are_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(_minimal()))
    overrides = [
        "rates.llm=1e-4",
        "data.train=[a.jsonl, b.jsonl]",
        "adapter.rank=8",
        "model.prune=true",
        "rates.encoder=null",
    ]
    recipe = load_recipe(path, overrides)
    assert recipe.rates.llm == 1e-4
    assert recipe.rates.encoder is None
    assert recipe.data.train == ("a.jsonl", "b.jsonl")
    assert recipe.adapter.rank == 8
    assert recipe.model.prune is True


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (_minimal(rates={"lm": 1}), "Expected a key of the recipe, got rates.lm: did you mean llm?"),
        (_minimal(zzz={}), "got zzz: there are model, data, rates, output, batch, schedule, adapter."),
        ({"data": {}, "rates": {}, "output": {"folder": "a"}}, "Expected model in the recipe, got none"),
        (_minimal(model={}), "Expected model.path in the recipe, got none: set model.path=..."),
        (_minimal(rates=3), "Expected rates as a section of keys, got 3."),
        (_minimal(rates={"llm": "fast"}), "Expected rates.llm as a number, got 'fast'."),
        (_minimal(batch={"window": 1.5}), "Expected batch.window as a whole number, got 1.5."),
        (_minimal(model={"path": "a", "prune": 1}), "Expected model.prune as true or false, got 1."),
        (_minimal(data={"train": [1]}), "Expected data.train as a list of strings, got [1]."),
        (_minimal(schedule={"precision": "fp8"}), "Expected schedule.precision as one of bf16, fp32, got 'fp8'."),
        (
            _minimal(data={"train": "a", "streaming": True}),
            "Expected schedule.max_steps and batch.gradient_accumulation_steps with data.streaming",
        ),
        (_minimal(schedule={"max_steps": -1}), "Expected schedule.max_steps of at least 1, got -1."),
        (_minimal(rates={"encoder": 0}), "Expected rates.encoder, rates.projector or rates.llm above 0, got none"),
        (_minimal(schedule={"warmup": 1}), "Expected schedule.warmup as a share of all updates, below 1, got 1."),
        (
            _minimal(data={"train": "org/set", "eval": "org/set"}),
            "Expected other rows in data.eval than in data.train, got the split 'train' of org/set in both: set "
            "data.eval_split.",
        ),
        (_minimal(schedule={"epochs": 0}), "Expected schedule.epochs above 0, got 0.0."),
        (_minimal(batch={"window": 0}), "Expected batch.window of at least 1, got 0."),
        (
            _minimal(model={"path": "a", "unpruned_share": 1.5}),
            "Expected model.unpruned_share of at least 0 and at most 1, got 1.5.",
        ),
        (_minimal(adapter={"rank": 0}), "Expected adapter.rank of at least 1, got 0."),
        (_minimal(rates={"projector": 1e-3}, adapter={}), "Expected rates.llm with an adapter"),
        (_minimal(adapter={"targets": "llm_and_encoder"}), "Expected rates.encoder with adapter.targets=llm_and_enc"),
        (
            _minimal(rates={"llm": 1e-4, "encoder": 1e-5}, adapter={}),
            "Expected adapter.targets=llm_and_encoder with rates.encoder=1e-05, got llm",
        ),
    ],
)
def test_what_a_recipe_may_not_say(tree, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe_from_dict(tree)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rates.llm", "Expected an override as section.key=value, got 'rates.llm'."),
        ("model.path.name=3", "Expected 'path' in 'model.path.name=3' to be a section, got 'start'."),
    ],
)
def test_overrides_that_cannot_be(tmp_path, override, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(_minimal()))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(path, [override])


def test_a_file_that_is_no_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("a: [")
    with pytest.raises(ValueError, match="as YAML, got something else"):
        load_recipe(path)
    path.write_text("only text")
    with pytest.raises(ValueError, match="to hold sections such as model and data, got 'only text'"):
        load_recipe(path)


def test_a_recipe_of_the_package_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["model.path=a", "data.train=b", "output.folder=c"]
    assert load_recipe("stage4", overrides) == load_recipe(RECIPES / "stage4.yaml", overrides)
    message = "Expected a recipe as a YAML file or as one of lora, qlora, stage1, stage2, stage3, stage4, got 'stage5'"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        load_recipe("stage5")


def test_the_recipe_decides_the_precision_under_a_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for precision, expected in (("fp32", "no"), ("bf16", "bf16")):
        recipe = recipe_from_dict(_minimal(output={"folder": str(tmp_path)}, schedule={"precision": precision}))
        arguments = training_arguments(recipe, gradient_accumulation_steps=1, tensorboard=False, use_cpu=True)
        assert arguments.mixed_precision == expected


def test_the_mean_loss_counts_updates():
    assert mean_loss([]) is None
    # One update of 4, then nine of 2 on average.
    assert mean_loss([(1, 4.0), (10, 2.0)]) == pytest.approx(2.2)


def test_arguments_of_the_trainer(tmp_path):
    recipe = recipe_from_dict(_minimal(output={"folder": str(tmp_path)}, schedule={"max_steps": 7, "epochs": 3}))
    arguments = training_arguments(recipe, gradient_accumulation_steps=5, tensorboard=False, use_cpu=True)
    assert (arguments.max_steps, arguments.gradient_accumulation_steps, arguments.bf16) == (7, 5, True)
    assert arguments.warmup_steps == 0.03
    assert arguments.average_tokens_across_devices
    checkpointing = getattr(arguments, "activation_checkpointing", None) or arguments.gradient_checkpointing
    assert checkpointing


def test_rows_of_an_update_follow_from_samples():
    """Ten samples fit a row, so that 128 samples are about 13 rows; seven on each of two processes."""
    recipe = recipe_from_dict(_minimal(data={"train": "a", "max_length": 100}))
    lengths = [[10, 0, 0]] * 1000
    assert PackedBatchSampler(lengths, max_length=100).num_packs == 100
    assert accumulation_steps(recipe, lengths, world_size=1) == 13
    assert accumulation_steps(recipe, lengths, world_size=2) == 6
    assert row_limits(recipe).max_length == 100
    given = recipe_from_dict(_minimal(batch={"gradient_accumulation_steps": 4}))
    assert accumulation_steps(given, lengths, world_size=2) == 4


def test_the_last_complete_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for number, content in ((2, "{}"), (10, "{}"), (12, '{"global'), (14, None)):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        if content is not None:
            (folder / "trainer_state.json").write_text(content)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_nothing_to_resume_from(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(_minimal(output={"folder": str(tmp_path / "out")})))
    assert cli.main(["train", str(path), "--resume"]) == 1
    assert "Expected a complete checkpoint to resume from in" in capsys.readouterr().err


# --- that they train ---


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_of_every_stage_goes_down(task, tmp_path, stage):
    # All rows in one, so that the losses of all updates are of the same samples.
    rates = ["rates.encoder=1e-3", "rates.projector=1e-2"] if stage == "stage1" else ["rates.llm=3e-3"]
    more = (*rates, "schedule.epochs=12", "schedule.precision=bf16", "data.max_length=4000")
    record = run_recipe(load_recipe(RECIPES / f"{stage}.yaml", recipe_overrides(task, tmp_path, *more)))
    losses = _losses(tmp_path)
    assert len(losses) == 12
    # Measured 5.605 to 5.558 in stage 1, where a random language model stays as it is, and to 4.605 in the others.
    assert losses[-1] < losses[0] - (0.03 if stage == "stage1" else 0.5)
    assert record["final_train_loss"] == losses[-1]
    assert record["eval"]["eval_loss"] < losses[0]
    start, trained = load_file(f"{task[0]}/model.safetensors"), load_file(tmp_path / "model.safetensors")
    for name, weight in trained.items():
        if stage == "stage1" and ("language_model" in name or "lm_head" in name):
            assert torch.equal(weight, start[name].bfloat16()), name
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.video_processor.use_token_compression is (stage in ("stage3", "stage4"))
    assert processor.image_processor.merge_size == (2 if stage == "stage4" else 1)


def test_a_run_from_the_command_line(task, tmp_path, capsys):
    """Trains, and leaves a folder that answers, with a record and a card."""
    arguments = ["train", str(RECIPES / "stage4.yaml"), *recipe_overrides(task, tmp_path, "schedule.max_steps=2")]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "trained 2 updates, last loss" in out
    assert f"wrote {tmp_path}" in out
    record = json.loads((tmp_path / "training_record.json").read_text())
    assert record["base_model"] == task[0]
    assert record["data"] == [task[1]]
    assert record["num_train_samples"] == 10
    assert record["recipe"]["rates.llm"] == 1e-5
    assert set(record["versions"]) == {"python", "torch", "transformers"}
    assert "eval_loss" in record["eval"]
    assert (tmp_path / "README.md").is_file()
    assert not (tmp_path / "training_args.bin").exists()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == torch.bfloat16
    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor(text="hello", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize(("max_length", "num_rows"), [(170, 8), (4000, 10)])
def test_rows_that_max_steps_does_not_come_to_are_not_read(task, tmp_path, max_length, num_rows):
    """Two updates of three samples take six and two to spare; where a row holds more samples than that, all are read."""
    more = ["schedule.max_steps=2", "batch.samples_per_update=3", f"data.max_length={max_length}", "data.eval=[]"]
    more.append("batch.gradient_accumulation_steps=null")
    record = run_recipe(load_recipe(RECIPES / "stage4.yaml", recipe_overrides(task, tmp_path, *more)))
    assert record["num_updates"] == 2
    assert (record["num_train_samples"], record["num_skipped_samples"]) == (num_rows, 0)
    assert record["num_unread_samples"] == 10 - num_rows
    assert record["num_epochs"] <= (1 if num_rows < 10 else 2)
    # Measured for one process, a run of more finds what it needs beyond that, and reads no row twice.
    (path,) = (tmp_path / "length_index").glob("*.npy")
    assert (np.load(path)[:, 0] > 0).sum() == num_rows
    assert _losses(tmp_path)[-1] == record["final_train_loss"]


def test_a_sample_beyond_a_limit_is_named(task, tmp_path):
    more = ("batch.gradient_accumulation_steps=null", "batch.max_patches=5", "data.eval=[]")
    with pytest.raises(ValueError, match=r"max_patches=5, got \d+ patches in sample rows.jsonl row \d"):
        run_recipe(load_recipe(RECIPES / "stage4.yaml", recipe_overrides(task, tmp_path, *more)))


def test_rows_that_are_skipped_are_told_and_tried_again(task, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    text = Path(task[1]).read_text()
    rows.write_text(text + json.dumps({**json.loads(text.splitlines()[0]), "image": ["late.png"]}) + "\n")
    more = [f"data.train={rows}", f"data.media_root={Path(task[1]).parent}", "data.eval=[]", "schedule.max_steps=1"]
    arguments = ["train", str(RECIPES / "stage4.yaml"), *recipe_overrides(task, tmp_path / "out", *more)]
    assert cli.main([*arguments, "data.on_error=skip"]) == 0
    assert "left out 1 samples that could not be used (`videollama3 data check` says why)" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "training_record.json").read_text())
    assert (record["num_train_samples"], record["num_skipped_samples"]) == (10, 1)
    # What was skipped is no known length: a run that may not skip says so.
    assert cli.main([*arguments, "data.on_error=raise", "output.overwrite=true"]) == 1
    assert "rows.jsonl row 10" in capsys.readouterr().err


def test_a_bad_row_of_the_held_out_set_is_found_before_training(task, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(
        json.dumps(
            {
                "image": ["none.png"],
                "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Nothing."}],
            }
        )
        + "\n"
    )
    recipe = load_recipe(RECIPES / "stage4.yaml", recipe_overrides(task, tmp_path / "out", f"data.eval={held_out}"))
    for measure_for in (1, None):
        with pytest.raises(ValueError, match=r"held_out.jsonl row 0"):
            run_recipe(recipe, measure_for=measure_for)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_run_that_resumes_with_other_samples_warns(task, tmp_path, caplog):
    more = ["output.save_every=1", "data.eval=[]", "data.max_length=170"]
    recipe = RECIPES / "stage2.yaml"
    run_recipe(load_recipe(recipe, recipe_overrides(task, tmp_path, *more, "schedule.max_steps=2")))
    run_recipe(load_recipe(recipe, recipe_overrides(task, tmp_path, *more, "schedule.max_steps=3")), resume=True)
    assert "reads other samples" not in caplog.text
    changed = [*more, "batch.window=2"]
    run_recipe(load_recipe(recipe, recipe_overrides(task, tmp_path, *changed, "schedule.max_steps=4")), resume=True)
    assert "This run reads other samples, or in another order, than the one that wrote" in caplog.text
    # A checkpoint says under which plan it was written.
    caplog.clear()
    run_recipe(load_recipe(recipe, recipe_overrides(task, tmp_path, *changed, "schedule.max_steps=5")), resume=True)
    assert "reads other samples" not in caplog.text
    run_recipe(load_recipe(recipe, recipe_overrides(task, tmp_path, *more, "schedule.max_steps=6")), resume=True)
    assert "reads other samples" in caplog.text
    # Rows of the same lengths, but others.
    caplog.clear()
    other = tmp_path / "other.jsonl"
    other.write_text(Path(task[1]).read_text())
    data = [f"data.train={other}", f"data.media_root={Path(task[1]).parent}", "schedule.max_steps=7"]
    run_recipe(load_recipe(recipe, recipe_overrides(task, tmp_path, *more, *data)), resume=True)
    assert "reads other samples" in caplog.text


def test_the_last_update_is_logged(task, tmp_path):
    more = ("schedule.max_steps=3", "output.log_every=10", "data.eval=[]", "data.max_length=170")
    record = run_recipe(load_recipe(RECIPES / "stage2.yaml", recipe_overrides(task, tmp_path, *more)))
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    logged = [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]
    assert [step for step, _ in logged] == [1, 3]
    assert record["final_train_loss"] == logged[-1][1]
    assert record["mean_train_loss"] == pytest.approx((logged[0][1] + 2 * logged[1][1]) / 3)
    # A checkpoint's too, so that what a run that resumes logs next begins there.
    run_recipe(
        load_recipe(
            RECIPES / "stage2.yaml",
            recipe_overrides(task, tmp_path, *more, "output.save_every=2", "output.overwrite=true"),
        )
    )
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]


def test_a_streamed_run(task, tmp_path):
    more = ("data.streaming=true", "schedule.max_steps=3", "batch.buffer_size=4", "data.eval=[]", "data.workers=2")
    record = run_recipe(load_recipe(RECIPES / "stage2.yaml", recipe_overrides(task, tmp_path, *more)))
    assert record["num_updates"] == 3
    assert record["num_train_samples"] is None
    assert record["num_epochs"] is None
    assert "\n| epochs |" not in (tmp_path / "README.md").read_text()
    assert record["eval"] == {}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_counts_each_bad_row_once(task, tmp_path, capsys, workers):
    lines = Path(task[1]).read_text().splitlines()
    rows = tmp_path / "rows.jsonl"
    bad = json.dumps({**json.loads(lines[0]), "image": ["nowhere.png"]})
    rows.write_text("\n".join([*lines[:2], bad, *lines[2:4]]) + "\n")
    more = [f"data.train={rows}", f"data.media_root={Path(task[1]).parent}", "data.eval=[]", "data.on_error=skip"]
    # More than there are rows: the stream begins again.
    more += ["data.streaming=true", "schedule.max_steps=4", "batch.buffer_size=2", f"data.workers={workers}"]
    assert cli.main(["train", str(RECIPES / "stage2.yaml"), *recipe_overrides(task, tmp_path / "out", *more)]) == 0
    assert "left out 1 samples that could not be used" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "training_record.json").read_text())["num_skipped_samples"] == 1


def test_a_sample_of_a_stream_beyond_a_limit_is_named(task, tmp_path):
    more = ["batch.max_patches=5", "data.eval=[]", "data.streaming=true", "schedule.max_steps=1", "data.workers=0"]
    with pytest.raises(ValueError, match=r"max_patches=5, got \d+ patches in sample rows.jsonl row \d"):
        run_recipe(load_recipe(RECIPES / "stage4.yaml", recipe_overrides(task, tmp_path, *more)))


def test_a_stream_of_one_shard_is_read_by_one_worker(task, tmp_path, caplog, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [json.loads(line) for line in Path(task[1]).read_text().splitlines()]
    (tmp_path / "rows").mkdir()
    texts = [{"conversations": row["conversations"]} for row in rows if "image" not in row and "video" not in row]
    datasets.Dataset.from_list(texts).to_parquet(str(tmp_path / "rows" / "train.parquet"))
    more = ["data.streaming=true", "schedule.max_steps=2", "batch.buffer_size=2", "data.eval=[]", "data.workers=2"]
    more.append(f"data.train={tmp_path / 'rows'}")
    record = run_recipe(load_recipe(RECIPES / "stage2.yaml", recipe_overrides(task, tmp_path / "out", *more)))
    assert record["num_updates"] == 2
    assert "1 of 2 workers read" in caplog.text


def test_tensorboard_is_written_where_it_is_installed(task, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = recipe_overrides(task, tmp_path, "schedule.max_steps=2")
    run_recipe(load_recipe(RECIPES / "stage2.yaml", overrides))
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    accumulator = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in accumulator.Scalars("train/loss")] == [1, 2]
    assert "train/learning_rate_encoder" in accumulator.Tags()["scalars"]


def test_measuring_alone(task, tmp_path, capsys):
    arguments = ["train", str(RECIPES / "stage2.yaml"), *recipe_overrides(task, tmp_path), "--measure-only"]
    assert cli.main(arguments) == 0
    assert "measured 10 samples" in capsys.readouterr().out
    assert len(list((tmp_path / "length_index").glob("lengths-*.npy"))) == 1
    # Eight processes take eight rows an update at least, however few samples are asked for.
    more = ("schedule.max_steps=1", "batch.samples_per_update=1", "batch.gradient_accumulation_steps=null")
    for processes, printed in (((), "measured 2 samples"), (("8",), "measured 10 samples")):
        arguments = ["train", "stage2", *recipe_overrides(task, tmp_path, *more), "--measure-only", *processes]
        assert cli.main(arguments) == 0
        assert printed in capsys.readouterr().out
    assert not (tmp_path / "model.safetensors").exists()


def test_runs_into_other_folders_share_lengths(task, tmp_path):
    def measured(folder):
        told = []
        more = [f"data.length_folder={tmp_path / 'lengths'}", "data.workers=0", "data.eval=[]"]
        recipe = load_recipe(RECIPES / "stage2.yaml", recipe_overrides(task, tmp_path / folder, *more))
        run_recipe(recipe, measure_for=1, progress=lambda done, total: told.append((done, total)))
        return told

    assert measured("a")[-1] == (10, 10)
    assert measured("b") == []
    assert not list(tmp_path.rglob("length_index"))


def test_a_run_that_begins_anew_wants_a_folder_without_checkpoints(task, tmp_path):
    more = ("schedule.max_steps=2", "output.save_every=1")
    run_recipe(load_recipe(RECIPES / "stage2.yaml", recipe_overrides(task, tmp_path, *more)))
    (tmp_path / "checkpoint-best").mkdir()
    message = re.escape("a later --resume would take for its own: pass --resume to go on")
    again = recipe_overrides(task, tmp_path, "schedule.max_steps=1")
    with pytest.raises(ValueError, match=message):
        run_recipe(load_recipe(RECIPES / "stage2.yaml", again))
    assert run_recipe(load_recipe(RECIPES / "stage2.yaml", again), measure_for=1)["num_train_samples"] == 10
    run_recipe(load_recipe(RECIPES / "stage2.yaml", [*again, "output.overwrite=true"]))
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-1", "checkpoint-best"], "of the earlier run 1 and 2; what is somebody's own stays"


def test_a_held_out_sample_beyond_a_limit_is_found_before_training(task, tmp_path):
    more = ("schedule.max_steps=2", "batch.max_patches=30")
    texts = [row for row in Path(task[1]).read_text().splitlines() if '"video"' not in row and '"image"' not in row]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts) + "\n")
    overrides = [*recipe_overrides(task, tmp_path / "out", *more), f"data.train={tmp_path / 'texts.jsonl'}"]
    with pytest.raises(ValueError, match=r"patches"):
        run_recipe(load_recipe(RECIPES / "stage2.yaml", overrides))
    assert not (tmp_path / "out" / "config.json").exists()


def test_what_was_trained_is_recorded_though_the_evaluation_fails(task, tmp_path):
    """A picture of the held-out set is gone since its length was measured."""
    held_out, out = Path(write_rows(tmp_path / "held_out", repeats=1)), tmp_path / "out"
    overrides = recipe_overrides(task, out, f"data.eval={held_out}", "schedule.max_steps=1")
    recipe = load_recipe(RECIPES / "stage2.yaml", overrides)
    run_recipe(recipe, measure_for=1)
    media = [path for path in held_out.parent.rglob("*") if path.suffix in (".png", ".mp4")]
    assert media
    for path in media:
        path.unlink()
    with pytest.raises(ValueError, match=re.escape(f"{held_out.name} row ")):
        run_recipe(recipe)
    record = json.loads((out / "training_record.json").read_text())
    assert record["num_updates"] == 1
    assert record["eval"] == {}
    assert (out / "README.md").is_file()
    assert (out / "config.json").is_file()


def test_an_update_has_no_more_rows_than_there_are_samples():
    recipe = recipe_from_dict(_minimal(batch={"samples_per_update": 128}))
    assert accumulation_steps(recipe, np.array([[10, 0, 0]]), world_size=1) == 1
    # Ten of a row's length each.
    assert accumulation_steps(recipe, np.array([[16384, 0, 0]] * 10), world_size=1) == 10


@pytest.mark.parametrize(
    "words",
    [
        ["stage2", "--resume", "SETTINGS"],
        ["--resume", "stage2", "SETTINGS"],
        ["stage2", "--resume", "CHECKPOINT", "SETTINGS"],
        ["stage2", "SETTINGS", "--resume"],
        ["stage2", "--debug", "SETTINGS", "--resume", "RUN"],
        ["stage2", "SETTINGS", "schedule.max_steps=9", "--resume", "schedule.max_steps=8", "schedule.max_steps=2"],
    ],
    ids=" ".join,
)
def test_settings_may_stand_anywhere(task, tmp_path, capsys, words):
    more = ["output.save_every=1", "schedule.max_steps=1", "data.eval=[]"]
    settings = recipe_overrides(task, tmp_path / "run", *more)
    assert cli.main(["train", "stage2", *settings]) == 0
    places = {"CHECKPOINT": [str(tmp_path / "run" / "checkpoint-1")], "RUN": [str(tmp_path / "run")]}
    places["SETTINGS"] = [*settings, "schedule.max_steps=2"]
    capsys.readouterr()
    assert cli.main(["train", *(part for word in words for part in places.get(word, [word]))]) == 0
    assert "trained 2 updates" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


def test_what_is_no_setting_is_told(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "stage4", "--debug", "nothing"])
    assert "unrecognized arguments: nothing" in capsys.readouterr().err


def test_the_folder_of_a_finished_run_is_no_checkpoint(task, tmp_path):
    more = ["schedule.max_steps=1", "data.eval=[]", "output.save_every=null"]
    run_recipe(load_recipe("stage2", recipe_overrides(task, tmp_path, *more)))
    assert (tmp_path / "trainer_state.json").is_file()
    recipe = load_recipe("stage2", recipe_overrides(task, tmp_path / "other", "schedule.max_steps=2"))
    with pytest.raises(ValueError, match="Expected a complete checkpoint to resume from"):
        run_recipe(recipe, resume=str(tmp_path))


def test_a_run_at_a_rate_of_0_says_so(task, tmp_path, caplog):
    more = ["data.eval=[]", "data.max_length=4096", "output.dtype=float32"]
    run_recipe(load_recipe("stage2", recipe_overrides(task, tmp_path / "a", *more, "schedule.warmup=0.03")))
    assert "This run makes 1 update(s), at a rate of 0" in caplog.text
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (task[0], tmp_path / "a"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    caplog.clear()
    run_recipe(load_recipe("stage2", recipe_overrides(task, tmp_path / "b", *more, "schedule.warmup=0")))
    assert "at a rate of 0" not in caplog.text


def test_a_tied_head_is_not_missed_in_a_checkpoint(task, tmp_path, caplog):
    more = ["output.save_every=1", "data.eval=[]"]
    for steps in (1, 2):
        settings = recipe_overrides(task, tmp_path, *more, f"schedule.max_steps={steps}")
        run_recipe(load_recipe("stage2", settings), resume=steps > 1)
    assert "missing keys in the checkpoint" not in caplog.text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("schedule.optimizer=adam", r"schedule.optimizer as muon or a name .*adamw.*, got 'adam'"),
        ("data.train=[]", "data.train with files, folders or Hub ids of rows, got none"),
        ("data.train=a.jsonl,b.jsonl", r"no such file: several files are a list, \[a.json, b.json\]"),
        ("model.path=nowhere/at/all", "model.path as a checkpoint folder .* got 'nowhere/at/all', where nothing is"),
        ("output.folder=FILE", "output.folder as a folder, got the file"),
        ("model.path=FILE", "model.path as a checkpoint folder .* got the file"),
        ("model.path=FOLDER", "model.path as a checkpoint folder .* got the folder .* without a config.json"),
    ],
)
def test_settings_are_named(task, tmp_path, setting, message):
    (tmp_path / "file").write_text("")
    setting = setting.replace("FILE", str(tmp_path / "file")).replace("FOLDER", str(tmp_path))
    with pytest.raises((ValueError, OSError), match=message):
        run_recipe(load_recipe("stage2", recipe_overrides(task, tmp_path / "out", setting)))


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_losses(task, tmp_path):
    more = ("schedule.epochs=8", "output.save_every=2", "output.keep=null", "rates.llm=1e-3")
    recipe = RECIPES / "stage2.yaml"
    whole = run_recipe(load_recipe(recipe, recipe_overrides(task, tmp_path / "whole", *more)))
    assert whole["num_updates"] >= 16
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "videollama3", "train", str(recipe), *recipe_overrides(task, killed, *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while last_checkpoint(killed) is None and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert not (killed / "training_record.json").exists()
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    # The same to the last bit, in mid-epoch and after.
    assert _losses(killed) == _losses(tmp_path / "whole")


def _losses(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]
