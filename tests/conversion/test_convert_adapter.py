"""A LoRA adapter merged while converting, against peft's own merging."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import videollama3
from videollama3.conversion.convert import convert_checkpoint

from .twins import official, read_json, without_head

peft = pytest.importorskip("peft")
# peft asks transformers under a name that is going, and warns about tied embeddings.
pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["q_proj", "v_proj", "down_proj", "fc1", "readout.0"]


def train(base, folder, *, dtype="float32", **changes):
    """An adapter with random factors, saved by peft; returns the model that peft merges it into."""
    model = videollama3.VideoLlama3ForCausalLM.from_pretrained(base, dtype=dtype)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
        for name, weight in wrapped.named_parameters():
            if (
                "lora_" in name
                or "modules_to_save" in name
                or (settings.get("bias") == "all" and name.endswith("bias"))
            ):
                weight.data = torch.randn(weight.shape).to(weight.dtype) * 0.1
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload()


def assert_equal(folder, merged, tolerance=1e-6):
    weights, expected = load_file(folder / "model.safetensors"), merged.state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        # Measured 6e-8: peft adds in another order. Without the scale of 3 the difference is above 0.1.
        torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"language_model.layers.1.self_attn.q_proj": 3}},
        {"target_modules": [*TARGETS, "embed_tokens", "lm_head"]},
        {"modules_to_save": ["projector", "lm_head"], "target_modules": ["q_proj"]},
        {"bias": "all", "target_modules": ["q_proj", "k_proj"]},
    ],
    ids=["plain", "rslora", "patterns", "embedding", "whole modules", "biases"],
)
def test_merged_as_peft_does(golden_folder, tmp_path, changes):
    merged = train(golden_folder / "ckpt", tmp_path / "adapter", **changes)
    report = convert_checkpoint(tmp_path / "adapter", tmp_path / "out", to="plugin", verify=True)
    assert_equal(tmp_path / "out", merged)
    base = load_file(golden_folder / "ckpt" / "model.safetensors")
    assert report.merged >= 4
    assert report.num_tensors == len(base)
    assert report.largest_difference < 1e-5
    assert report.source_layout == "official"


def test_into_other_layouts_and_dtypes(golden_folder, tmp_path):
    """Merged in float32, then rounded once."""
    merged = train(golden_folder / "ckpt", tmp_path / "adapter")
    convert_checkpoint(tmp_path / "adapter", tmp_path / "native", to="native", dtype="bfloat16", verify=True)
    weights = load_file(tmp_path / "native" / "model.safetensors")
    different = sum(int((tensor != merged.state_dict()[name].bfloat16()).sum()) for name, tensor in weights.items())
    # peft's sums round a few values of 240,000 to the other side.
    assert different < 30
    convert_checkpoint(tmp_path / "adapter", tmp_path / "official", to="official")
    assert "model.mm_projector.readout.0.weight" in load_file(tmp_path / "official" / "model.safetensors")


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["projector"], "target_modules": ["q_proj"]}], ids=str)
def test_verified_beside_a_base_in_bfloat16(golden_folder, tmp_path, changes):
    """As released weights are stored: merged in float32, rounded once, and the reference is rounded likewise."""
    base = official(
        golden_folder, tmp_path / "base", lambda w: {name: tensor.bfloat16() for name, tensor in w.items()}
    )
    merged = train(base, tmp_path / "adapter", **changes)
    report = convert_checkpoint(tmp_path / "adapter", tmp_path / "out", to="plugin", verify=True)
    assert report.largest_difference < 1e-3
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["model.language_model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert_equal(tmp_path / "out", merged.bfloat16(), tolerance=0.02)


def test_another_base_than_the_one_named(golden_folder, tmp_path):
    base = official(golden_folder, tmp_path / "base", lambda w: {name: tensor * 2 for name, tensor in w.items()})
    merged = train(base, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**read_json(config), "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"Expected the base of the adapter '.*': it names none, pass --base"):
        convert_checkpoint(tmp_path / "adapter", tmp_path / "out", to="plugin")
    convert_checkpoint(tmp_path / "adapter", tmp_path / "out", to="plugin", base=base)
    assert_equal(tmp_path / "out", merged)


def test_tied_heads(golden_folder, tmp_path):
    base = official(golden_folder, tmp_path / "base", without_head, tie_word_embeddings=True)
    train(base, tmp_path / "plain", target_modules=["q_proj"])
    assert convert_checkpoint(tmp_path / "plain", tmp_path / "tied", to="plugin", verify=True).head == "tied"
    train(base, tmp_path / "embedding", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(
        ValueError, match="Expected an adapter that leaves a tied token embedding alone, or stores lm_head"
    ):
        convert_checkpoint(tmp_path / "embedding", tmp_path / "out", to="plugin")
    # A trained head of its own is no longer tied.
    folder = tmp_path / "plain"
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.lm_head.weight"] = torch.full((320, 64), 0.5)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert convert_checkpoint(folder, tmp_path / "own", to="plugin").head == "own"
    model = videollama3.VideoLlama3ForCausalLM.from_pretrained(tmp_path / "own")
    assert torch.equal(model.lm_head.weight, torch.full((320, 64), 0.5))
    assert not torch.equal(model.model.language_model.embed_tokens.weight, model.lm_head.weight)


@pytest.fixture
def adapter(golden_folder, tmp_path):
    train(golden_folder / "ckpt", tmp_path / "adapter", target_modules=["q_proj"])
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("peft_type", "IA3"),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [1]),
    ],
)
def test_other_kinds_are_refused(adapter, tmp_path, name, value):
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**read_json(config), name: value}))
    with pytest.raises(
        ValueError, match=rf"Expected a plain LoRA adapter in '.*adapter', got {name}=.*: merge it with peft"
    ):
        convert_checkpoint(adapter, tmp_path / "out", to="plugin")


def change(adapter, edit):
    weights = load_file(adapter / "adapter_model.safetensors")
    edit(weights)
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


NAME = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda w: w.pop(f"{NAME}.lora_A.weight"),
            "Expected lora_A and lora_B of every weight .*, one lacks for model.lang",
        ),
        (
            lambda w: w.update({f"{NAME}.lora_magnitude_vector": torch.ones(2)}),
            "Expected plain LoRA weights .*magnitude",
        ),
        (lambda w: w.update({f"{NAME}.lora_A.weight": torch.ones(4, 65)}), "the adapter belongs to another base"),
        (
            lambda w: w.update({f"{NAME}.lora_A.weight": torch.ones(4, 3, 2)}),
            "LoRA factors of linear layers, got .*4, 3, 2",
        ),
        (
            lambda w: w.update({"base_model.model.model.more.weight": torch.ones(2)}),
            "1 without a place: model.more.weight",
        ),
        (
            lambda w: w.update({"base_model.model.lm_head.weight": torch.ones(2)}),
            r"1 of another shape: .*lm_head.weight \[320",
        ),
    ],
)
def test_weights_that_do_not_fit(adapter, tmp_path, edit, message):
    change(adapter, edit)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(adapter, tmp_path / "out", to="plugin")
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_weights(adapter, tmp_path):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"Expected adapter_model\.safetensors or adapter_model\.bin in"):
        convert_checkpoint(adapter, tmp_path / "out", to="plugin")


def test_a_spoilt_base_is_refused_by_from_pretrained_too(adapter, golden_folder, tmp_path):
    """transformers loads an adapter's base through the same call."""
    base = official(golden_folder, tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"12345678")
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**read_json(config), "base_model_name_or_path": str(base)}))
    with pytest.raises(ValueError, match=r"Expected an intact weight file, got '.*base/model\.safetensors'"):
        videollama3.VideoLlama3ForCausalLM.from_pretrained(adapter)


