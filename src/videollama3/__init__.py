"""VideoLLaMA3 for transformers: importing this package is all that the Auto classes need."""

from .demonstrator import demonstrator_path
from .modeling.configuration_videollama3 import VideoLlama3Config, VideoLlama3VisionConfig
from .modeling.modeling_videollama3 import VideoLlama3ForCausalLM, VideoLlama3Model
from .modeling.vision_encoder_videollama3 import VideoLlama3VisionModel
from .processing.image_processing_videollama3 import VideoLlama3ImageProcessor
from .processing.processing_videollama3 import VideoLlama3Processor
from .processing.video_processing_videollama3 import VideoLlama3VideoProcessor
from .registration import register

__version__ = "0.1.0"

__all__ = [
    "VideoLlama3Config",
    "VideoLlama3ForCausalLM",
    "VideoLlama3ImageProcessor",
    "VideoLlama3Model",
    "VideoLlama3Processor",
    "VideoLlama3VideoProcessor",
    "VideoLlama3VisionConfig",
    "VideoLlama3VisionModel",
    "demonstrator_path",
    "register",
]

register()
