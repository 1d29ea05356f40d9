"""Configurations of the vision encoder and of the whole model.

Values from Python or from a `config.json` of any of the three layouts enter, checked configuration objects
leave; what the three layouts look like is left to `checkpoint_layouts.py`.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config
from transformers.configuration_utils import PreTrainedConfig

from .checkpoint_layouts import (
    QWEN_IMAGE_TOKEN_ID,
    QWEN_VIDEO_TOKEN_ID,
    to_plugin_config,
    to_plugin_vision_config,
)

# Arguments of `from_pretrained` that say where a checkpoint's files are.
_DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


# Largest sizes that a configuration may name, far above any real model: what a stranger's file says is bounded
# before anything is built from it.
_TEXT_LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "max_position_embeddings": 2**40,
}
_VISION_LIMITS = {
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16,
    "num_channels": 2**8,
    "patch_size": 2**10,
}


class VideoLlama3VisionConfig(PreTrainedConfig):
    """The vision encoder: SigLIP so400m/14 with 2D RoPE instead of learned positions.

    Args:
        hidden_size: width of the encoder.
        intermediate_size: width of each MLP's hidden layer.
        num_hidden_layers: number of encoder layers.
        num_attention_heads: number of heads; must divide `hidden_size` into a multiple of 4.
        num_channels: colour channels of a patch.
        patch_size: side of a square patch, in pixels.
        hidden_act: activation of the MLPs.
        layer_norm_eps: epsilon of every layer norm.
        attention_dropout: dropout probability on attention weights, training only.
        rope_theta: base of the 2D rotary embedding.
        initializer_range: standard deviation of fresh weights.
        image_mean: per-channel mean that uint8 `pixel_values` are normalised with on the device, after
            scaling to 0..1.
        image_std: per-channel standard deviation, likewise.
        reuse_identical_frames: whether, without gradients, a frame that is bit-identical to the one before it in
            its video is not encoded again.
        kwargs: fields common to all configurations of transformers.
    """

    model_type = "videollama3_vision"
    base_config_key = "vision_config"
    _auto_class = "AutoConfig"
    base_model_tp_plan = {  # noqa: RUF012 - transformers reads a plain class attribute
        "encoder.layers.*.self_attn.q_proj": "colwise",
        "encoder.layers.*.self_attn.k_proj": "colwise",
        "encoder.layers.*.self_attn.v_proj": "colwise",
        "encoder.layers.*.self_attn.out_proj": "rowwise",
        "encoder.layers.*.mlp.fc1": "colwise",
        "encoder.layers.*.mlp.fc2": "rowwise",
    }
    # The default of transformers names parts that this encoder does not have: its layers would be gathered as one.
    base_model_fsdp_plan = {"encoder.layers.*": "free_full_weight"}  # noqa: RUF012

    def __init__(
        self,
        hidden_size: int = 1152,
        intermediate_size: int = 4304,
        num_hidden_layers: int = 27,
        num_attention_heads: int = 16,
        num_channels: int = 3,
        patch_size: int = 14,
        hidden_act: str = "gelu_pytorch_tanh",
        layer_norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        rope_theta: float = 10000.0,
        initializer_range: float = 0.02,
        image_mean: tuple[float, ...] | list[float] = (0.5, 0.5, 0.5),
        image_std: tuple[float, ...] | list[float] = (0.5, 0.5, 0.5),
        reuse_identical_frames: bool = True,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.attention_dropout = attention_dropout
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.reuse_identical_frames = reuse_identical_frames
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        _check_sizes("the vision encoder", {name: getattr(self, name) for name in _VISION_LIMITS}, _VISION_LIMITS)
        if self.hidden_size % (4 * self.num_attention_heads) != 0:
            raise ValueError(
                "Expected the vision encoder's `hidden_size` to be a multiple of 4 * `num_attention_heads` "
                f"(2D rotary embeddings), got {self.hidden_size} and {self.num_attention_heads} heads."
            )
        if not len(self.image_mean) == len(self.image_std) == self.num_channels:
            raise ValueError(
                f"Expected one `image_mean` and one `image_std` for each of {self.num_channels} channels, "
                f"got {self.image_mean} and {self.image_std}."
            )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads `config.json` of an encoder or of a whole model, in any layout."""
        options = {name: kwargs[name] for name in _DOWNLOAD_OPTIONS if kwargs.get(name) is not None}
        options["name_or_path"] = str(pretrained_model_name_or_path)
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        config = to_plugin_config(config, **options)
        if "vision_config" in config:
            return config, kwargs
        return to_plugin_vision_config(config, **options), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds the configuration from a dictionary in any layout."""
        return super().from_dict(to_plugin_vision_config(config_dict), **kwargs)


class VideoLlama3Config(PreTrainedConfig):
    """The whole model: vision encoder, projector, Qwen2 language model.

    Args:
        text_config: the language model, a `Qwen2Config` or its dictionary; defaults to `Qwen2Config()`.
        vision_config: the vision encoder, a `VideoLlama3VisionConfig` or its dictionary.
        image_token_id: id of the placeholder of one visual token of an image (`<|image_pad|>`).
        video_token_id: id of the placeholder of one kept visual token of a video (`<|video_pad|>`).
        tie_word_embeddings: whether `lm_head` shares its weight with the token embedding; defaults to what
            `text_config` says.
        kwargs: fields common to all configurations of transformers.
    """

    model_type = "videollama3"
    _auto_class = "AutoConfig"
    sub_configs = {"text_config": Qwen2Config, "vision_config": VideoLlama3VisionConfig}  # noqa: RUF012
    sub_configs_defaults = sub_configs  # the name in newer releases of transformers
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states", "video_hidden_states"]  # noqa: RUF012
    # No tensor parallelism for the projector: 0.2 % of a visual token's work, and a reduction more.
    base_model_fsdp_plan = {"projector": "free_full_weight"}  # noqa: RUF012

    def __init__(
        self,
        text_config: Qwen2Config | dict[str, Any] | None = None,
        vision_config: VideoLlama3VisionConfig | dict[str, Any] | None = None,
        image_token_id: int = QWEN_IMAGE_TOKEN_ID,
        video_token_id: int = QWEN_VIDEO_TOKEN_ID,
        tie_word_embeddings: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if text_config is None or isinstance(text_config, dict):
            given = {name: value for name, value in (text_config or {}).items() if value is not None}
            _check_sizes("the language model", given, _TEXT_LIMITS)
            text: Qwen2Config = Qwen2Config(**_without_model_type(text_config or {}, expected="qwen2"))
        else:
            text = text_config
        _check_text(text)
        if vision_config is None or isinstance(vision_config, dict):
            vision_config = VideoLlama3VisionConfig(
                **_without_model_type(to_plugin_vision_config(vision_config or {}), expected="videollama3_vision")
            )
        if tie_word_embeddings is None:
            tie_word_embeddings = bool(text.tie_word_embeddings)
        self.text_config: Qwen2Config = text
        self.vision_config: VideoLlama3VisionConfig = vision_config
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.tie_word_embeddings = tie_word_embeddings
        # transformers sizes and ties embeddings by the text configuration.
        text.tie_word_embeddings = tie_word_embeddings
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **kwargs})

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads `config.json` in any layout and translates it."""
        options = {name: kwargs[name] for name in _DOWNLOAD_OPTIONS if kwargs.get(name) is not None}
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return to_plugin_config(config, name_or_path=str(pretrained_model_name_or_path), **options), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds the configuration from a dictionary in any layout."""
        # Not the dictionary's own `_name_or_path`: it names a folder of whoever saved it.
        return super().from_dict(to_plugin_config(config_dict, name_or_path=kwargs.get("name_or_path")), **kwargs)


def _check_sizes(part: str, values: dict[str, Any], limits: dict[str, int]) -> None:
    for name, most in limits.items():
        value = values.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"Expected `{name}` of {part} to be a positive integer, got {value!r}.")
        if value > most:
            raise ValueError(f"Expected `{name}` of {part} to be at most {most}, got {value}: no model is that large.")


def _check_text(config: Qwen2Config) -> None:
    values = {name: value for name in _TEXT_LIMITS if (value := getattr(config, name, None)) is not None}
    _check_sizes("the language model", values, _TEXT_LIMITS)
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None)
    divisible = config.hidden_size % (2 * heads) == 0 if head_dim is None else head_dim % 2 == 0
    if not divisible:
        raise ValueError(
            "Expected the language model's `hidden_size` to be a multiple of 2 * `num_attention_heads` (rotary "
            f"embeddings), got {config.hidden_size} and {heads} heads."
        )
    if heads % key_value_heads != 0:
        raise ValueError(
            "Expected the language model's `num_key_value_heads` to divide its `num_attention_heads`, got "
            f"{key_value_heads} and {heads}."
        )


def _without_model_type(config: dict[str, Any], *, expected: str) -> dict[str, Any]:
    model_type = config.get("model_type", expected)
    if model_type != expected:
        raise ValueError(f"Expected a sub-configuration with model_type {expected!r}, got {model_type!r}.")
    return {key: value for key, value in config.items() if key != "model_type"}
