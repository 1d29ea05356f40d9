"""The three checkpoint layouts: configuration dictionaries and parameter names of each, as tables.

A configuration dictionary or a parameter name of any layout enters, one of another layout leaves, in both
directions by the same tables. Reading and writing files is left to transformers and to `conversion/`.

Layouts:
    plugin: this package, `model_type: videollama3`.
    official: the authors' checkpoints, `model_type: videollama3_qwen2` (flat Qwen2 fields plus a
        `vision_encoder_config`), and `videollama3_vision_encoder` for the encoder alone.
    native: the class inside transformers, `model_type: video_llama_3`.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any, NamedTuple

from transformers.utils import cached_file

PLUGIN_MODEL_TYPE = "videollama3"
PLUGIN_VISION_MODEL_TYPE = "videollama3_vision"
OFFICIAL_MODEL_TYPE = "videollama3_qwen2"
OFFICIAL_VISION_MODEL_TYPE = "videollama3_vision_encoder"
NATIVE_MODEL_TYPE = "video_llama_3"
NATIVE_VISION_MODEL_TYPE = "video_llama_3_vision"

IMAGE_PLACEHOLDER = "<|image_pad|>"
VIDEO_PLACEHOLDER = "<|video_pad|>"
# Their ids in every Qwen2.5 vocabulary.
QWEN_IMAGE_TOKEN_ID = 151655
QWEN_VIDEO_TOKEN_ID = 151656


class KeyPrefix(NamedTuple):
    """The beginning of the names of one part's parameters, in each layout.

    Attributes:
        ours: in this package and in the class inside transformers.
        official: in the authors' released checkpoints.
        training: in what the authors' training code saves, where that differs from `official`.
    """

    ours: str
    official: str
    training: str = ""


# Every parameter of a whole model begins with exactly one of these. The authors' training code saves the encoder
# one level deeper.
KEY_PREFIXES = (
    KeyPrefix("model.vision_model.", "model.vision_encoder.", training="model.vision_encoder.vision_encoder."),
    KeyPrefix("model.projector.", "model.mm_projector."),
    KeyPrefix("model.language_model.embed_tokens.", "model.embed_tokens."),
    KeyPrefix("model.language_model.layers.", "model.layers."),
    KeyPrefix("model.language_model.norm.", "model.norm."),
    KeyPrefix("lm_head.", "lm_head."),
)
# The encoder alone: its names are the same everywhere but in training checkpoints.
ENCODER_KEY_PREFIXES = (KeyPrefix("", "", training="vision_encoder."),)


def _key_mapping(prefixes: tuple[KeyPrefix, ...]) -> dict[str, str]:
    """Official names -> ours as ordered regular expressions, the form that `from_pretrained` takes."""
    spellings = [(theirs, row.ours) for row in prefixes for theirs in (row.training, row.official)]
    return {f"^{re.escape(theirs)}": ours for theirs, ours in spellings if theirs != ours and theirs}


OFFICIAL_KEY_MAPPING = _key_mapping(KEY_PREFIXES)
# For the encoder's class, which also reads the encoder out of a whole model's checkpoint.
ENCODER_KEY_MAPPING = {
    **{f"^{re.escape(prefix)}": "" for prefix in (KEY_PREFIXES[0].training, KEY_PREFIXES[0].official)},
    f"^{re.escape(KEY_PREFIXES[0].ours)}": "",
    **_key_mapping(ENCODER_KEY_PREFIXES),
}


def to_plugin_name(name: str, *, prefixes: tuple[KeyPrefix, ...] = KEY_PREFIXES) -> str:
    """Translates a parameter's name of any layout into ours; a name that fits no row comes back as it is."""
    for row in prefixes:
        for theirs in (row.training, row.official):
            if theirs and name.startswith(theirs):
                return row.ours + name.removeprefix(theirs)
    return name


def to_official_name(name: str, *, prefixes: tuple[KeyPrefix, ...] = KEY_PREFIXES) -> str:
    """Translates our name of a parameter into the official one; a name that fits no row comes back as it is."""
    for row in prefixes:
        if name.startswith(row.ours):
            return row.official + name.removeprefix(row.ours)
    return name


