"""Configurations: defaults, checks, the three layouts, round trips."""

import json
import re
import shutil

import pytest
from transformers import AutoConfig, Qwen2Config

from videollama3 import VideoLlama3Config, VideoLlama3VisionConfig
from videollama3.modeling.checkpoint_layouts import to_plugin_config

from .tiny import tiny_config


@pytest.fixture
def official(golden_folder):
    """The golden checkpoint's config.json."""
    return json.loads((golden_folder / "ckpt" / "config.json").read_text())


def _native():
    """A config.json as transformers' own class writes it."""
    return {
        "architectures": ["VideoLlama3ForConditionalGeneration"],
        "model_type": "video_llama_3",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "tie_word_embeddings": False,
        "text_config": {"model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 333},
        "vision_config": {
            "model_type": "video_llama_3_vision",
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "num_channels": 3,
            "patch_size": 14,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 5000.0},
        },
    }


# --- defaults ---


def test_vision_defaults_are_the_released_encoder():
    config = VideoLlama3VisionConfig()
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (1152, 4304, 27)
    assert (config.num_attention_heads, config.patch_size, config.num_channels) == (16, 14, 3)
    assert (config.hidden_act, config.layer_norm_eps, config.rope_theta) == ("gelu_pytorch_tanh", 1e-6, 10000.0)
    assert config.image_mean == config.image_std == [0.5, 0.5, 0.5]
    assert config.model_type == "videollama3_vision"


def test_whole_defaults():
    config = VideoLlama3Config()
    assert (config.model_type, config.image_token_id, config.video_token_id) == ("videollama3", 151655, 151656)
    assert config.tie_word_embeddings is False
    assert isinstance(config.text_config, Qwen2Config)
    assert isinstance(config.vision_config, VideoLlama3VisionConfig)
    assert config.get_text_config() is config.text_config


def test_sub_configurations_as_objects_and_as_dictionaries():
    text, vision = Qwen2Config(hidden_size=64), VideoLlama3VisionConfig(hidden_size=48, num_attention_heads=3)
    objects = VideoLlama3Config(text_config=text, vision_config=vision)
    assert objects.text_config is text
    assert objects.vision_config is vision
    dictionaries = VideoLlama3Config(text_config=text.to_dict(), vision_config=vision.to_dict())
    assert dictionaries.to_dict() == objects.to_dict()


@pytest.mark.parametrize(
    ("whole", "text", "expected"),
    [(None, True, True), (None, False, False), (True, False, True), (False, True, False)],
)
def test_the_head_is_tied_as_the_whole_says_or_else_the_text(whole, text, expected):
    changes = {} if whole is None else {"tie_word_embeddings": whole}
    config = VideoLlama3Config(text_config={"hidden_size": 64, "tie_word_embeddings": text}, **changes)
    assert config.tie_word_embeddings is config.text_config.tie_word_embeddings is expected


# --- checks ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 0},
            "Expected `num_hidden_layers` of the vision encoder to be a positive integer, got 0.",
        ),
        ({"patch_size": 14.0}, "Expected `patch_size` of the vision encoder to be a positive integer, got 14.0."),
        (
            {"hidden_size": 1152, "num_attention_heads": 20},
            "Expected the vision encoder's `hidden_size` to be a multiple of 4 * `num_attention_heads` "
            "(2D rotary embeddings), got 1152 and 20 heads.",
        ),
        (
            {"image_mean": [0.5, 0.5]},
            "Expected one `image_mean` and one `image_std` for each of 3 channels, got [0.5, 0.5] and [0.5, 0.5, 0.5].",
        ),
    ],
)
def test_vision_values_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VideoLlama3VisionConfig(**changes)


def test_a_language_model_other_than_qwen2_is_refused():
    message = "Expected a sub-configuration with model_type 'qwen2', got 'llama'."
    with pytest.raises(ValueError, match=re.escape(message)):
        VideoLlama3Config(text_config={"model_type": "llama"})


