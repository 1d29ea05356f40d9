"""Checkpoints of all layouts load completely, the head is the right one, and our own files come back equal."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.utils import logging

from videollama3 import (
    VideoLlama3Config,
    VideoLlama3ForCausalLM,
    VideoLlama3Model,
    VideoLlama3VisionConfig,
    VideoLlama3VisionModel,
)
from videollama3.modeling.checkpoint_layouts import OFFICIAL_KEY_MAPPING

from .test_native_oracle import native_twin

# What a whole model's names begin with, in our layout and the native one.
OWN_PREFIXES = ("model.vision_model.", "model.projector.readout.", "model.language_model.", "lm_head.")


@pytest.fixture(scope="session")
def golden_weights(golden_folder):
    """The golden checkpoint's tensors under their official names."""
    return load_file(golden_folder / "ckpt" / "model.safetensors")


@pytest.fixture
def official_folder(golden_folder, tmp_path):
    """A copy of the golden checkpoint without its weights."""
    folder = tmp_path / "official"
    shutil.copytree(golden_folder / "ckpt", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture
def messages(caplog):
    """The messages of transformers' loggers and ours, information included."""
    library = logging.get_logger("transformers")
    own = logging.get_logger("videollama3.modeling.pretrained_videollama3")
    levels = library.level, own.level
    logging.enable_propagation()
    library.setLevel("INFO")
    own.setLevel("INFO")
    with caplog.at_level("INFO"):
        yield lambda level="INFO": [
            record.getMessage()
            for record in caplog.records
            if record.name.startswith("videollama3") and record.levelname == level
        ]
    logging.disable_propagation()
    library.setLevel(levels[0])
    own.setLevel(levels[1])


def _load(folder, cls=VideoLlama3ForCausalLM, **kwargs):
    """The model, after checking that the checkpoint and the model had the same names and shapes."""
    loaded, info = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert {name: found for name, found in info.items() if found} == {}
    return loaded


def _save(weights, folder, **config):
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def _assert_equal_weights(model, reference):
    weights, expected = model.state_dict(), reference.state_dict()
    assert list(weights) == list(expected)
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


# --- the official layout ---


def test_official_names_are_all_mapped(golden_folder, golden_weights):
    loaded = _load(golden_folder / "ckpt")
    weights = loaded.state_dict()
    assert len(weights) == len(golden_weights) == 67
    for official, tensor in golden_weights.items():
        name = official
        for pattern, replacement in OFFICIAL_KEY_MAPPING.items():
            name = re.sub(pattern, replacement, name)
        assert torch.equal(weights[name], tensor), official
    assert loaded.config.model_type == "videollama3"
    assert not loaded.training


def test_the_training_codes_doubled_names(official_folder, golden_weights, model):
    doubled = {
        name.replace("model.vision_encoder.", "model.vision_encoder.vision_encoder."): tensor
        for name, tensor in golden_weights.items()
    }
    assert "model.vision_encoder.vision_encoder.post_layernorm.bias" in doubled
    _save(doubled, official_folder)
    _assert_equal_weights(_load(official_folder), model)
    encoder = _load(official_folder, VideoLlama3VisionModel)
    _assert_equal_weights(encoder, model.model.vision_model)


def test_pytorch_model_bin(official_folder, golden_weights, model):
    torch.save(golden_weights, official_folder / "pytorch_model.bin")
    _assert_equal_weights(_load(official_folder, weights_only=True), model)


def test_the_base_model_out_of_a_whole_checkpoint(golden_folder, model):
    _assert_equal_weights(_load(golden_folder / "ckpt", VideoLlama3Model), model.model)


def test_what_does_not_fit_is_reported(official_folder, golden_weights):
    weights = {name: tensor for name, tensor in golden_weights.items() if name != "model.mm_projector.readout.2.bias"}
    _save({**weights, "model.mm_projector_of_another_kind.weight": torch.zeros(2)}, official_folder)
    _, info = VideoLlama3ForCausalLM.from_pretrained(official_folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.projector.readout.2.bias"}
    assert set(info["unexpected_keys"]) == {"model.mm_projector_of_another_kind.weight"}


# --- the encoder alone ---


@pytest.mark.parametrize("doubled", [False, True])
def test_the_official_encoder_alone(golden_folder, golden_weights, model, tmp_path, doubled):
    config = json.loads((golden_folder / "ckpt" / "config.json").read_text())["vision_encoder_config"]
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "architectures": ["Videollama3VisionEncoderModel"], "torch_dtype": "float32"})
    )
    prefix = "model.vision_encoder."
    weights = {
        ("vision_encoder." if doubled else "") + name.removeprefix(prefix): tensor
        for name, tensor in golden_weights.items()
        if name.startswith(prefix)
    }
    assert doubled or "encoder.layers.0.self_attn.q_proj.weight" in weights
    _save(weights, tmp_path)
    for cls in (VideoLlama3VisionModel, AutoModel):
        encoder = _load(tmp_path, cls)
        assert type(encoder) is VideoLlama3VisionModel
        assert type(encoder.config) is VideoLlama3VisionConfig
        _assert_equal_weights(encoder, model.model.vision_model)


