"""Every form in which a user may give an image or a video, brought to one: a plan with known sizes.

Images, files, folders, arrays and lists of frames enter; `PlannedMedia` leaves, whose size and frame times
are known and whose pixels come one picture at a time, when asked for. Sizing and cutting into patches is
left to `media_requests.py`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from .frame_sampling import FrameTimes, SampledFrames, as_rate, check_max_frames, check_window, sample_frames
from .media_sources import PICTURE_SUFFIXES, Pixels, describe, frames_to_rgb, is_scaled, load_picture, open_source
from .video_file import ReadingLimits
from .video_reading import Prepare, Progress, VideoPlan, plan_video, read_frames

# A folder of pictures counts as this many pictures per second (the authors' rule).
FOLDER_PICTURES_PER_SECOND = 3


@dataclasses.dataclass
class SampledVideoMetadata(VideoMetadata):
    """What is known of a video and of the frames taken from it.

    Adds to transformers' record the true label of each frame, which an index and an average rate cannot
    give for a variable frame rate.

    Attributes:
        timestamps_seconds: label of each sampled frame.
    """

    timestamps_seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def timestamps(self) -> list[float]:
        """Label of each sampled frame in seconds."""
        return self.timestamps_seconds


@dataclasses.dataclass(frozen=True)
class VideoOptions:
    """How one video is sampled; every field is what the caller asked for or the processor's default.

    Attributes:
        fps: ticks per second; for frames given in memory, their own rate.
        max_frames: at most so many frames.
        start_time: beginning of the window in seconds.
        end_time: end of the window in seconds.
        timestamps: labels in seconds of frames that are already sampled.
        max_visual_tokens: limit for this video alone, before pruning.
        metadata: of frames given in memory: source rate and indices, as transformers describes them.
        do_sample_frames: whether frames given in memory are still to be sampled, by their metadata's rate; None: they
            are not. A file always is.
        fps_given: whether `fps` came from the caller.
        limits: what reading it may cost.
    """

    fps: float
    max_frames: int
    start_time: float | None = None
    end_time: float | None = None
    timestamps: Sequence[float] | None = None
    max_visual_tokens: int | None = None
    metadata: Any = None
    do_sample_frames: bool | None = None
    fps_given: bool = False
    limits: ReadingLimits = dataclasses.field(default_factory=ReadingLimits)


@dataclasses.dataclass(frozen=True)
class PlannedMedia:
    """One image or video, sized but not yet read.

    Attributes:
        kind: image or video.
        name: how to call it in errors.
        num_frames: 1 for an image.
        height: of a picture in pixels.
        width: of a picture in pixels.
        pictures: gives uint8 (h, w, 3) pictures in order, those of a file as `Prepare` makes them; may be called
            more than once.
        timestamps: float64 (num_frames,), seconds; None for an image.
        metadata: of a video.
        max_visual_tokens: limit for this item alone.
        replan: for a file whose packets may not tell the truth: the plan made by decoding instead.
        was_scaled: its pixels came as numbers 0..1, and so were rescaled before.
    """

    kind: Literal["image", "video"]
    name: str
    num_frames: int
    height: int
    width: int
    pictures: Callable[[Progress | None, Prepare | None], Iterator[Pixels]]
    timestamps: npt.NDArray[np.float64] | None = None
    metadata: SampledVideoMetadata | None = None
    max_visual_tokens: int | None = None
    replan: Callable[[], PlannedMedia] | None = None
    was_scaled: bool = False


def is_frame(value: Any) -> bool:
    """Whether a value can only be one picture: a PIL image or a 2- or 3-dimensional array."""
    return isinstance(value, Image.Image) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim in (2, 3))


def is_frame_list(value: Any) -> bool:
    """Whether a value is one video given as its pictures (objects, or paths of image files)."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    if all(is_frame(frame) for frame in value):
        return True
    return len(value) > 1 and all(
        isinstance(frame, str) and frame.lower().endswith(PICTURE_SUFFIXES) for frame in value
    )


def plan_image(source: Any, *, name: str) -> PlannedMedia:
    """Reads one image; see `media_sources.load_picture` for what it may be."""
    picture = load_picture(source, what=name)
    return PlannedMedia(
        "image",
        name,
        1,
        picture.shape[0],
        picture.shape[1],
        lambda progress, prepare: iter([picture]),
        was_scaled=is_scaled(source),
    )


def plan_videos(sources: Sequence[Any], options: Sequence[VideoOptions], names: Sequence[str]) -> list[PlannedMedia]:
    """Plans the videos of one request.

    As with the authors, a file that is named several times with otherwise equal options is sampled once over
    the union of the windows, and each item takes the frames whose labels lie in its own window.

    Args:
        sources: file (path, URL, bytes, file object), folder of pictures, list of pictures, or one array or
            tensor of frames; for each video.
        options: for each video.
        names: for each video, for errors.
    """
    sources = [os.fspath(source) if isinstance(source, os.PathLike) else source for source in sources]
    planned = []
    for i, (source, option, name) in enumerate(zip(sources, options, names, strict=True)):
        check_max_frames(option.max_frames)
        check_window(option.start_time, option.end_time)
        siblings = [
            options[k]
            for k in range(len(sources))
            if k != i and _is_same_path(sources[k], source) and _same_but_window(options[k], option)
        ]
        planned.append(_plan_one(source, option, siblings, name))
    return planned


