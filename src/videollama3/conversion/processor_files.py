"""Image, video and processor settings of a checkpoint folder, for each layout.

A folder of any layout enters, the settings files of another layout leave. Tokens and prompts are left to
`tokenizer_files.py`, the model's own configuration to `modeling/checkpoint_layouts.py`.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

from ..modeling.checkpoint_files import file_inside
from ..processing.image_processing_videollama3 import VideoLlama3ImageProcessor
from ..processing.processing_videollama3 import VideoLlama3Processor
from ..processing.prompt_tokens import CHAT_TEMPLATE, OFFICIAL_PLACEHOLDER
from ..processing.video_processing_videollama3 import VideoLlama3VideoProcessor
from .tokenizer_files import OFFICIAL_CHAT_TEMPLATE, has_tokenizer, is_released_format, write_tokenizer
from .weights import write_json

_SETTINGS_FILES = ("processor_config.json", "preprocessor_config.json")
_OFFICIAL_PROCESSOR = {"AutoProcessor": "processing_videollama3.Videollama3Qwen2Processor"}
_OFFICIAL_IMAGE_PROCESSOR = {"AutoImageProcessor": "image_processing_videollama3.Videollama3ImageProcessor"}
# Pixel settings that the other layouts have under the same names.
_SHARED = (
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "patch_size",
    "resample",
    "rescale_factor",
)


def has_settings(folder: str) -> bool:
    """Whether a folder has settings of an image processor."""
    return any(os.path.lexists(os.path.join(folder, name)) for name in _SETTINGS_FILES)


def load_processor(folder: str) -> VideoLlama3Processor | None:
    """The processor of a folder of any layout; None where it has no tokenizer or no settings."""
    if not (has_tokenizer(folder) and has_settings(folder)):
        return None
    processor: VideoLlama3Processor = VideoLlama3Processor.from_pretrained(folder, trust_remote_code=False)
    return processor


def placeholder_index(processor: VideoLlama3Processor | None, fallback: int) -> int:
    """Id of the authors' placeholder `<image>`, which an official configuration records."""
    if processor is None:
        return fallback
    return int(processor.tokenizer.get_vocab().get(OFFICIAL_PLACEHOLDER, fallback))


def write_processor(folder: str, target: str, *, to: str, processor: VideoLlama3Processor | None) -> list[str]:
    """Writes all that belongs to a whole model's processor, and the generation settings.

    Args:
        folder: the source.
        target: the folder to write to.
        to: "plugin", "official" or "native".
        processor: the source's, loaded; None where it has none.

    Returns:
        Remarks for the user: what was absent, or could not be translated.
    """
    _copy(folder, target, "generation_config.json")
    if processor is None:
        return ["no processor: the source has no complete set of tokenizer and preprocessor files"]
    remarks = []
    if to == "plugin":
        # Also this package's code, for `trust_remote_code`.
        processor.save_pretrained(target)
        for name in os.listdir(target):
            if name.startswith(("tokenizer", "chat_template")):
                os.remove(os.path.join(target, name))
    elif to == "official":
        remarks += _write_official(target, processor)
    else:
        _write_native(target, processor)
    template = processor.chat_template
    if is_released_format(processor):
        template = OFFICIAL_CHAT_TEMPLATE if to == "official" else CHAT_TEMPLATE
    else:
        remarks.append("the chat template is not the released models': copied as it is")
    write_tokenizer(folder, target, processor.tokenizer, official=to == "official", chat_template=template)
    return remarks


def write_image_processor(folder: str, target: str, *, to: str) -> list[str]:
    """Writes the settings that belong to a vision encoder alone; returns remarks."""
    if not has_settings(folder):
        return ["no image processor: the source has no preprocessor_config.json"]
    processor = VideoLlama3ImageProcessor.from_pretrained(folder)
    if to == "plugin":
        processor.save_pretrained(target)
        return []
    settings = _native_image(processor)
    if to == "official":
        settings = {"auto_map": _OFFICIAL_IMAGE_PROCESSOR, **_official_image(processor)}
        if processor.merge_size != 1:
            settings["merge_size"] = processor.merge_size
    write_json(os.path.join(target, "preprocessor_config.json"), settings)
    return []