@pytest.mark.parametrize("layout", ["official", "own"])
def test_the_encoder_out_of_a_whole_checkpoint(golden_folder, model, tmp_path, layout):
    folder = golden_folder / "ckpt"
    if layout == "own":
        folder = tmp_path
        model.save_pretrained(folder)
    encoder = _load(folder, VideoLlama3VisionModel)
    assert encoder.config.hidden_size == 64
    _assert_equal_weights(encoder, model.model.vision_model)


# --- the native layout ---


def test_the_native_layout(model, tmp_path):
    native_twin(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "video_llama_3"
    loaded = _load(tmp_path)
    _assert_equal_weights(loaded, model)
    assert (loaded.config.image_token_id, loaded.config.video_token_id) == (308, 309)
    _assert_equal_weights(_load(tmp_path, VideoLlama3Model), model.model)
    _assert_equal_weights(_load(tmp_path, VideoLlama3VisionModel), model.model.vision_model)


# --- our own ---


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_saved_files_are_ours_and_come_back_equal(golden_folder, tmp_path, max_shard_size):
    loaded = _load(golden_folder / "ckpt")
    loaded.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    shards = sorted(tmp_path.glob("model*.safetensors"))
    assert len(shards) == 1 if max_shard_size == "5GB" else len(shards) > 3
    saved = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert all(name.startswith(OWN_PREFIXES) for name in saved)
    assert saved.keys() == loaded.state_dict().keys()
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("videollama3", ["VideoLlama3ForCausalLM"])
    again = _load(tmp_path)
    _assert_equal_weights(again, loaded)
    again.save_pretrained(tmp_path / "again", max_shard_size=max_shard_size)
    for shard in shards:
        assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()


def test_saved_encoder_and_base_model(golden_folder, tmp_path):
    for cls in (VideoLlama3VisionModel, VideoLlama3Model):
        folder = tmp_path / cls.__name__
        loaded = _load(golden_folder / "ckpt", cls)
        loaded.save_pretrained(folder)
        assert load_file(folder / "model.safetensors").keys() == loaded.state_dict().keys()
        for again in (_load(folder, cls), _load(folder, AutoModel)):
            assert type(again) is cls
            _assert_equal_weights(again, loaded)


def test_weights_are_loaded_in_the_asked_dtype(golden_folder):
    assert {p.dtype for p in _load(golden_folder / "ckpt", dtype="bfloat16").parameters()} == {torch.bfloat16}
    assert {p.dtype for p in _load(golden_folder / "ckpt").parameters()} == {torch.float32}


# --- the head ---


def _without_head(weights):
    return {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}


def test_a_tied_head_that_is_not_in_the_checkpoint(official_folder, golden_weights, messages, tmp_path):
    _save(_without_head(golden_weights), official_folder, tie_word_embeddings=True)
    loaded = _load(official_folder)
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, golden_weights["model.embed_tokens.weight"])
    assert loaded.config.tie_word_embeddings is True
    assert messages() == ["lm_head uses the token embedding's weight (tie_word_embeddings is true)."]
    assert messages("WARNING") == []
    loaded.save_pretrained(tmp_path / "saved")
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")
    again = _load(tmp_path / "saved")
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    _assert_equal_weights(again, loaded)