# Fields of an official config.json that say nothing about the language model.
_OFFICIAL_NON_TEXT_FIELDS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "model_type",
        "image_token_id",
        "image_token_index",
        "mm_attn_implementation",
        "mm_hidden_size",
        "mm_projector_type",
        "mm_vision_encoder",
        "transformers_version",
        "tokenizer_model_max_length",
        "tokenizer_padding_side",
        "use_mm_proj",
        "use_token_compression",
        "video_token_id",
        "vision_encoder",
        "vision_encoder_config",
        "tie_word_embeddings",
        "torch_dtype",
        "dtype",
    }
)
_VISION_FIELDS_TO_DROP = frozenset({"_name_or_path", "auto_map", "model_type", "rope_parameters"})
# What transformers adds to every dictionary: not about the model, or said at the top level already.
_COMMON_FIELDS = frozenset(
    {"_name_or_path", "auto_map", "architectures", "dtype", "torch_dtype", "transformers_version"}
)
# Fields that only our vision configuration has, with the value that the other layouts imply. Mean and std stand in
# the other layouts' preprocessor files.
_OWN_VISION_DEFAULTS = {"reuse_identical_frames": True, "rope_theta": 10000.0}
_PREPROCESSOR_FIELDS = frozenset({"image_mean", "image_std"})
_OFFICIAL_CONFIGURATION = "configuration_videollama3"
_OFFICIAL_MODELING = "modeling_videollama3"


def to_plugin_config(
    config: dict[str, Any], *, name_or_path: str | None = None, **download_options: Any
) -> dict[str, Any]:
    """Translates a whole model's configuration dictionary into this package's layout.

    Args:
        config: the content of a `config.json` of any of the three layouts.
        name_or_path: folder or Hub id that the configuration came from; the official layout does not record
            the ids of `<|image_pad|>` and `<|video_pad|>`, they are looked up in its tokenizer files. The
            mean and std that uint8 pixels are normalised with come from its preprocessor's file.
        download_options: `revision`, `subfolder`, `cache_dir` and the like, for those files.

    Returns:
        A new dictionary; one that already has this package's layout comes back with the same meaning.

    Raises:
        ValueError: for an official configuration with a projector other than `mlp2x_gelu`, and where the
            configuration's mean or std are not the preprocessor's.
    """
    model_type = config.get("model_type")
    if model_type == OFFICIAL_MODEL_TYPE:
        config = _plugin_from_official(config, name_or_path, download_options)
    elif model_type == NATIVE_MODEL_TYPE:
        config = _plugin_from_native(config)
    if name_or_path is None or config.get("model_type") != PLUGIN_MODEL_TYPE:
        return config
    vision = _with_pixel_statistics(config.get("vision_config") or {}, name_or_path, download_options)
    return {**config, "vision_config": vision}


def to_plugin_vision_config(
    config: dict[str, Any], *, name_or_path: str | None = None, **download_options: Any
) -> dict[str, Any]:
    """Translates a vision encoder's configuration dictionary, of any of the three layouts, into ours.

    Args:
        config: of an encoder alone, or the part of a whole model's configuration.
        name_or_path: of an encoder alone: where its preprocessor's file is, see `to_plugin_config`.
        download_options: for that file.
    """
    vision = {key: value for key, value in config.items() if key not in _VISION_FIELDS_TO_DROP}
    if config.get("model_type") == PLUGIN_VISION_MODEL_TYPE and config.get("auto_map"):
        # Of an encoder saved alone: without it, transformers takes its own class of the same name.
        vision["auto_map"] = config["auto_map"]
    vision["model_type"] = PLUGIN_VISION_MODEL_TYPE
    rope_parameters = config.get("rope_parameters") or {}
    if "rope_theta" in rope_parameters:
        vision["rope_theta"] = rope_parameters["rope_theta"]
    return vision if name_or_path is None else _with_pixel_statistics(vision, name_or_path, download_options)


