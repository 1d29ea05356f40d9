"""The parts of a new model, read from their own checkpoints: an image encoder, a Qwen2 language model, its tokenizer.

Folders or Hub ids enter, loaded parts leave with a record of what was dropped, added or changed on the way. Joining
them into one model and writing it is left to `initial_checkpoint.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, Qwen2ForCausalLM, SiglipVisionConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from ..modeling.checkpoint_checks import check_finite, check_sizes, weights_folder
from ..modeling.checkpoint_files import stored_tensors
from ..modeling.checkpoint_layouts import (
    IMAGE_PLACEHOLDER,
    NATIVE_MODEL_TYPE,
    NATIVE_VISION_MODEL_TYPE,
    OFFICIAL_MODEL_TYPE,
    OFFICIAL_VISION_MODEL_TYPE,
    PLUGIN_MODEL_TYPE,
    PLUGIN_VISION_MODEL_TYPE,
    VIDEO_PLACEHOLDER,
)
from ..modeling.configuration_videollama3 import VideoLlama3Config, VideoLlama3VisionConfig
from ..modeling.vision_encoder_videollama3 import VideoLlama3VisionModel
from ..processing.image_processing_videollama3 import VideoLlama3ImageProcessor
from ..processing.prompt_tokens import OFFICIAL_PLACEHOLDER

LLM_MODEL_TYPE = "qwen2"
SIGLIP_MODEL_TYPES = ("siglip", "siglip_vision_model")
ENCODER_MODEL_TYPES = (
    *SIGLIP_MODEL_TYPES,
    OFFICIAL_VISION_MODEL_TYPE,
    PLUGIN_VISION_MODEL_TYPE,
    NATIVE_VISION_MODEL_TYPE,
)
WHOLE_MODEL_TYPES = (OFFICIAL_MODEL_TYPE, PLUGIN_MODEL_TYPE, NATIVE_MODEL_TYPE)

# A SigLIP's names -> the encoder's.
SIGLIP_KEY_MAPPING = {r"^vision_model\.": ""}
# What a SigLIP has and the encoder has not: positions come from 2D RoPE, and every token is used, not a pooled one.
SIGLIP_DROPPED = {
    "position embedding": re.compile(r"^(vision_model\.)?embeddings\.position_(embedding\.weight|ids)$"),
    "pooling head": re.compile(r"^(vision_model\.)?head\."),
    "text tower": re.compile(r"^(text_model\.|logit_(scale|bias)$)"),
}
_SIGLIP_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)

# Of the chat format; every Qwen2 tokenizer has them.
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
# In the order of the released tokenizers, where the first two are part of Qwen2.5.
PROMPT_TOKENS = (
    IMAGE_PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    OFFICIAL_PLACEHOLDER,
    "<|stream_start|>",
    "<|stream_end|>",
)


@dataclasses.dataclass(frozen=True)
class EncoderPart:
    """An image encoder, ready for the model.

    Attributes:
        model: the encoder, every weight from its checkpoint.
        source: the folder or Hub id it came from.
        model_type: what that checkpoint says it is.
        dropped: what was left behind of that checkpoint, as text.
        unusual: fields in which it differs from the released encoder, as text.
    """

    model: VideoLlama3VisionModel
    source: str
    model_type: str
    dropped: tuple[str, ...]
    unusual: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LanguagePart:
    """A language model and its tokenizer, ready for the model.

    Attributes:
        model: the language model; its embedding has a row for every token.
        tokenizer: its tokenizer, with the tokens of the prompt.
        source: the folder or Hub id it came from.
        tied: whether the head shares the embedding's weight.
        added_tokens: tokens that the tokenizer lacked, and their ids.
        num_rows_before: rows of the embedding as stored.
        added_stop_token: the token that ends an answer, where the generation configuration did not stop at it.
    """

    model: Qwen2ForCausalLM
    tokenizer: Any
    source: str
    tied: bool
    added_tokens: Mapping[str, int]
    num_rows_before: int
    added_stop_token: str | None


def load_encoder(source: str, *, whole_model: bool, dtype: str | torch.dtype = "auto") -> EncoderPart:
    """Reads an image encoder.

    Args:
        source: folder or Hub id of a SigLIP (`SiglipVisionModel` or `SiglipModel`), of VL3-SigLIP-NaViT in any
            layout, or of a VideoLLaMA3.
        whole_model: whether `source` must be a whole VideoLLaMA3, of which the encoder is taken, or an encoder alone.
        dtype: of the weights; "auto" leaves them as stored.

    Raises:
        ValueError: for a checkpoint of another kind, one whose sizes do not fit, or one with weights that are
            missing, unknown or of another shape.
    """
    stored = _read_config(source)
    model_type = stored.get("model_type")
    _check_encoder_type(model_type, source, whole_model=whole_model)
    siglip = model_type in SIGLIP_MODEL_TYPES
    config = _siglip_encoder_config(source) if siglip else _encoder_config(source, whole_model=whole_model)
    _fill_pixel_statistics(config, source)
    _check_encoder(config, source)
    mapping = {"key_mapping": SIGLIP_KEY_MAPPING} if siglip else {}
    model, dropped = _load(
        VideoLlama3VisionModel,
        source,
        role="encoder",
        droppable=SIGLIP_DROPPED if siglip else {},
        config=config,
        dtype=dtype,
        **mapping,
    )
    if whole_model:
        dropped = ("language model and projector",)
    return EncoderPart(model, source, str(model_type), dropped, _unusual_fields(config))


def load_language_model(source: str, *, dtype: str | torch.dtype = "auto", seed: int = 0) -> LanguagePart:
    """Reads a Qwen2 or Qwen2.5 causal language model, and gives its tokenizer the tokens of the prompt.

    Args:
        source: folder or Hub id.
        dtype: of the weights; "auto" leaves them as stored.
        seed: of the embedding's new rows, where the tokenizer outgrows it.

    Raises:
        ValueError: for another kind of model, a quantized one, one with weights that are missing, unknown, of
            another shape or not a number, for damaged files, and for a tokenizer without the chat format's tokens.
    """
    stored = _read_config(source)
    if stored.get("model_type") != LLM_MODEL_TYPE:
        raise ValueError(
            f"Expected a Qwen2 or Qwen2.5 language model (model_type {LLM_MODEL_TYPE!r}) in {source!r}, got "
            f"model_type {stored.get('model_type')!r}: VideoLLaMA3 is built on no other."
        )
    if stored.get("quantization_config"):
        raise ValueError(
            f"Expected plain weights in {source!r}, got a quantized checkpoint: training starts from the unquantized "
            "model of the same name."
        )
    # Our own classes check their files by themselves.
    folder = weights_folder(source, {})
    if folder is not None:
        tensors = stored_tensors(folder)
        config = VideoLlama3Config(text_config=_sizes_only(stored)).text_config
        check_sizes(Qwen2ForCausalLM, config, tensors, list(tensors), folder)
    tokenizer, added = _prepare_tokenizer(source)
    model, _ = _load(Qwen2ForCausalLM, source, role="language model", dtype=dtype)
    check_finite(model, source)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    # What the weights say wins over what the configuration says.
    model.config.tie_word_embeddings = tied
    rows = model.model.embed_tokens.weight.shape[0]
    _fit_embeddings(model, tokenizer, seed=seed)
    stop = _stop_at_the_end_of_turns(model, tokenizer)
    return LanguagePart(model, tokenizer, source, tied, added, rows, stop)


def _sizes_only(stored: dict[str, Any]) -> dict[str, Any]:
    """A language model's configuration dictionary without what names its code or says where it came from."""
    return {key: value for key, value in stored.items() if key not in ("auto_map", "_name_or_path", "architectures")}


