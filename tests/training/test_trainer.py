"""The Trainer on synthetic samples: one loss for every way to share an update, modules, resuming, saving."""

import math
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from videollama3.training.collator import PackingCollator, PaddingCollator
from videollama3.training.trainer import ModuleRates, RowLimits, VideoLlama3Trainer, module_of

from .synthetic import IMAGE, MIXED, TEXT, VIDEO, Samples, arguments, losses, tiny_model

# Python 3.12 warns of every fork in a process that has threads; torch has some.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

ALL = ModuleRates(encoder=2e-3, projector=2e-3, llm=2e-3)
KINDS = [TEXT, VIDEO, IMAGE, MIXED, TEXT, TEXT, VIDEO, IMAGE]


def _trainer(
    folder, *, kinds=KINDS, rates=ALL, max_length=40, eval_kinds=None, dataset=None, use_muon=False, **changes
):
    model, processor = tiny_model()
    return VideoLlama3Trainer(
        model,
        arguments(folder, **changes),
        processor=processor,
        train_dataset=Samples(processor, kinds) if dataset is None else dataset,
        eval_dataset=None if eval_kinds is None else Samples(processor, eval_kinds, seed=9),
        rates=rates,
        limits=RowLimits(max_length=max_length),
        use_muon=use_muon,
    )


def _weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def _one_sgd_step(folder, **options):
    trainer = _trainer(folder, optim="sgd", warmup_steps=0, lr_scheduler_type="constant", max_grad_norm=0, **options)
    before = _weights(trainer)
    trainer.train()
    after = _weights(trainer)
    assert trainer.state.global_step == 1
    return losses(trainer)[0], {name: before[name] - after[name] for name in before}


# --- the loss of an update ---


def test_rows_of_an_update_equal_one_big_row(tmp_path):
    """Four rows of unequal numbers of labels, accumulated, against all samples in one row: loss and gradients."""
    rates = ModuleRates(1.0, 1.0, 1.0)
    loss, steps = _one_sgd_step(tmp_path / "a", rates=rates, max_length=48, gradient_accumulation_steps=4)
    expected, expected_steps = _one_sgd_step(tmp_path / "b", rates=rates, max_length=1000)
    # Measured worst case 4.8e-7 of 5.6; the mean of the rows' own means is off by 0.013.
    assert loss == pytest.approx(expected, abs=1e-5)
    for name, step in steps.items():
        # A step is the gradient (rate 1). Measured worst case 1.2e-7 of 0.67.
        torch.testing.assert_close(step, expected_steps[name], atol=2e-6, rtol=0, msg=name)


def test_supervised_tokens_are_counted_as_the_model_counts_them(tmp_path):
    trainer = _trainer(tmp_path, gradient_accumulation_steps=4)
    loader = trainer.get_train_dataloader()
    rows, num_items = trainer.get_batch_samples(iter(loader), len(loader), torch.device("cpu"))
    shifted = sum(int((row["labels"][:, 1:] != -100).sum()) for row in rows)
    plain = sum(int((row["labels"] != -100).sum()) for row in rows)
    dataset = trainer.train_dataset
    answers = sum(int((dataset[i]["labels"] != -100).sum()) for i in range(len(dataset)))
    assert int(num_items) == shifted == plain == answers


def test_an_update_without_labels_is_no_nan(tmp_path):
    class Unlabelled(Samples):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return {**sample, "labels": torch.full_like(sample["labels"], -100)}

    trainer = _trainer(tmp_path, dataset=Unlabelled(tiny_model()[1], KINDS))
    before = _weights(trainer)
    trainer.train()
    assert set(losses(trainer)) == {0.0}
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())


def test_the_loss_on_held_out_data_is_per_token(tmp_path):
    trainer = _trainer(tmp_path, eval_kinds=[TEXT, VIDEO, MIXED], max_length=30)
    dataset, collator = trainer.eval_dataset, PackingCollator.for_processor(trainer.processing_class)
    total, count = 0.0, 0
    trainer.model.eval()
    for i in range(len(dataset)):
        row = collator([dataset[i]])
        with torch.no_grad():
            total += trainer.model(**row, use_cache=False, num_items_in_batch=1).loss.item()
        count += int((row["labels"] != -100).sum())
    # Rows of one and two samples; measured worst case 9e-8 of 5.6, the mean of the rows' means is off by 4.6e-4.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, abs=1e-5)


