"""What all model classes share: flags for transformers, and reading the official parameter names.

A checkpoint folder of any layout enters `from_pretrained`, a model leaves; configuration dictionaries are
left to `configuration_videollama3.py`, key tables to `checkpoint_layouts.py`.
"""

from __future__ import annotations

from typing import Any

from transformers.modeling_utils import PreTrainedModel

from .checkpoint_layouts import OFFICIAL_KEY_MAPPING
from .configuration_videollama3 import VideoLlama3Config


class VideoLlama3PreTrainedModel(PreTrainedModel):
    """Base of every model class of this package."""

    config_class = VideoLlama3Config
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Loads a checkpoint of any of the three layouts; the arguments are transformers' own.

        Saving such a model afterwards writes this package's layout.
        """
        kwargs.setdefault("key_mapping", cls._official_key_mapping)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # transformers would undo the renaming in `save_pretrained` while the saved configuration is ours.
        if hasattr(model, "_weight_conversions"):
            del model._weight_conversions
        return loaded
