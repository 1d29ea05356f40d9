"""Adapters: what they are put on, what moves, and that merged weights answer as the adapter does."""

import pytest
import torch
from safetensors.torch import load_file

from videollama3 import VideoLlama3ForCausalLM
from videollama3.training.adapters import NOT_QUANTIZED, add_adapter, remove_empty_card
from videollama3.training.collator import PackingCollator
from videollama3.training.recipe import AdapterRecipe, load_recipe
from videollama3.training.trainer import ModuleRates, RowLimits, VideoLlama3Trainer
from videollama3.training.training_run import run_recipe

from .synthetic import IMAGE, MIXED, TEXT, VIDEO, Samples, arguments, tiny_model
from .tiny_task import RECIPES, recipe_overrides

pytest.importorskip("peft")
# peft calls transformers by names that are on their way out.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


def _adapted(targets, *, train_projector=True):
    model, processor = tiny_model()
    adapter = AdapterRecipe(rank=4, alpha=8, dropout=0.0, targets=targets)
    return add_adapter(model, adapter, train_projector=train_projector), processor


@pytest.mark.parametrize(("targets", "modules"), [("llm", {"llm"}), ("llm_and_encoder", {"llm", "encoder"})])
def test_targets(targets, modules):
    model, _ = _adapted(targets, train_projector=False)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trained)
    found = {"encoder" if "vision_model" in name else "llm" for name in trained}
    assert found == modules
    # Seven linear layers in each of two layers of the language model, six in each of two of the encoder, two factors.
    assert len(trained) == 2 * 2 * (7 + (6 if "encoder" in modules else 0))


def test_four_bits_are_for_the_layers_of_the_language_model_only():
    """By the rule with which transformers chooses; bitsandbytes itself does not run here."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    model, _ = tiny_model()
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    converted = {name for name in linear if should_convert_module(name, NOT_QUANTIZED)}
    assert converted == {name for name in linear if name.startswith("model.language_model.layers.")}
    assert len(converted) == 14


def test_an_encoder_that_replaces_the_models_is_in_the_merged_weights(task, tmp_path):
    other = VideoLlama3ForCausalLM.from_pretrained(task[0])
    with torch.no_grad():
        for parameter in other.model.vision_model.parameters():
            parameter.add_(1)
    other.model.vision_model.save_pretrained(tmp_path / "encoder")
    more = [f"model.vision_encoder={tmp_path / 'encoder'}", "adapter.rank=4", "schedule.max_steps=1"]
    more += ["output.dtype=float32", "schedule.optimizer=adamw_torch", "data.eval=[]"]
    run_recipe(load_recipe(RECIPES / "lora.yaml", recipe_overrides(task, tmp_path / "out", *more)))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in other.model.vision_model.named_parameters():
        assert torch.equal(weights[f"model.vision_model.{name}"], parameter), name


def test_adapters_and_the_projector_move_and_nothing_else(tmp_path):
    model, processor = _adapted("llm_and_encoder")
    trainer = VideoLlama3Trainer(
        model,
        arguments(tmp_path, num_train_epochs=3, warmup_steps=0),
        processor=processor,
        train_dataset=Samples(processor, [TEXT, VIDEO, IMAGE, MIXED]),
        rates=ModuleRates(encoder=1e-2, projector=1e-2, llm=1e-2),
        limits=RowLimits(max_length=40),
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    for name, parameter in model.named_parameters():
        moves = "lora_" in name or "modules_to_save" in name
        assert torch.equal(parameter, before[name]) is not moves, name
    assert {group["module"] for group in trainer.optimizer.param_groups} == {"encoder", "projector", "llm"}


@pytest.mark.parametrize("targets", ["llm", "llm_and_encoder"])
def test_merged_weights_equal_the_adapter(task, tmp_path, targets):
    """A whole run: the folder's plain weights give what the base with the adapter beside them gives."""
    from peft import PeftModel

    more = [f"adapter.targets={targets}", "adapter.rank=4", "rates.llm=1e-2", "rates.projector=1e-2"]
    if targets == "llm_and_encoder":
        more.append("rates.encoder=1e-2")
    more += ["schedule.epochs=3", "output.dtype=float32", "schedule.optimizer=adamw_torch"]
    run_recipe(load_recipe(RECIPES / "lora.yaml", recipe_overrides(task, tmp_path, *more)))
    base = VideoLlama3ForCausalLM.from_pretrained(task[0], dtype=torch.float32).eval()
    merged = VideoLlama3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    _, processor = tiny_model()
    samples = Samples(processor, [MIXED, TEXT, VIDEO])
    batch = PackingCollator.for_processor(processor)([samples[i] for i in range(3)])
    with torch.no_grad():
        plain = base(**batch, use_cache=False).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(**batch, use_cache=False).logits
        result = merged(**batch, use_cache=False).logits
    assert (adapted - plain).abs().max() > 0.1
    # Measured worst case 1.4e-6 of 0.4; without the adapter it is off by 0.58.
    torch.testing.assert_close(result, adapted, atol=1e-5, rtol=0)
    assert not any("lora" in name for name in load_file(tmp_path / "model.safetensors"))


def test_an_adapter_has_a_card_that_is_filled_in(task, tmp_path):
    more = ["schedule.max_steps=1", "adapter.rank=4", "output.model_card=true"]
    run_recipe(load_recipe(RECIPES / "lora.yaml", recipe_overrides(task, tmp_path / "own", *more)))
    card = (tmp_path / "own" / "adapter" / "README.md").read_text()
    assert card.splitlines().count("library_name: peft") == 1
    assert "own-adapter" in card
    assert "[More Information Needed]" not in card
    assert "| optimizer steps | 1 |" in card


def test_a_card_of_an_adapter_that_somebody_filled_in_stays(tmp_path):
    card = tmp_path / "README.md"
    remove_empty_card(tmp_path)
    card.write_text("Mine.")
    remove_empty_card(tmp_path)
    assert card.read_text() == "Mine."
    card.write_text("Developed by: [More Information Needed]")
    remove_empty_card(tmp_path)
    assert not card.exists()
