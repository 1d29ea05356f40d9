"""VideoLLaMA3 for transformers."""

__version__ = "0.1.0"

from .modeling.configuration_videollama3 import VideoLlama3Config, VideoLlama3VisionConfig
from .modeling.modeling_videollama3 import VideoLlama3ForCausalLM, VideoLlama3Model
from .modeling.vision_encoder_videollama3 import VideoLlama3VisionModel
