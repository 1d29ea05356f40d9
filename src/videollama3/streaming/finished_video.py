"""A video that is over -> the pictures and labels that the offline call would show the model.

A source and sampling options enter; pictures at the planned size leave. Encoding them is left to `session.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from ..processing.media_requests import estimate_request
from ..processing.media_sources import Pixels
from ..processing.patches import resize_picture
from ..processing.planned_media import PlannedMedia, plan_videos
from ..processing.video_reading import Progress, UnexpectedFrameError


@dataclasses.dataclass(frozen=True)
class FinishedVideo:
    """What a video shows.

    Attributes:
        pictures: uint8 (height, width, 3) each; those of a file at `size`.
        timestamps_seconds: their labels.
        size: (height, width) in pixels to which all are resized.
    """

    pictures: list[Pixels]
    timestamps_seconds: list[float]
    size: tuple[int, int]


def read_finished_video(
    video_processor: Any,
    source: Any,
    sampling: dict[str, Any],
    *,
    size: tuple[int, int] | None,
    max_visual_tokens: int | None,
    progress: Progress | None = None,
) -> FinishedVideo:
    """Samples, reads and resizes a video.

    Args:
        video_processor: a `VideoLlama3VideoProcessor`.
        source: as it takes them.
        sampling: its options of one video.
        size: of the pictures; None to plan it for this video, alone in its request.
        max_visual_tokens: of the request.
        progress: called with (frames read, frames of the video).

    Raises:
        ValueError: when it cannot be read.
    """
    (planned,) = plan_videos([source], [video_processor.options(**sampling)], ["the video"])
    try:
        return _read(planned, video_processor, size, max_visual_tokens, progress)
    except UnexpectedFrameError as error:
        # The packets of this file did not tell the truth: learn its times by decoding.
        if planned.replan is None:
            raise ValueError(f"{error} The file is damaged.") from error
        return _read(planned.replan(), video_processor, size, max_visual_tokens, progress)


def _read(
    planned: PlannedMedia,
    video_processor: Any,
    size: tuple[int, int] | None,
    max_visual_tokens: int | None,
    progress: Progress | None,
) -> FinishedVideo:
    settings = video_processor.settings()
    if size is None:
        estimate = estimate_request([planned], image=settings, video=settings, max_visual_tokens=max_visual_tokens)
        size = (estimate.items[0].height, estimate.items[0].width)
    resize = functools.partial(resize_picture, height=size[0], width=size[1], resample=settings.resample)
    pictures = [resize(picture) for picture in planned.pictures(progress, resize)]
    assert planned.timestamps is not None
    return FinishedVideo(pictures, planned.timestamps.tolist(), size)
