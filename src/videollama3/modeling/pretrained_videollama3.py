"""What all model classes share: flags for transformers, reading the official parameter names, the head's weight.

A checkpoint folder of any layout enters `from_pretrained`, a model leaves; configuration dictionaries are
left to `configuration_videollama3.py`, key tables to `checkpoint_layouts.py`, checks to `checkpoint_checks.py`.
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .checkpoint_checks import check_before_loading, check_finite
from .checkpoint_layouts import OFFICIAL_KEY_MAPPING
from .configuration_videollama3 import VideoLlama3Config

logger = logging.get_logger(__name__)


class VideoLlama3PreTrainedModel(PreTrainedModel):
    """Base of every model class of this package."""

    config_class: type[PreTrainedConfig] = VideoLlama3Config
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VideoLlama3VisionEncoderLayer", "Qwen2DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    # Official parameter names -> this class's; transformers applies them while it reads the weights.
    _official_key_mapping = OFFICIAL_KEY_MAPPING
    # What a saved folder gives to `trust_remote_code`, by Auto class; classes of this class's own module. All are
    # named: transformers looks up what is not by the configuration's class name, which is also one of its own.
    _auto_classes: dict[str, str] = {}  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Loads a checkpoint of any of the three layouts; the arguments are transformers' own.

        Saving such a model afterwards writes this package's layout. A `lm_head.weight` in the checkpoint that
        differs from the token embedding wins over `tie_word_embeddings`; which one is used is logged.

        Raises:
            FileNotFoundError: where an index names weight files that are absent.
            ValueError: for weight files that are damaged, leave their folder, could run code, have other shapes
                than the configuration asks for or hold NaN. The headers are checked before anything is allocated.
        """
        check_before_loading(cls, pretrained_model_name_or_path, kwargs)
        kwargs.setdefault("key_mapping", cls._official_key_mapping)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # transformers would undo the renaming in `save_pretrained` while the saved configuration is ours.
        if hasattr(model, "_weight_conversions"):
            del model._weight_conversions
        check_finite(model, str(pretrained_model_name_or_path))
        model._settle_head()
        return loaded

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *mesh: Any) -> Any:
        """Spreads an empty model over processes; the arguments are transformers' own.

        Raises:
            ValueError: when the heads of some part cannot be dealt out to that many processes.
        """
        size = 1 if distributed_config is None else distributed_config.tp_size or 1
        # Whoever gives rules of their own says with them what is dealt out.
        if not isinstance(getattr(distributed_config, "tp_plan", None), dict):
            _check_heads(model.config, size)
        return super().maybe_distribute_model(model, distributed_config, *mesh)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Saves weights, configuration and this code; the arguments are transformers' own."""
        if self._auto_class is not None:
            module = type(self).__module__.rsplit(".", 1)[-1]
            self.config.auto_map = {auto: f"{module}.{name}" for auto, name in self._auto_classes.items()}
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _settle_head(self) -> None:
        """Makes the configuration say what the loaded weights say about the head, and reports it."""
        head = self.get_output_embeddings()
        if head is None:
            return
        if head.weight is self.get_input_embeddings().weight:
            logger.info("lm_head uses the token embedding's weight (tie_word_embeddings is true).")
            return
        if self.config.tie_word_embeddings:
            logger.warning(
                "The configuration says tie_word_embeddings, but the checkpoint has a lm_head.weight that differs "
                "from the token embedding: lm_head uses the checkpoint's lm_head.weight, and tie_word_embeddings "
                "is now false."
            )
            self.config.tie_word_embeddings = self.config.text_config.tie_word_embeddings = False
        logger.info("lm_head uses a weight of its own.")


def _check_heads(config: Any, tp_size: int) -> None:
    parts = {"vision encoder": getattr(config, "vision_config", config), "language model": config.get_text_config()}
    for part, sub_config in parts.items():
        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(sub_config, name, tp_size)
            if heads % tp_size:
                raise ValueError(
                    f"Expected a tp_size that divides the {part}'s `{name}` ({heads}), got {tp_size}: every process "
                    "holds whole heads. Choose fewer processes, or shard with fsdp_size."
                )