def to_official_config(
    config: dict[str, Any], *, image_token_index: int, use_token_compression: bool = True
) -> dict[str, Any]:
    """Translates a whole model's configuration dictionary of our layout into the official one.

    Args:
        config: our layout, with its sub-dictionaries complete.
        image_token_index: id of the authors' placeholder `<image>`.
        use_token_compression: whether videos are pruned; our layout has that in the video processor's file.

    Returns:
        A new dictionary: flat Qwen2 fields, `vision_encoder_config`, and the names of the authors' code.
    """
    text = {
        key: value
        for key, value in config["text_config"].items()
        if key not in _COMMON_FIELDS and key not in ("model_type", "rope_parameters", "layer_types")
    }
    layer_types = config["text_config"].get("layer_types") or []
    if any(layer_type != "full_attention" for layer_type in layer_types):
        text["layer_types"] = layer_types
    official = {
        "architectures": ["Videollama3Qwen2ForCausalLM"],
        "model_type": OFFICIAL_MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{_OFFICIAL_CONFIGURATION}.Videollama3Qwen2Config",
            "AutoModelForCausalLM": f"{_OFFICIAL_MODELING}.Videollama3Qwen2ForCausalLM",
        },
        **text,
        **_flat_rope(config["text_config"].get("rope_parameters") or {}),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "image_token_index": image_token_index,
        "mm_projector_type": "mlp2x_gelu",
        "use_token_compression": use_token_compression,
        "vision_encoder": None,
        "vision_encoder_config": _other_vision_config(config["vision_config"], OFFICIAL_VISION_MODEL_TYPE),
    }
    return {**official, **_dtype_field(config, "torch_dtype")}


def to_native_config(config: dict[str, Any]) -> dict[str, Any]:
    """Translates a whole model's configuration dictionary of our layout into transformers' own."""
    text = {key: value for key, value in config["text_config"].items() if key not in _COMMON_FIELDS}
    return {
        "architectures": ["VideoLlama3ForConditionalGeneration"],
        "model_type": NATIVE_MODEL_TYPE,
        "image_token_id": config["image_token_id"],
        "video_token_id": config["video_token_id"],
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "text_config": {**text, "model_type": "qwen2"},
        "vision_config": _native_vision_config(config["vision_config"]),
        **_dtype_field(config, "dtype"),
    }


def to_official_vision_config(config: dict[str, Any]) -> dict[str, Any]:
    """Translates the configuration dictionary of an encoder alone from our layout into the official one."""
    return {
        "architectures": ["Videollama3VisionEncoderModel"],
        "auto_map": {
            "AutoConfig": f"{_OFFICIAL_CONFIGURATION}_encoder.Videollama3VisionEncoderConfig",
            "AutoModel": f"{_OFFICIAL_MODELING}_encoder.Videollama3VisionEncoderModel",
        },
        **_other_vision_config(config, OFFICIAL_VISION_MODEL_TYPE),
        **_dtype_field(config, "torch_dtype"),
    }


def to_native_vision_config(config: dict[str, Any]) -> dict[str, Any]:
    """Translates the configuration dictionary of an encoder alone from our layout into transformers' own."""
    return {
        "architectures": ["VideoLlama3VisionModel"],
        **_native_vision_config(config),
        **_dtype_field(config, "dtype"),
    }


def _native_vision_config(config: dict[str, Any]) -> dict[str, Any]:
    vision = _other_vision_config(config, NATIVE_VISION_MODEL_TYPE)
    vision.pop("rope_theta", None)
    theta = config.get("rope_theta", _OWN_VISION_DEFAULTS["rope_theta"])
    return {**vision, "rope_parameters": {"rope_type": "axial", "rope_theta": theta}}