# --- modules ---


def test_modules_by_name():
    model, _ = tiny_model()
    modules = {module_of(name) for name, _ in model.named_parameters()}
    assert modules == {"encoder", "projector", "llm"}
    assert module_of("base_model.model.model.projector.modules_to_save.default.readout.0.weight") == "projector"
    assert module_of("lm_head.weight") == module_of("model.language_model.embed_tokens.weight") == "llm"


@pytest.mark.parametrize(
    "rates",
    [ModuleRates(encoder=1e-3, projector=1e-3), ModuleRates(llm=1e-3), ModuleRates(projector=1e-3, llm=0.0)],
)
def test_frozen_modules_do_not_move_and_others_do(tmp_path, rates):
    trainer = _trainer(tmp_path, rates=rates, warmup_steps=0)
    before = _weights(trainer)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        moves = bool(rates.of(name))
        assert parameter.requires_grad is moves, name
        # A key's bias shifts all scores of a query alike: its gradient is zero but for rounding.
        if not moves or not name.endswith("k_proj.bias"):
            assert torch.equal(parameter, before[name]) is not moves, name


def test_each_module_has_its_rate(tmp_path):
    trainer = _trainer(tmp_path, rates=ModuleRates(1e-4, 1e-3, 5e-4), weight_decay=0.1, max_steps=3)
    trainer.train()
    assert {(g["module"], g["weight_decay"]) for g in trainer.optimizer.param_groups} == {
        (module, decay) for module in ("encoder", "projector", "llm") for decay in (0.0, 0.1)
    }
    names = ("learning_rate_encoder", "learning_rate_projector", "learning_rate_llm")
    logged = [entry for entry in trainer.state.log_history if "learning_rate_llm" in entry]
    # Two updates of warm-up: half the rates in the second.
    assert [logged[1][name] for name in names] == pytest.approx([5e-5, 5e-4, 2.5e-4])


@pytest.mark.parametrize(("rates", "expected"), [(ModuleRates(llm=1e-3), False), (ModuleRates(projector=1e-3), True)])
def test_text_gets_a_pruned_frame_where_the_encoder_or_the_projector_learns(tmp_path, rates, expected):
    rows = list(_trainer(tmp_path, kinds=[TEXT, TEXT], rates=rates).get_train_dataloader())
    assert [("pixel_values_videos" in row) for row in rows] == [expected] * len(rows)


def test_rates_that_train_nothing():
    model, processor = tiny_model()
    with pytest.raises(ValueError, match=re.escape("Expected a learning rate above 0 for a module at least")):
        VideoLlama3Trainer(
            model, arguments("unused"), processor=processor, rates=ModuleRates(llm=0.0), limits=RowLimits()
        )


def test_several_gpus_in_one_process_simulated_by_their_number(tmp_path):
    """Trainer would divide patches and grids of one row among them."""
    model, processor = tiny_model()
    several = arguments(tmp_path)
    several._n_gpu = 2
    with pytest.raises(ValueError, match=re.escape("Expected one GPU for each process, got one that sees 2")):
        VideoLlama3Trainer(model, several, processor=processor, rates=ModuleRates(llm=1.0), limits=RowLimits())


def test_a_row_is_a_batch(tmp_path):
    with pytest.raises(
        ValueError, match=re.escape("Expected per_device_train_batch_size=1 (a packed row is a batch)")
    ):
        _trainer(tmp_path, per_device_train_batch_size=2)


# --- order, workers, resuming ---


def test_any_number_of_workers_gives_the_same_losses(tmp_path):
    runs = [_trainer(tmp_path / str(workers), dataloader_num_workers=workers) for workers in (0, 2)]
    for trainer in runs:
        trainer.train()
    assert losses(runs[0]) == losses(runs[1])