def test_an_adapters_own_processor_is_taken(golden_folder, tmp_path):
    """It was trained with that one: other merging and pruning than its base's."""
    merged = train(golden_folder / "ckpt", tmp_path / "adapter")
    processor = videollama3.VideoLlama3Processor.from_pretrained(golden_folder / "ckpt")
    processor.image_processor.merge_size = 2
    processor.video_processor.use_token_compression = not processor.video_processor.use_token_compression
    processor.save_pretrained(tmp_path / "adapter")
    convert_checkpoint(tmp_path / "adapter", tmp_path / "out", to="plugin", verify=True)
    assert_equal(tmp_path / "out", merged)
    result = videollama3.VideoLlama3Processor.from_pretrained(tmp_path / "out")
    assert result.image_processor.merge_size == 2
    assert result.video_processor.use_token_compression is processor.video_processor.use_token_compression


def test_an_adapter_trained_on_another_encoder_is_refused(golden_folder, tmp_path):
    train(golden_folder / "ckpt", tmp_path / "adapter")
    settings = {"model.path": str(golden_folder / "ckpt"), "model.vision_encoder": None}
    (tmp_path / "adapter" / "run_settings.json").write_text(json.dumps(settings))
    convert_checkpoint(tmp_path / "adapter", tmp_path / "out", to="plugin")
    settings["model.vision_encoder"] = "another"
    (tmp_path / "adapter" / "run_settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="trained with the vision encoder 'another' in it"):
        convert_checkpoint(tmp_path / "adapter", tmp_path / "other", to="plugin")


def test_an_adapters_folder_is_loaded_by_our_own_class(golden_folder, tmp_path):
    merged = train(golden_folder / "ckpt", tmp_path / "adapter").eval()
    loaded = videollama3.VideoLlama3ForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        expected = merged(input_ids=ids).logits
        plain = videollama3.VideoLlama3ForCausalLM.from_pretrained(golden_folder / "ckpt")(input_ids=ids).logits
        # Measured 1e-6; without the adapter it is off by more than 0.1.
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-4, rtol=0)
    assert (plain - expected).abs().max() > 0.1
