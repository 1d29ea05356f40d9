"""The entry point that vLLM calls in each of its processes (group `vllm.general_plugins`).

Nothing enters; vLLM's registries learn this package's model and its way to sample videos. The model itself
stands in `vllm_model.py` and is imported only when a VideoLLaMA3 checkpoint is loaded.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from ..modeling.checkpoint_layouts import OFFICIAL_MODEL_TYPE, PLUGIN_MODEL_TYPE
from ..processing.processing_videollama3 import VideoLlama3Processor
from ..processing.prompt_tokens import CHAT_TEMPLATE, VIDEO_PLACEHOLDER
from ..registration import Videollama3Qwen2Config

# The release that tests/vllm was run with; vLLM's internals move with every minor release.
TESTED_VLLM = (0, 32)
ANY_VERSION_VARIABLE = "VIDEOLLAMA3_ANY_VLLM"

# Names in vLLM's registries. The second is no class: vLLM looks a video loader up by the name of the checkpoint's
# video processor, which it takes from transformers' static tables, where ours is none.
VIDEO_LOADER = "videollama3"
VIDEO_PROCESSOR_NAME = "videollama3-video-processor"
ARCHITECTURES = ("VideoLlama3ForCausalLM", "Videollama3Qwen2ForCausalLM")

# The rest describes decoded frames, or is a limit that protects the server from its clients.
_FILE_OPTIONS = ("fps", "max_frames", "start_time", "end_time", "max_visual_tokens")
_VLLM_DEFAULT_NUM_FRAMES = 32


def register() -> None:
    """Makes vLLM know VideoLLaMA3; calling it again changes nothing."""
    from transformers import AutoProcessor
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    from vllm import ModelRegistry

    # Importing the package has registered our classes with the Auto classes. Other models' servers load this
    # plugin too: a version that does not fit is an error only where one of our checkpoints is loaded.
    problem = version_problem()
    if problem is not None:
        logging.getLogger("vllm").warning(problem)
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, "videollama3.serving.vllm_model:VideoLlama3ForVllm")
    for model_type in (PLUGIN_MODEL_TYPE, OFFICIAL_MODEL_TYPE):
        VIDEO_PROCESSOR_MAPPING_NAMES[model_type] = VIDEO_PROCESSOR_NAME
    AutoProcessor.register(Videollama3Qwen2Config, Videollama3Qwen2Processor, exist_ok=True)
    VIDEO_LOADER_REGISTRY.register(VIDEO_LOADER, video_processor=VIDEO_PROCESSOR_NAME)(EncodedVideoLoader)


def version_problem() -> str | None:
    """Why the installed vLLM is refused; None where it is of the tested series or the user insists."""
    from vllm import __version__ as installed

    numbers = tuple(int(part) for part in installed.split(".")[:2] if part.isdecimal())
    if numbers == TESTED_VLLM or os.environ.get(ANY_VERSION_VARIABLE) == "1":
        return None
    series = ".".join(map(str, TESTED_VLLM))
    return (
        f"Expected vLLM {series}.*, the series that videollama3 was tested with, got {installed}: VideoLLaMA3 "
        f'checkpoints are not served. Install "vllm=={series}.*", or set {ANY_VERSION_VARIABLE}=1 to try.'
    )


def check_version() -> None:
    """Refuses a vLLM that this package was not tested with.

    Raises:
        ImportError: naming both versions and the way out.
    """
    problem = version_problem()
    if problem is not None:
        raise ImportError(problem)


class Videollama3Qwen2Processor(VideoLlama3Processor):
    """What vLLM takes a checkpoint's chat template from, under the name that checkpoints ask for."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """A `VideoLlama3Processor` whose template writes one placeholder per video, as vLLM wants it.

        The authors' own template needs the number of frames, which is not known before the video is read; this
        package's writes the same prompt.
        """
        processor = VideoLlama3Processor.from_pretrained(*args, **kwargs)
        template = processor.chat_template
        if isinstance(template, str) and VIDEO_PLACEHOLDER not in template and "video_token" not in template:
            processor.chat_template = CHAT_TEMPLATE
        return processor


class EncodedVideoLoader:
    """Takes the place of vLLM's own sampling: hands a video file on undecoded.

    Which frames are read, and at what size, follows from the whole request, which a loader does not see.
    """

    @classmethod
    def load_bytes(
        cls, data: bytes, num_frames: int = _VLLM_DEFAULT_NUM_FRAMES, **options: Any
    ) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
        """Wraps a file.

        Args:
            data: the file.
            num_frames: vLLM's own default, or an error: the option is called `max_frames` here.
            options: per-video options (`fps`, `max_frames`, `start_time`, `end_time`, `max_visual_tokens`), from
                vLLM's `media_io_kwargs`.

        Returns:
            uint8 (bytes of the file,), which is no video to vLLM, and the options.

        Raises:
            ValueError: for other options.
        """
        unknown = sorted(set(options) - set(_FILE_OPTIONS))
        if num_frames != _VLLM_DEFAULT_NUM_FRAMES:
            unknown.append("num_frames")
        if unknown:
            raise ValueError(
                f"Expected media_io_kwargs of a video among {', '.join(_FILE_OPTIONS)}, got {', '.join(unknown)}."
            )
        return np.frombuffer(data, dtype=np.uint8), dict(options)