def _read_config(source: str) -> dict[str, Any]:
    config, _ = PreTrainedConfig.get_config_dict(source)
    if not config:
        raise ValueError(f"Expected a checkpoint's config.json in {source!r}, found none: check the folder or Hub id.")
    result: dict[str, Any] = config
    return result


def _check_encoder_type(model_type: Any, source: str, *, whole_model: bool) -> None:
    expected, other = (
        (WHOLE_MODEL_TYPES, ENCODER_MODEL_TYPES) if whole_model else (ENCODER_MODEL_TYPES, WHOLE_MODEL_TYPES)
    )
    if model_type in expected:
        return
    remedy = "no other encoder has the sizes and names that are read here."
    if model_type in other:
        kind, option = ("an encoder alone", "--vision") if whole_model else ("a whole VideoLLaMA3", "--vision-from")
        remedy = f"it is {kind}, pass it as {option}."
    raise ValueError(f"Expected model_type among {', '.join(expected)} in {source!r}, got {model_type!r}: {remedy}")


def _siglip_encoder_config(source: str) -> VideoLlama3VisionConfig:
    siglip = SiglipVisionConfig.from_pretrained(source)
    _check_channels(siglip.num_channels, source)
    if not isinstance(siglip.patch_size, int):
        raise ValueError(f"Expected square patches in {source!r}, got patch_size {siglip.patch_size!r}.")
    return VideoLlama3VisionConfig(**{name: getattr(siglip, name) for name in _SIGLIP_FIELDS})


def _encoder_config(source: str, *, whole_model: bool) -> VideoLlama3VisionConfig:
    if whole_model:
        whole: VideoLlama3VisionConfig = VideoLlama3Config.from_pretrained(source).vision_config
        return whole
    alone: VideoLlama3VisionConfig = VideoLlama3VisionConfig.from_pretrained(source)
    return alone


