"""Makes the Auto classes of transformers know this package, under our names and the official ones.

Nothing enters; transformers' registries are filled. The classes themselves stand in `modeling/` and
`processing/`.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

# Modules, not the top level: without torchvision there are dummies there.
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from .modeling.checkpoint_layouts import OFFICIAL_MODEL_TYPE, OFFICIAL_VISION_MODEL_TYPE
from .modeling.configuration_videollama3 import VideoLlama3Config, VideoLlama3VisionConfig
from .modeling.modeling_videollama3 import VideoLlama3ForCausalLM, VideoLlama3Model
from .modeling.torch_varlen import TORCH_VARLEN, torch_varlen_attention
from .modeling.vision_encoder_videollama3 import VideoLlama3VisionModel
from .processing.image_processing_videollama3 import VideoLlama3ImageProcessor
from .processing.processing_videollama3 import VideoLlama3Processor
from .processing.video_processing_videollama3 import VideoLlama3VideoProcessor


# Official checkpoints ask for their classes by these names, and our own saved processors do too (our names
# are also those of classes inside transformers). Loading any of them gives this package's class.
class Videollama3Qwen2Config(VideoLlama3Config):
    """Official `model_type` of a whole model; loads as `VideoLlama3Config`."""

    model_type = OFFICIAL_MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A `VideoLlama3Config`."""
        return VideoLlama3Config.from_dict(config_dict, **kwargs)


class Videollama3VisionEncoderConfig(VideoLlama3VisionConfig):
    """Official `model_type` of the encoder alone; loads as `VideoLlama3VisionConfig`."""

    model_type = OFFICIAL_VISION_MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A `VideoLlama3VisionConfig`."""
        return VideoLlama3VisionConfig.from_dict(config_dict, **kwargs)


class Videollama3Qwen2Processor(VideoLlama3Processor):
    """Official name; loads as `VideoLlama3Processor`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """A `VideoLlama3Processor`."""
        return VideoLlama3Processor.from_pretrained(*args, **kwargs)


class Videollama3ImageProcessor(VideoLlama3ImageProcessor):
    """Official name; loads as `VideoLlama3ImageProcessor`."""

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A `VideoLlama3ImageProcessor`."""
        return VideoLlama3ImageProcessor.from_dict(image_processor_dict, **kwargs)


class Videollama3VideoProcessor(VideoLlama3VideoProcessor):
    """Name in the style of the official ones; loads as `VideoLlama3VideoProcessor`."""

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A `VideoLlama3VideoProcessor`."""
        return VideoLlama3VideoProcessor.from_dict(image_processor_dict, **kwargs)


def register() -> None:
    """Registers every class; calling it again changes nothing."""
    AttentionInterface.register(TORCH_VARLEN, torch_varlen_attention)
    # What it does not run itself it hands to sdpa, with sdpa's masks.
    AttentionMaskInterface.register(TORCH_VARLEN, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    for config in (VideoLlama3Config, VideoLlama3VisionConfig, Videollama3Qwen2Config, Videollama3VisionEncoderConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(VideoLlama3Config, VideoLlama3Model, exist_ok=True)
    AutoModel.register(VideoLlama3VisionConfig, VideoLlama3VisionModel, exist_ok=True)
    AutoModelForCausalLM.register(VideoLlama3Config, VideoLlama3ForCausalLM, exist_ok=True)
    AutoModelForImageTextToText.register(VideoLlama3Config, VideoLlama3ForCausalLM, exist_ok=True)
    # Where it is not registered, transformers takes its own class, whose configuration has the same name. Not in all
    # versions.
    multimodal = getattr(transformers, "AutoModelForMultimodalLM", None)
    if multimodal is not None:
        multimodal.register(VideoLlama3Config, VideoLlama3ForCausalLM, exist_ok=True)
    for config, processor, image_processor, video_processor in (
        # Image and video processor by their other names: transformers looks registered classes up by name first, and
        # would give ours to its own processor of the native layout.
        (VideoLlama3Config, VideoLlama3Processor, Videollama3ImageProcessor, Videollama3VideoProcessor),
        (
            Videollama3Qwen2Config,
            Videollama3Qwen2Processor,
            Videollama3ImageProcessor,
            Videollama3VideoProcessor,
        ),
    ):
        AutoProcessor.register(config, processor, exist_ok=True)
        # Not AutoImageProcessor.register: it would add the class inside transformers whose configuration has
        # the same name, and prefer it where torchvision is installed.
        IMAGE_PROCESSOR_MAPPING.register(
            config, {"pil": image_processor, "torchvision": image_processor}, exist_ok=True
        )
        AutoVideoProcessor.register(config, video_processor, exist_ok=True)
    for encoder_config, image_processor in (
        (VideoLlama3VisionConfig, Videollama3ImageProcessor),
        (Videollama3VisionEncoderConfig, Videollama3ImageProcessor),
    ):
        IMAGE_PROCESSOR_MAPPING.register(
            encoder_config, {"pil": image_processor, "torchvision": image_processor}, exist_ok=True
        )