def test_a_head_in_the_checkpoint_wins_over_tying(official_folder, golden_weights, messages, tmp_path):
    assert not torch.equal(golden_weights["lm_head.weight"], golden_weights["model.embed_tokens.weight"])
    _save(golden_weights, official_folder, tie_word_embeddings=True)
    loaded = _load(official_folder)
    assert torch.equal(loaded.lm_head.weight, golden_weights["lm_head.weight"])
    assert torch.equal(loaded.model.language_model.embed_tokens.weight, golden_weights["model.embed_tokens.weight"])
    assert loaded.config.tie_word_embeddings is loaded.config.text_config.tie_word_embeddings is False
    assert messages("WARNING") == [
        "The configuration says tie_word_embeddings, but the checkpoint has a lm_head.weight that differs from the "
        "token embedding: lm_head uses the checkpoint's lm_head.weight, and tie_word_embeddings is now false."
    ]
    # Nothing ties it later either.
    loaded.tie_weights()
    loaded.save_pretrained(tmp_path / "saved")
    again = _load(tmp_path / "saved")
    assert torch.equal(again.lm_head.weight, golden_weights["lm_head.weight"])
    _assert_equal_weights(again, loaded)


def test_an_equal_head_in_the_checkpoint_stays_tied(official_folder, golden_weights, messages):
    embedding = golden_weights["model.embed_tokens.weight"]
    _save({**golden_weights, "lm_head.weight": embedding.clone()}, official_folder, tie_word_embeddings=True)
    loaded = _load(official_folder)
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert loaded.config.tie_word_embeddings is True
    assert messages("WARNING") == []


def test_an_untied_head_is_reported_too(golden_folder, messages):
    _load(golden_folder / "ckpt")
    assert messages() == ["lm_head uses a weight of its own."]


# --- Auto classes ---


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}], ids=str)
def test_auto_classes_on_an_official_folder(golden_folder, model, trust):
    folder = golden_folder / "ckpt"
    config = AutoConfig.from_pretrained(folder, **trust)
    assert type(config) is VideoLlama3Config
    assert (config.image_token_id, config.video_token_id) == (308, 309)
    for auto, cls, reference in (
        (AutoModel, VideoLlama3Model, model.model),
        (AutoModelForCausalLM, VideoLlama3ForCausalLM, model),
        (AutoModelForImageTextToText, VideoLlama3ForCausalLM, model),
    ):
        loaded = _load(folder, auto, **trust)
        assert type(loaded) is cls
        _assert_equal_weights(loaded, reference)


AUTO_CLASSES = """
import sys
import videollama3
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

for trust in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
    for auto in (
        AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoImageProcessor
    ):
        loaded = auto.from_pretrained(sys.argv[1], **trust)
        assert type(loaded).__module__.startswith("videollama3."), (auto, trust, type(loaded))
        print(type(loaded).__name__)
    assert AutoTokenizer.from_pretrained(sys.argv[1], **trust).convert_tokens_to_ids("<|video_pad|>") == 309
"""


def test_no_auto_class_asks_a_question(golden_folder):
    """In a process of its own, with nobody at its standard input."""
    result = subprocess.run(
        [sys.executable, "-c", AUTO_CLASSES, str(golden_folder / "ckpt")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    names = [
        "VideoLlama3Config",
        "VideoLlama3Model",
        "VideoLlama3ForCausalLM",
        "VideoLlama3ForCausalLM",
        "VideoLlama3Processor",
        "VideoLlama3ImageProcessor",
    ]
    assert result.stdout.split() == names * 3


def test_mean_and_std_of_uint8_pixels_come_from_the_preprocessor(tmp_path, golden_folder):
    folder = tmp_path / "official"
    shutil.copytree(golden_folder / "ckpt", folder)
    stored = json.loads((folder / "preprocessor_config.json").read_text())
    stored["image_mean"], stored["image_std"] = [0.4, 0.5, 0.6], [0.3, 0.2, 0.1]
    (folder / "preprocessor_config.json").write_text(json.dumps(stored))
    for config in (VideoLlama3Config.from_pretrained(folder), AutoConfig.from_pretrained(folder)):
        assert config.vision_config.image_mean == [0.4, 0.5, 0.6]
        assert config.vision_config.image_std == [0.3, 0.2, 0.1]
    whole = json.loads((folder / "config.json").read_text())
    whole["vision_encoder_config"]["image_mean"] = [0.5, 0.5, 0.5]
    (folder / "config.json").write_text(json.dumps(whole))
    with pytest.raises(
        ValueError,
        match=r"vision_config\.image_mean to be the preprocessor's, \[0\.4, 0\.5, 0\.6\], got \[0\.5, 0\.5, 0\.5\]",
    ):
        VideoLlama3Config.from_pretrained(folder)