def _copy(folder: str, target: str, name: str) -> None:
    if os.path.lexists(os.path.join(folder, name)):
        shutil.copyfile(file_inside(folder, name), os.path.join(target, name))


# ---------------------------------------------------------------------- official


def _official_image(processor: VideoLlama3ImageProcessor) -> dict[str, Any]:
    settings = {
        "image_processor_type": "Videollama3ImageProcessor",
        **{name: getattr(processor, name) for name in _SHARED},
        "max_tokens": processor.max_tokens,
        "min_tokens": processor.min_tokens,
    }
    return {**settings, **_unusual(processor, ("pixel_dtype",))}


def _write_official(target: str, processor: VideoLlama3Processor) -> list[str]:
    image, video = processor.image_processor, processor.video_processor
    class_name = {"processor_class": "Videollama3Qwen2Processor"}
    pixel = {
        "auto_map": {**_OFFICIAL_IMAGE_PROCESSOR, **_OFFICIAL_PROCESSOR},
        **class_name,
        **_official_image(image),
    }
    write_json(os.path.join(target, "preprocessor_config.json"), pixel)
    flat = {
        "fps": video.fps,
        "image_merge_size": image.merge_size,
        "max_frames": video.max_frames,
        "video_merge_size": video.merge_size,
    }
    write_json(os.path.join(target, "processor_config.json"), {"auto_map": _OFFICIAL_PROCESSOR, **class_name, **flat})
    implied = VideoLlama3VideoProcessor.from_dict(
        {**pixel, "fps": video.fps, "max_frames": video.max_frames, "merge_size": video.merge_size}
    )
    implied.use_token_compression = video.use_token_compression
    if _settings_of(implied) == _settings_of(video):
        return []
    # Ours reads this file also beside official ones; the authors' code does not look at it.
    write_json(os.path.join(target, "video_preprocessor_config.json"), _settings_of(video))
    return ["the video processor has settings that the authors' code does not know: video_preprocessor_config.json"]


def _settings_of(processor: Any) -> dict[str, Any]:
    return {name: getattr(processor, name) for name in processor.fields}


# ---------------------------------------------------------------------- native


def _write_native(target: str, processor: VideoLlama3Processor) -> None:
    """One file as transformers 5 writes it, and the two that older versions read."""
    image, video = _native_image(processor.image_processor), _native_video(processor.video_processor)
    class_name = {"processor_class": "VideoLlama3Processor"}
    write_json(
        os.path.join(target, "processor_config.json"),
        {**class_name, "image_processor": image, "video_processor": video},
    )
    write_json(os.path.join(target, "preprocessor_config.json"), {**class_name, **image})
    write_json(os.path.join(target, "video_preprocessor_config.json"), {**class_name, **video})


def _native_image(processor: VideoLlama3ImageProcessor) -> dict[str, Any]:
    return {
        "image_processor_type": "VideoLlama3ImageProcessor",
        **_native_pixels(processor),
        **_unusual(processor, ("pixel_dtype",)),
    }


def _native_video(processor: VideoLlama3VideoProcessor) -> dict[str, Any]:
    own = (
        "pixel_dtype",
        "compression_threshold",
        "compression_min_tokens",
        "max_read_seconds",
        "max_frame_pixels",
        "max_duration_seconds",
    )
    return {
        "video_processor_type": "VideoLlama3VideoProcessor",
        **_native_pixels(processor),
        "fps": processor.fps,
        "max_frames": processor.max_frames,
        # Without it transformers' class takes every frame of a video.
        "do_sample_frames": True,
        "return_metadata": True,
        "use_token_compression": processor.use_token_compression,
        **_unusual(processor, own),
    }


def _native_pixels(processor: Any) -> dict[str, Any]:
    """Shared settings, with limits counted in pixels instead of tokens."""
    token_pixels = (processor.patch_size * processor.merge_size) ** 2
    return {
        **{name: getattr(processor, name) for name in _SHARED},
        "merge_size": processor.merge_size,
        "temporal_patch_size": 1,
        "size": {
            "shortest_edge": processor.min_tokens * token_pixels,
            "longest_edge": processor.max_tokens * token_pixels,
        },
    }


def _unusual(processor: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Settings that the target has no name for, where they are not the default: kept, for the way back."""
    default = type(processor)()
    return {name: getattr(processor, name) for name in names if getattr(processor, name) != getattr(default, name)}