def _fill_pixel_statistics(config: VideoLlama3VisionConfig, source: str) -> None:
    """Mean and std that the encoder was trained with, where its checkpoint has a preprocessor that says."""
    try:
        stored, _ = VideoLlama3ImageProcessor.get_image_processor_dict(source)
    except OSError:  # an encoder saved without one
        return
    for name in ("image_mean", "image_std"):
        if isinstance(stored.get(name), (list, tuple)):
            setattr(config, name, list(stored[name]))


def _check_encoder(config: VideoLlama3VisionConfig, source: str) -> None:
    _check_channels(config.num_channels, source)
    if config.hidden_act not in ACT2FN:
        raise ValueError(
            f"Expected a hidden_act that transformers knows in {source!r}, got {config.hidden_act!r} "
            "(the released encoder has 'gelu_pytorch_tanh')."
        )


def _check_channels(num_channels: int, source: str) -> None:
    if num_channels != 3:
        raise ValueError(
            f"Expected an encoder of pictures with 3 channels in {source!r}, got num_channels {num_channels}: the "
            "processor reads every picture as RGB."
        )


def _unusual_fields(config: VideoLlama3VisionConfig) -> tuple[str, ...]:
    released = VideoLlama3VisionConfig()
    return tuple(
        f"{name} {getattr(config, name)} (released encoder: {getattr(released, name)})"
        for name in ("patch_size", "hidden_act", "layer_norm_eps", "rope_theta", "image_mean", "image_std")
        if getattr(config, name) != getattr(released, name)
    )


def _load(
    cls: Any, source: str, *, role: str, droppable: Mapping[str, re.Pattern[str]] | None = None, **options: Any
) -> tuple[Any, tuple[str, ...]]:
    """A model with every weight from the checkpoint, and the droppable groups that were left behind."""
    with _no_loading_report():
        model, info = cls.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    dropped: dict[str, int] = {}
    unknown = []
    for name in sorted(info["unexpected_keys"]):
        group = next((group for group, names in (droppable or {}).items() if names.match(name)), None)
        if group is None:
            unknown.append(name)
        else:
            dropped[group] = dropped.get(group, 0) + 1
    reshaped = [
        f"{name} {tuple(got)} for {tuple(expected)}" for name, got, expected in sorted(info["mismatched_keys"])
    ]
    problems = {"missing": sorted(info["missing_keys"]), "of another shape": reshaped, "unknown": unknown}
    found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
    if found:
        raise ValueError(
            f"Expected exactly the weights of the {role} that config.json describes in {source!r}, got {found}. "
            "The folder is incomplete, or its config.json belongs to another checkpoint."
        )
    return model, tuple(f"{group} ({count} tensor{'s' if count > 1 else ''})" for group, count in dropped.items())


@contextmanager
def _no_loading_report() -> Iterator[None]:
    """Silences transformers' table of names that do not fit: what matters of it is raised or reported here."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _prepare_tokenizer(source: str) -> tuple[Any, dict[str, int]]:
    tokenizer = AutoTokenizer.from_pretrained(source)
    vocabulary = tokenizer.get_vocab()
    absent = [token for token in CHAT_TOKENS if token not in vocabulary]
    if absent:
        raise ValueError(
            f"Expected a Qwen2 tokenizer with {' and '.join(CHAT_TOKENS)} in {source!r}, got one without "
            f"{' and '.join(absent)}: the chat format is made of them."
        )
    added = [token for token in PROMPT_TOKENS if token not in vocabulary]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added], special_tokens=True)
    return tokenizer, {token: int(tokenizer.convert_tokens_to_ids(token)) for token in added}


def _fit_embeddings(model: Qwen2ForCausalLM, tokenizer: Any, *, seed: int) -> None:
    """Gives every token a row; Qwen2.5's matrix has rows to spare, and then stays as it is."""
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed <= model.model.embed_tokens.weight.shape[0]:
        return
    with torch.random.fork_rng(devices=[]), _no_loading_report():
        torch.manual_seed(seed)
        model.resize_token_embeddings(needed)


def _stop_at_the_end_of_turns(model: Qwen2ForCausalLM, tokenizer: Any) -> str | None:
    """Base models stop at the end of the text only, and would run on after their answer."""
    token = "<|im_end|>"
    token_id = tokenizer.convert_tokens_to_ids(token)
    stored = model.generation_config.eos_token_id
    stops = [] if stored is None else list(stored) if isinstance(stored, (list, tuple)) else [stored]
    if token_id in stops:
        return None
    model.generation_config.eos_token_id = [*stops, token_id]
    return token