def _is_same_path(one: Any, other: Any) -> bool:
    # Arrays would be compared value by value.
    return isinstance(one, str) and isinstance(other, str) and one == other


def _same_but_window(one: VideoOptions, other: VideoOptions) -> bool:
    return (one.fps, one.max_frames) == (other.fps, other.max_frames)


def _plan_one(source: Any, option: VideoOptions, siblings: list[VideoOptions], name: str) -> PlannedMedia:
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _plan_frames(_check_clip(source, name), option, name)
    if isinstance(source, (list, tuple)):
        if not source:
            raise ValueError(f"Expected {name} with at least one frame, got an empty list.")
        if not all(is_frame(frame) or isinstance(frame, (str, os.PathLike)) for frame in source):
            raise TypeError(f"Expected {name} as a list of pictures (PIL, array, tensor or path), got {source!r:.80}.")
        return _plan_frames(list(source), option, name)
    opened = open_source(source, what=name, max_seconds=option.limits.max_seconds)
    if isinstance(opened, str) and os.path.isdir(opened):
        return _plan_folder(opened, option, name)
    if option.timestamps is not None or option.metadata is not None:
        raise ValueError(
            f"Expected timestamps or video_metadata only with frames, got them with the file {describe(source)!r}."
        )
    if option.do_sample_frames is False:
        raise ValueError(
            f"Expected do_sample_frames=False only with frames, got it with the file {describe(source)!r}: say with "
            "fps and max_frames how many of its frames are taken."
        )
    return _plan_file(opened, option, siblings, name)


def _plan_file(
    opened: str | BinaryIO, option: VideoOptions, siblings: list[VideoOptions], name: str, by_decoding: bool = False
) -> PlannedMedia:
    start, end = option.start_time, option.end_time
    if siblings:
        start = _extreme(min, [option.start_time, *(sibling.start_time for sibling in siblings)])
        end = _extreme(max, [option.end_time, *(sibling.end_time for sibling in siblings)])
    plan = plan_video(
        opened,
        name=name,
        fps=option.fps,
        max_frames=option.max_frames,
        start_time=start,
        end_time=end,
        by_decoding=by_decoding,
        limits=option.limits,
    )
    inside = plan.sampled.between(option.start_time, option.end_time)
    if len(inside.indices):
        plan = dataclasses.replace(plan, sampled=inside)
    elif siblings:
        return _plan_file(opened, option, [], name, by_decoding)
    planned = _from_video_plan(plan, option)
    if not plan.by_decoding:
        planned = dataclasses.replace(planned, replan=lambda: _plan_file(opened, option, siblings, name, True))
    return planned