def test_an_official_projector_of_another_kind_is_refused(official):
    message = (
        "Expected an official checkpoint with mm_projector_type 'mlp2x_gelu' (two linear layers), "
        "got 'linear' (some/folder): no VideoLLaMA3 release uses another projector."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        to_plugin_config({**official, "mm_projector_type": "linear"}, name_or_path="some/folder")


def test_an_official_configuration_without_encoder_is_refused(official):
    message = (
        "Expected `vision_encoder_config` in an official VideoLLaMA3 configuration, got none: "
        "a checkpoint whose encoder is stored elsewhere must be completed first."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        VideoLlama3Config.from_dict({**official, "vision_encoder_config": None})


# --- layouts ---


def test_official_layout(official):
    config = VideoLlama3Config.from_dict(official)
    assert config.model_type == "videollama3"
    assert config.architectures == ["VideoLlama3ForCausalLM"]
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size) == (64, 160, 2, 320)
    assert (text.num_attention_heads, text.num_key_value_heads) == (4, 2)
    assert text.rope_parameters["rope_theta"] == 1000000.0
    assert (text.bos_token_id, text.eos_token_id) == (301, 300)
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (64, 144, 2)
    # The official layout does not record them; a dictionary alone gives Qwen2.5's.
    assert (config.image_token_id, config.video_token_id) == (151655, 151656)
    leftovers = {"mm_projector_type", "use_token_compression", "vision_encoder", "image_token_index", "auto_map"}
    assert not leftovers & set(config.to_dict())
    assert not leftovers & set(text.to_dict())


def test_native_layout():
    config = VideoLlama3Config.from_dict(_native())
    assert config.model_type == "videollama3"
    assert config.architectures == ["VideoLlama3ForCausalLM"]
    assert (config.text_config.hidden_size, config.text_config.vocab_size) == (64, 333)
    assert config.vision_config.model_type == "videollama3_vision"
    assert (config.vision_config.hidden_size, config.vision_config.rope_theta) == (48, 5000.0)


def test_native_layout_that_ties_in_its_text_configuration_only():
    native = _native()
    native["text_config"]["tie_word_embeddings"] = True
    assert VideoLlama3Config.from_dict(native).tie_word_embeddings is True


def test_own_layout():
    config = tiny_config(tie_word_embeddings=True)
    again = VideoLlama3Config.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.tie_word_embeddings is True


def test_translation_leaves_its_argument_alone(official):
    for source in (official, _native()):
        before = json.dumps(source)
        VideoLlama3Config.from_dict(source)
        assert json.dumps(source) == before


def test_encoder_configuration_of_all_layouts(official):
    native = _native()["vision_config"]
    for source, width in ((official["vision_encoder_config"], 64), (native, 48)):
        config = VideoLlama3VisionConfig.from_dict(source)
        assert (config.model_type, config.hidden_size) == ("videollama3_vision", width)
        assert VideoLlama3VisionConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("layout", ["official", "native", "own"])
def test_encoder_configuration_out_of_a_whole_one(layout, official, tmp_path):
    whole = {"official": official, "native": _native(), "own": tiny_config().to_dict()}[layout]
    (tmp_path / "config.json").write_text(json.dumps(whole))
    config = VideoLlama3VisionConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.num_hidden_layers) == ("videollama3_vision", 2)
    assert config.hidden_size == {"official": 64, "native": 48, "own": 48}[layout]


# --- files ---


@pytest.mark.parametrize("config", [tiny_config(), tiny_config(tie_word_embeddings=True), VideoLlama3Config()])
def test_save_and_load(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "videollama3"
    for loaded in (VideoLlama3Config.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is VideoLlama3Config
        ours, theirs = loaded.to_dict(), config.to_dict()
        for either in (ours, theirs):
            either.pop("_name_or_path")
            either.pop("auto_map", None)  # written by save_pretrained
        assert ours == theirs


# Where a tokenizer may name <|image_pad|> and <|video_pad|>; the golden one has 308 and 309.
TOKENIZER_FILES = ["tokenizer_config.json", "tokenizer.json", "added_tokens.json"]


@pytest.mark.parametrize("present", [TOKENIZER_FILES, *([name] for name in TOKENIZER_FILES)], ids=len)
@pytest.mark.parametrize("load", [VideoLlama3Config.from_pretrained, AutoConfig.from_pretrained])
def test_placeholder_ids_come_from_the_tokenizer_files(golden_folder, tmp_path, present, load):
    for name in ("config.json", *present):
        shutil.copy(golden_folder / "ckpt" / name, tmp_path)
    config = load(tmp_path)
    assert (config.image_token_id, config.video_token_id) == (308, 309)


def test_placeholder_ids_are_found_in_a_subfolder_and_beside_a_file(golden_folder, tmp_path):
    shutil.copytree(golden_folder / "ckpt", tmp_path / "deep", ignore=shutil.ignore_patterns("*.safetensors"))
    for config in (
        VideoLlama3Config.from_pretrained(tmp_path, subfolder="deep"),
        VideoLlama3Config.from_pretrained(tmp_path / "deep" / "config.json"),
    ):
        assert (config.image_token_id, config.video_token_id) == (308, 309)


def test_without_tokenizer_files_the_ids_are_those_of_qwen(official, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(official))
    config = VideoLlama3Config.from_pretrained(tmp_path)
    assert (config.image_token_id, config.video_token_id) == (151655, 151656)


def test_ids_in_the_configuration_win(golden_folder, official, tmp_path):
    shutil.copy(golden_folder / "ckpt" / "tokenizer_config.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**official, "image_token_id": 7, "video_token_id": 8}))
    config = VideoLlama3Config.from_pretrained(tmp_path)
    assert (config.image_token_id, config.video_token_id) == (7, 8)


@pytest.mark.parametrize("stale", ["/somewhere/on/another/machine", "someone/some-repository"])
def test_the_folder_of_whoever_saved_it_is_not_looked_up(official, stale, monkeypatch):
    def no_lookup(*args, **kwargs):
        raise AssertionError(f"looked up {args}")

    monkeypatch.setattr("videollama3.modeling.checkpoint_layouts.cached_file", no_lookup)
    official["_name_or_path"] = official["vision_encoder_config"]["_name_or_path"] = stale
    config = VideoLlama3Config.from_dict(official)
    assert config.image_token_id == 151655
    assert stale not in json.dumps(config.to_dict())


def test_an_encoder_alone_normalises_as_its_preprocessor_says(official, golden_folder, tmp_path):
    encoder = official["vision_encoder_config"]
    (tmp_path / "config.json").write_text(json.dumps(encoder))
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    config = VideoLlama3VisionConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in statistics} == statistics
    whole = tmp_path / "whole"
    shutil.copytree(golden_folder / "ckpt", whole)
    stored = json.loads((whole / "preprocessor_config.json").read_text())
    (whole / "preprocessor_config.json").write_text(json.dumps({**stored, **statistics}))
    assert VideoLlama3VisionConfig.from_pretrained(whole).image_std == statistics["image_std"]
