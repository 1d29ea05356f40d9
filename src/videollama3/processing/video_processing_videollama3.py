"""Videos -> sampled frames -> patches, with the mask of tokens that survive pruning.

Videos in any form enter; `pixel_values_videos`, `video_grid_thw`, `video_merge_sizes` and
`video_compression_mask` leave. Conversations are left to `processing_videollama3.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, ClassVar

from transformers.dynamic_module_utils import custom_object_save
from transformers.feature_extraction_utils import BatchFeature

from .media_requests import (
    PixelDtype,
    PixelSettings,
    RequestEstimate,
    encode_request,
    estimate_request,
    to_video_tensors,
)
from .pixel_processor_videollama3 import VideoLlama3PixelProcessor
from .planned_media import VideoOptions, is_frame, is_frame_list, plan_videos
from .video_file import ReadingLimits
from .video_reading import Progress
from .visual_budget import ItemSize, target_sizes

# Options that may stand in a video's content dict or be given for all videos of a call.
PER_VIDEO_OPTIONS = (
    "fps",
    "max_frames",
    "start_time",
    "end_time",
    "timestamps",
    "max_visual_tokens",
    "video_metadata",
    "do_sample_frames",
    "max_read_seconds",
)


class VideoLlama3VideoProcessor(VideoLlama3PixelProcessor):
    """Samples videos by the training rule, decodes with PyAV and prunes unchanged tokens.

    Args:
        merge_size: side of a block of patches that becomes one visual token.
        fps: ticks per second at which a video is sampled.
        max_frames: at most so many frames, spread over the whole video.
        use_token_compression: whether tokens that barely differ from the previous frame are pruned.
        compression_threshold: mean absolute difference of normalised values, times 255, above which a token
            is kept; the released models' 0.1 means 0.05 grey levels.
        compression_min_tokens: kept in every frame.
        max_read_seconds: opening or decoding one video takes at most so long, or raises TimeoutError; so does
            downloading it, or raises ValueError.
        max_frame_pixels: a video with larger frames is refused.
        max_duration_seconds: a longer video is refused.
        kwargs: the settings of `VideoLlama3PixelProcessor`.
    """

    _auto_class = "AutoVideoProcessor"
    model_input_names: ClassVar[list[str]] = [
        "pixel_values_videos",
        "video_grid_thw",
        "video_merge_sizes",
        "video_compression_mask",
    ]
    nested_key = "video_processor"
    config_files = ("video_preprocessor_config.json", "preprocessor_config.json")
    fields = (
        *VideoLlama3PixelProcessor.fields,
        "fps",
        "max_frames",
        "use_token_compression",
        "compression_threshold",
        "compression_min_tokens",
        "max_read_seconds",
        "max_frame_pixels",
        "max_duration_seconds",
    )

    def __init__(
        self,
        *,
        merge_size: int = 2,
        fps: float = 1,
        max_frames: int = 180,
        use_token_compression: bool = True,
        compression_threshold: float = 0.1,
        compression_min_tokens: int = 1,
        max_read_seconds: float = ReadingLimits.max_seconds,
        max_frame_pixels: int = ReadingLimits.max_pixels,
        max_duration_seconds: float = ReadingLimits.max_duration_seconds,
        **kwargs: Any,
    ) -> None:
        super().__init__(merge_size=merge_size, **kwargs)
        self.fps = fps if fps is not None else 1
        self.max_frames = max_frames
        self.use_token_compression = use_token_compression
        self.compression_threshold = compression_threshold
        self.compression_min_tokens = compression_min_tokens
        self.max_read_seconds = max_read_seconds
        self.max_frame_pixels = max_frame_pixels
        self.max_duration_seconds = max_duration_seconds

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoVideoProcessor") -> None:
        """As transformers' video processors: the base class would register an image processor.

        Args:
            auto_class: the Auto class that a saved folder names this class for.
        """
        super().register_for_auto_class(auto_class)

    def settings(self, **overrides: Any) -> PixelSettings:
        """The settings as a record; `overrides` that are None leave the processor's own value."""
        own = {
            "use_token_compression": self.use_token_compression,
            "compression_threshold": self.compression_threshold,
            "compression_min_tokens": self.compression_min_tokens,
        }
        own.update({key: value for key, value in overrides.items() if value is not None})
        return super().settings(**own)

    def options(self, **given: Any) -> VideoOptions:
        """Sampling options of one video: what was given, else this processor's defaults."""
        given = {key: value for key, value in given.items() if value is not None}
        unknown = sorted(set(given) - set(PER_VIDEO_OPTIONS))
        if unknown:
            raise TypeError(f"Expected video options among {', '.join(PER_VIDEO_OPTIONS)}, got {', '.join(unknown)}.")
        return VideoOptions(
            fps=given.get("fps", self.fps),
            max_frames=given.get("max_frames", self.max_frames),
            start_time=given.get("start_time"),
            end_time=given.get("end_time"),
            timestamps=given.get("timestamps"),
            max_visual_tokens=given.get("max_visual_tokens"),
            metadata=given.get("video_metadata"),
            do_sample_frames=given.get("do_sample_frames"),
            fps_given="fps" in given,
            limits=ReadingLimits(
                max_seconds=given.get("max_read_seconds", self.max_read_seconds),
                max_pixels=self.max_frame_pixels,
                max_duration_seconds=self.max_duration_seconds,
            ),
        )

    def __call__(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """The same as `preprocess`."""
        return self.preprocess(videos, **kwargs)

    def preprocess(
        self,
        videos: Any,
        *,
        fps: float | None = None,
        max_frames: int | None = None,
        start_time: float | None = None,
        end_time: float | None = None,
        timestamps: Any = None,
        video_metadata: Any = None,
        do_sample_frames: bool | None = None,
        max_read_seconds: float | None = None,
        merge_size: int | None = None,
        min_tokens: int | None = None,
        max_tokens: int | None = None,
        max_visual_tokens: int | None = None,
        use_token_compression: bool | None = None,
        compression_threshold: float | None = None,
        compression_min_tokens: int | None = None,
        do_resize: bool | None = None,
        do_rescale: bool | None = None,
        do_normalize: bool | None = None,
        pixel_dtype: PixelDtype | None = None,
        return_metadata: bool = False,
        return_tensors: str | None = None,
        progress: Progress | None = None,
    ) -> BatchFeature:
        """Processes one request's videos, or several requests' (a list of lists of videos).

        Args:
            videos: one video, a list of videos (one request, one shared token budget), or a list of such
                lists. A video is a path, URL, bytes, file object, folder of pictures, list of pictures, or
                one array or tensor (frames, height, width, 3) or (frames, 3, height, width).
            fps: ticks per second; for frames in memory their own rate.
            max_frames: at most so many frames per video.
            start_time: beginning of the window in seconds.
            end_time: end of the window in seconds.
            timestamps: labels in seconds, for one video given as frames.
            video_metadata: of videos given as frames, one record each.
            do_sample_frames: whether frames in memory are still to be sampled.
            max_read_seconds: downloading, opening or decoding one video takes at most so long.
            merge_size: side of a block of patches that becomes one visual token.
            min_tokens: a picture below this many visual tokens is enlarged.
            max_tokens: visual tokens of one request, before pruning.
            max_visual_tokens: a limit per request that also outranks `min_tokens`.
            use_token_compression: whether unchanged tokens are pruned.
            compression_threshold: see the class.
            compression_min_tokens: see the class.
            do_resize: whether pictures are resized.
            do_rescale: whether grey levels are rescaled.
            do_normalize: whether they are normalised.
            pixel_dtype: "float32" or "uint8".
            return_metadata: whether to return `video_metadata`.
            return_tensors: "pt" or None (both give torch tensors).
            progress: called with (frames read, frames of the request).

        Returns:
            `pixel_values_videos` (patches, 3 * patch_size**2), `video_grid_thw` (videos, 3),
            `video_merge_sizes` (videos,), `video_compression_mask` (visual tokens,).

        Raises:
            ValueError: for a video that cannot be read or options that do not fit it, naming it.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"Expected return_tensors='pt' (torch), got {return_tensors!r}.")
        rows = video_rows(videos)
        settings = self.settings(
            merge_size=merge_size,
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            use_token_compression=use_token_compression,
            compression_threshold=compression_threshold,
            compression_min_tokens=compression_min_tokens,
            do_resize=do_resize,
            do_rescale=do_rescale,
            do_normalize=do_normalize,
        )
        count = sum(len(row) for row in rows)
        records = split_per_video(video_metadata, count, what="video_metadata")
        labels = split_timestamps(timestamps, count)
        options = [
            self.options(
                fps=fps,
                max_frames=max_frames,
                start_time=start_time,
                end_time=end_time,
                timestamps=label,
                video_metadata=record,
                do_sample_frames=do_sample_frames,
                max_read_seconds=max_read_seconds,
            )
            for record, label in zip(records, labels, strict=True)
        ]
        encoded = []
        done = 0
        for row in rows:
            names = [f"video {done + i}" for i in range(len(row))]
            planned = plan_videos(row, options[done : done + len(row)], names)
            encoded += encode_request(
                planned,
                image=settings,
                video=settings,
                max_visual_tokens=max_visual_tokens,
                pixel_dtype=pixel_dtype or self.pixel_dtype,
                progress=progress,
            )
            done += len(row)
        if not encoded:
            raise ValueError("Expected at least one video, got none.")
        data: dict[str, Any] = dict(to_video_tensors(encoded))
        if return_metadata:
            data["video_metadata"] = [item.metadata for item in encoded]
        return BatchFeature(data)

    def estimate(self, videos: Any, *, max_visual_tokens: int | None = None, **options: Any) -> RequestEstimate:
        """Says what one request's videos will cost, before pruning, without decoding them.

        Packets are read for the frame times, and one frame of each file is decoded for its size and rotation.

        Args:
            videos: one video or a list, as in `preprocess`.
            max_visual_tokens: limit for the request.
            options: sampling options of `preprocess`.

        Returns:
            Frames, sizes, patches, visual tokens and bytes of pixels, per video and in all.
        """
        (row,) = video_rows(videos)
        planned = plan_videos(row, [self.options(**options)] * len(row), [f"video {i}" for i in range(len(row))])
        settings = self.settings()
        return estimate_request(planned, image=settings, video=settings, max_visual_tokens=max_visual_tokens)

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are stored."""
        return {**super().to_dict(), "video_processor_type": "Videollama3VideoProcessor"}

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Writes `video_preprocessor_config.json`; inside a whole processor, `processor_config.json` has it."""
        if push_to_hub:
            raise ValueError("Expected push_to_hub=False: push the whole processor instead.")
        os.makedirs(save_directory, exist_ok=True)
        if self._auto_class is not None:
            custom_object_save(self, save_directory, config=self)
        path = os.path.join(save_directory, "video_preprocessor_config.json")
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")
        return [path]

    def get_num_of_video_patches(
        self, num_frames: int, height: int, width: int, videos_kwargs: dict[str, Any] | None = None
    ) -> int:
        """Patches (before the merge) of one video alone in its request, from its size in pixels."""
        options = videos_kwargs or {}
        settings = self.settings(
            **{name: options.get(name) for name in ("merge_size", "patch_size", "min_tokens", "max_tokens")}
        )
        ((target_height, target_width),) = target_sizes(
            [ItemSize(num_frames, height, width, settings.merge_size)],
            patch_size=settings.patch_size,
            min_tokens=settings.min_tokens,
            max_tokens=settings.max_tokens,
            max_visual_tokens=options.get("max_visual_tokens"),
        )
        return num_frames * (target_height // settings.patch_size) * (target_width // settings.patch_size)


def video_rows(videos: Any) -> list[list[Any]]:
    """Brings one video, a list of videos, or a list of lists of videos to rows of videos."""
    if not isinstance(videos, (list, tuple)) or is_frame_list(videos):
        return [[videos]]
    if any(is_frame(video) for video in videos):
        raise TypeError("Expected one video's frames as pictures only, got a list that mixes pictures and others.")
    if any(isinstance(row, (list, tuple)) and not is_frame_list(row) for row in videos):
        return [
            list(row) if isinstance(row, (list, tuple)) and not is_frame_list(row) else ([] if row is None else [row])
            for row in videos
        ]
    return [[video for video in videos if video is not None]]


def split_per_video(values: Any, count: int, *, what: str) -> list[Any]:
    """One value for each of `count` videos from None, a single record, or a (nested) list of records."""
    if values is None:
        return [None] * count
    if not isinstance(values, (list, tuple)):
        values = [values]
    flat = [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]
    if len(flat) != count:
        raise ValueError(f"Expected {what} for each of {count} video(s), got {len(flat)}.")
    return flat


def split_timestamps(timestamps: Sequence[Any] | None, count: int) -> list[Any]:
    """Labels for each of `count` videos: one sequence of numbers for one video, or a sequence per video."""
    if timestamps is None:
        return [None] * count
    if len(timestamps) and not hasattr(timestamps[0], "__len__"):
        timestamps = [timestamps]
    if len(timestamps) != count:
        raise ValueError(f"Expected timestamps for each of {count} video(s), got {len(timestamps)} sequences.")
    return list(timestamps)