def _extreme(pick: Callable[[list[float]], float], values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return pick(known) if len(known) == len(values) else None


def _from_video_plan(plan: VideoPlan, option: VideoOptions) -> PlannedMedia:
    return PlannedMedia(
        kind="video",
        name=plan.name,
        num_frames=len(plan.sampled.indices),
        height=plan.height,
        width=plan.width,
        pictures=lambda progress, prepare: read_frames(plan, progress, prepare),
        timestamps=plan.sampled.timestamps,
        metadata=SampledVideoMetadata(
            total_num_frames=len(plan.times.pts),
            fps=float(plan.times.average_rate),
            width=plan.width,
            height=plan.height,
            duration=plan.duration_seconds,
            video_backend="pyav",
            frames_indices=plan.sampled.indices.tolist(),
            timestamps_seconds=plan.sampled.timestamps.tolist(),
        ),
        max_visual_tokens=option.max_visual_tokens,
    )


def _check_clip(array: npt.NDArray[Any] | torch.Tensor, name: str) -> npt.NDArray[Any] | torch.Tensor:
    if array.ndim != 4 or 0 in array.shape:
        raise ValueError(
            f"Expected {name} as (frames, height, width, channels) or (frames, channels, height, width) with at "
            f"least one frame, got shape {tuple(array.shape)}."
        )
    return array


def _plan_folder(folder: str, option: VideoOptions, name: str) -> PlannedMedia:
    paths = [
        os.path.join(folder, file)
        for file in sorted(os.listdir(folder), key=_natural_order)
        if file.lower().endswith(PICTURE_SUFFIXES)
    ]
    if not paths:
        raise ValueError(
            f"Expected {name} as a folder with pictures ({', '.join(PICTURE_SUFFIXES)}), got {folder!r} with none."
        )
    if option.timestamps is not None:
        return _plan_frames(paths, option, name)
    times = FrameTimes.regular(len(paths), FOLDER_PICTURES_PER_SECOND)
    sampled = sample_frames(
        times,
        fps=option.fps,
        max_frames=option.max_frames,
        start_time=option.start_time,
        end_time=option.end_time,
        by_index=True,
    )
    inside = sampled.between(option.start_time, option.end_time)
    sampled = inside if len(inside.indices) else sampled
    return _from_sampled_frames(paths, sampled, FOLDER_PICTURES_PER_SECOND, option, name)


def _natural_order(file: str) -> list[tuple[int, str]]:
    """Sorts frame2.png before frame10.png; the same as plain order where numbers have leading zeros."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file)]


def _plan_frames(frames: Any, option: VideoOptions, name: str) -> PlannedMedia:
    """Frames in memory (or listed files): taken as already sampled, unless asked otherwise."""
    num_frames = len(frames)
    if option.metadata is not None and not isinstance(option.metadata, Mapping):
        raise TypeError(
            f"Expected video_metadata of {name} as a VideoMetadata or a dict, got {type(option.metadata).__name__}."
        )
    metadata = dict(option.metadata) if option.metadata is not None else {}
    rate = float(as_rate(metadata.get("fps") or (option.fps if option.fps_given else 1.0)))
    if option.do_sample_frames:
        if not metadata.get("fps"):
            raise ValueError(f"Expected video_metadata with the fps of {name} to sample its frames, got none.")
        sampled = sample_frames(
            FrameTimes.regular(num_frames, rate),
            fps=option.fps,
            max_frames=option.max_frames,
            start_time=option.start_time,
            end_time=option.end_time,
        )
        return _from_sampled_frames(frames, sampled, rate, option, name)
    labels = _labels(num_frames, rate, metadata, option, name)
    inside = SampledFrames(np.arange(num_frames), labels).between(option.start_time, option.end_time)
    if len(inside.indices) == 0:
        raise ValueError(
            f"Expected a window with frames of {name}, got start_time={option.start_time}, end_time={option.end_time} "
            f"for frames from {labels[0]:g} to {labels[-1]:g} seconds."
        )
    if len(inside.indices) > option.max_frames:
        pick = np.linspace(0, len(inside.indices) - 1, option.max_frames, dtype=np.int64)
        inside = SampledFrames(inside.indices[pick], inside.timestamps[pick])
    return _from_sampled_frames(frames, inside, rate, option, name)


def _labels(
    num_frames: int, rate: float, metadata: dict[str, Any], option: VideoOptions, name: str
) -> npt.NDArray[np.float64]:
    timestamps: Any = option.timestamps
    if timestamps is None and isinstance(option.metadata, SampledVideoMetadata):
        timestamps = option.metadata.timestamps
    if timestamps is None and metadata.get("frames_indices") is not None:
        timestamps = np.asarray(metadata["frames_indices"], dtype=np.float64) / rate
    if timestamps is None:
        return np.arange(num_frames) / rate
    if len(timestamps) != num_frames:
        raise ValueError(
            f"Expected one timestamp for each of the {num_frames} frames of {name}, got {len(timestamps)}."
        )
    try:
        labels = [float(value) for value in timestamps]
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected timestamps in seconds for {name}, got {list(timestamps)}.") from error
    if not all(math.isfinite(label) for label in labels):
        raise ValueError(f"Expected finite timestamps in seconds for {name}, got {labels}.")
    return np.array(labels, dtype=np.float64)


def _from_sampled_frames(
    frames: Any, sampled: SampledFrames, rate: float, option: VideoOptions, name: str
) -> PlannedMedia:
    def picture(index: int) -> Pixels:
        frame = frames[index]
        what = f"frame {index} of {name}"
        if isinstance(frames, (np.ndarray, torch.Tensor)):
            return frames_to_rgb(frames[index : index + 1], what=what)[0]
        return load_picture(frame, what=what)

    def pictures(progress: Progress | None, prepare: Prepare | None) -> Iterator[Pixels]:
        previous, current = -1, None
        for count, index in enumerate(sampled.indices.tolist(), start=1):
            if index != previous or current is None:
                previous, current = index, picture(index)
            yield current
            if progress is not None:
                progress(count, len(sampled.indices))

    first = picture(int(sampled.indices[0]))
    return PlannedMedia(
        kind="video",
        name=name,
        num_frames=len(sampled.indices),
        height=first.shape[0],
        width=first.shape[1],
        pictures=pictures,
        timestamps=sampled.timestamps,
        metadata=SampledVideoMetadata(
            total_num_frames=len(frames),
            fps=rate,
            width=first.shape[1],
            height=first.shape[0],
            duration=len(frames) / rate,
            video_backend="frames",
            frames_indices=sampled.indices.tolist(),
            timestamps_seconds=sampled.timestamps.tolist(),
        ),
        max_visual_tokens=option.max_visual_tokens,
        was_scaled=all(is_scaled(frame) for frame in ([frames] if hasattr(frames, "dtype") else frames)),
    )