def _other_vision_config(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Our vision fields without those that say what the other layouts do anyway."""
    kept = {
        key: value
        for key, value in config.items()
        if key not in _COMMON_FIELDS
        and key not in _PREPROCESSOR_FIELDS
        and _OWN_VISION_DEFAULTS.get(key, _OWN_VISION_DEFAULTS) != value
    }
    return {**kept, "model_type": model_type}


def _flat_rope(rope_parameters: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings as transformers 4 had them: the base as a field, a scaling only where there is one."""
    flat: dict[str, Any] = {}
    if "rope_theta" in rope_parameters:
        flat["rope_theta"] = rope_parameters["rope_theta"]
    if rope_parameters.get("rope_type", "default") != "default":
        flat["rope_scaling"] = {key: value for key, value in rope_parameters.items() if key != "rope_theta"}
    return flat


def _dtype_field(config: dict[str, Any], name: str) -> dict[str, Any]:
    dtype = config.get("dtype", config.get("torch_dtype"))
    return {} if dtype is None else {name: dtype}


def _plugin_from_official(
    config: dict[str, Any], name_or_path: str | None, download_options: dict[str, Any]
) -> dict[str, Any]:
    projector_type = config.get("mm_projector_type") or "mlp2x_gelu"
    if projector_type != "mlp2x_gelu":
        raise ValueError(
            f"Expected an official checkpoint with mm_projector_type 'mlp2x_gelu' (two linear layers), "
            f"got {projector_type!r}{_where(name_or_path)}: no VideoLLaMA3 release uses another projector."
        )
    if not config.get("vision_encoder_config"):
        raise ValueError(
            f"Expected `vision_encoder_config` in an official VideoLLaMA3 configuration{_where(name_or_path)}, "
            "got none: a checkpoint whose encoder is stored elsewhere must be completed first."
        )
    text = {key: value for key, value in config.items() if key not in _OFFICIAL_NON_TEXT_FIELDS}
    text["model_type"] = "qwen2"
    plugin = {
        "model_type": PLUGIN_MODEL_TYPE,
        "architectures": ["VideoLlama3ForCausalLM"],
        "text_config": text,
        "vision_config": to_plugin_vision_config(config["vision_encoder_config"]),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        **_placeholder_ids(config, name_or_path, download_options),
    }
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype is not None:
        plugin["dtype"] = dtype
    return plugin


def _plugin_from_native(config: dict[str, Any]) -> dict[str, Any]:
    plugin = dict(config)
    plugin["model_type"] = PLUGIN_MODEL_TYPE
    plugin["architectures"] = ["VideoLlama3ForCausalLM"]
    plugin["vision_config"] = to_plugin_vision_config(config.get("vision_config") or {})
    # transformers' class also ties when only its text configuration says so.
    text = config.get("text_config") or {}
    plugin["tie_word_embeddings"] = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    return plugin


def _with_pixel_statistics(
    vision: dict[str, Any], name_or_path: str, download_options: dict[str, Any]
) -> dict[str, Any]:
    """Fills a vision configuration's mean and std from the preprocessor saved with it."""
    processor = _read_json(name_or_path, "processor_config.json", download_options) or {}
    stored = processor.get("image_processor")
    if not isinstance(stored, dict):
        stored = _read_json(name_or_path, "preprocessor_config.json", download_options) or {}
    vision = dict(vision)
    for name in ("image_mean", "image_std"):
        wanted = stored.get(name)
        if not isinstance(wanted, (list, tuple)):
            continue
        if list(vision.setdefault(name, list(wanted))) != list(wanted):
            raise ValueError(
                f"Expected vision_config.{name} to be the preprocessor's, {list(wanted)}, got {vision[name]}"
                f"{_where(name_or_path)}: uint8 pixels would be normalised otherwise than floats."
            )
    return vision


def _placeholder_ids(
    config: dict[str, Any], name_or_path: str | None, download_options: dict[str, Any]
) -> dict[str, int]:
    added = _added_tokens(name_or_path, download_options) if name_or_path else {}
    return {
        "image_token_id": config.get("image_token_id", added.get(IMAGE_PLACEHOLDER, QWEN_IMAGE_TOKEN_ID)),
        "video_token_id": config.get("video_token_id", added.get(VIDEO_PLACEHOLDER, QWEN_VIDEO_TOKEN_ID)),
    }


def _added_tokens(name_or_path: str, download_options: dict[str, Any]) -> dict[str, int]:
    """The added tokens of a checkpoint's tokenizer, text to id; empty where it has no tokenizer files."""
    tokenizer_config = _read_json(name_or_path, "tokenizer_config.json", download_options) or {}
    decoder = tokenizer_config.get("added_tokens_decoder")
    if decoder:
        return {token["content"]: int(token_id) for token_id, token in decoder.items()}
    tokenizer = _read_json(name_or_path, "tokenizer.json", download_options) or {}
    if tokenizer.get("added_tokens"):
        return {token["content"]: int(token["id"]) for token in tokenizer["added_tokens"]}
    return _read_json(name_or_path, "added_tokens.json", download_options) or {}


def _read_json(name_or_path: str, filename: str, download_options: dict[str, Any]) -> dict[str, Any] | None:
    if os.path.isfile(name_or_path):
        name_or_path = os.path.dirname(name_or_path)
    path = cached_file(
        name_or_path,
        filename,
        **download_options,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        content: dict[str, Any] = json.load(file)
    return content


def _where(name_or_path: str | None) -> str:
    return f" ({name_or_path})" if name_or_path else ""