@pytest.mark.parametrize("use_muon", [False, True])
def test_a_run_resumes_in_mid_epoch(tmp_path, use_muon):
    options = {
        "use_muon": use_muon,
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 5,
        "warmup_steps": 0,
    }
    whole = _trainer(tmp_path / "whole", **options)
    whole.train()
    updates_per_epoch = whole.state.max_steps // 3
    assert 5 % updates_per_epoch, "the checkpoint is to stand inside an epoch"
    resumed = _trainer(tmp_path / "resumed", **options)
    read = []
    original = resumed.train_dataset.__getitem__
    resumed.train_dataset.__class__ = type(
        "Watched", (Samples,), {"__getitem__": lambda self, index: read.append(index) or original(index)}
    )
    resumed._lengths[id(resumed.train_dataset)] = whole._lengths[id(whole.train_dataset)]
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert losses(resumed) == losses(whole)
    # What came before was not read again: samples of the remaining rows, and no others.
    plans = [pack for epoch in range(3) for pack in whole.train_sampler.plan(epoch)]
    assert sorted(read) == sorted(index for pack in plans[5:] for index in pack)


def test_gradient_checkpointing_changes_no_loss(tmp_path):
    known = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    plain = _trainer(tmp_path / "a")
    checkpointed = _trainer(tmp_path / "b", **{name: True, f"{name}_kwargs": {"use_reentrant": False}})
    plain.train()
    checkpointed.train()
    # Measured worst case 0.
    assert losses(checkpointed) == pytest.approx(losses(plain), abs=1e-5)


def test_a_stream_is_trained_on(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __init__(self, samples):
            self.samples = samples

        def __iter__(self):
            return (self.samples[i] for i in range(len(self.samples)))

    stream = Stream(Samples(tiny_model()[1], KINDS))
    trainer = _trainer(tmp_path, dataset=stream, max_steps=12, gradient_accumulation_steps=2, warmup_steps=0)
    trainer.train()
    assert trainer.state.global_step == 12
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5


# --- what is saved ---


def test_a_checkpoint_is_a_model_and_a_processor(tmp_path):
    trainer = _trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == "VideoLlama3Processor"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name)), name
    assert "use_cache" not in model.config.to_diff_dict()


def test_muon_has_sixteen_times_the_rate_and_the_log_says_the_module_s(tmp_path):
    trainer = _trainer(tmp_path, use_muon=True, warmup_steps=0, lr_scheduler_type="constant", logging_steps=1)
    trainer.train()
    rates = {(group["module"], group["muon"]): group["lr"] for group in trainer.optimizer.optimizer.param_groups}
    assert rates[("llm", True)] == pytest.approx(16 * 2e-3)
    assert rates[("llm", False)] == pytest.approx(2e-3)
    assert ("projector", True) not in rates
    entry = next(entry for entry in trainer.state.log_history if "learning_rate_llm" in entry)
    assert entry["learning_rate_llm"] == pytest.approx(2e-3)


def test_losses_fall(tmp_path):
    trainer = _trainer(tmp_path, num_train_epochs=6, warmup_steps=0)
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    # Measured 5.4 to 4.4.
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.7


# --- transformers' own Trainer ---


def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=re.escape("Expected label_smoothing_factor=0, got 0.1")):
        _trainer(tmp_path, label_smoothing_factor=0.1)


def test_metrics_of_transformers_trainer_are_given_logits_of_mixed_rows(tmp_path):
    """Pictures in some rows and none in others; features of media are no predictions."""
    model, processor = tiny_model()
    samples = Samples(processor, [TEXT, IMAGE, VIDEO, TEXT])
    seen = []

    def metrics(prediction):
        seen.append((type(prediction.predictions), prediction.predictions.shape, prediction.label_ids.shape))
        return {"rows": len(prediction.predictions)}

    trainer = Trainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=1, eval_strategy="no"),
        data_collator=PaddingCollator.for_processor(processor),
        eval_dataset=samples,
        compute_metrics=metrics,
    )
    assert trainer.evaluate()["eval_rows"] == 4
    ((kind, shape, labels),) = seen
    assert kind is np.ndarray
    assert (shape[:2], shape[2]) == (labels, model.config.text_config.vocab_size)


def test_any_set_is_predicted_as_the_held_out_one(tmp_path):
    trainer = _trainer(tmp_path, eval_kinds=[TEXT, VIDEO, IMAGE])
    held_out = trainer.evaluate()["eval_loss"]
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(held_out, abs=1e-6)
