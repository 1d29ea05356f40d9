"""Conversations about a video while it runs: which frames come before which message.

Frame times and messages with times enter; messages with one `stream` message per frame leave. Reading frames is
left to `planned_media.py`, writing tokens to `prompt_tokens.py`.

For frames at 0, 1, 2 and 3 seconds, a question at 1 and an answer at 3 (one letter per message):

    frame 0, frame 1, question, frame 2, frame 3, answer
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .media_sources import Pixels
from .planned_media import PlannedMedia
from .video_reading import Prepare, Progress

# As the authors trained: what comes later is dropped.
MAX_STREAM_FRAMES = 400


def check_timed_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages whose `time` (seconds of the video) does not go back.

    Raises:
        TypeError: for something that is not a message with a time.
        ValueError: for a time before that of the message before.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TypeError(f"Expected a conversation as a non-empty list of messages, got {messages!r:.80}.")
    previous = -math.inf
    for i, message in enumerate(messages):
        time = message.get("time") if isinstance(message, Mapping) else None
        if isinstance(time, bool) or not isinstance(time, (int, float)) or not math.isfinite(time):
            raise TypeError(f"Expected message {i} as a dict with its `time` in seconds, got {message!r:.80}.")
        if time < previous:
            raise ValueError(f"Expected messages in order of time, got message {i} at {time} s after {previous} s.")
        previous = time
    return [dict(message) for message in messages]


def select_messages(
    timestamps: Sequence[float], messages: Sequence[dict[str, Any]], *, max_frames: int = MAX_STREAM_FRAMES
) -> tuple[list[dict[str, Any]], int]:
    """What is shown: the messages before the frame limit, and how many frames come before the last of them.

    Args:
        timestamps: (frames,) seconds, ascending.
        messages: from `check_timed_messages`, times on the same scale.
        max_frames: later frames, and messages from the first of them on, are dropped.

    Raises:
        ValueError: when no message or no frame is left.
    """
    if max_frames < 1:
        raise ValueError(f"Expected max_frames as a positive integer, got {max_frames}.")
    limit = timestamps[max_frames] if len(timestamps) > max_frames else math.inf
    kept = [message for message in messages if message["time"] < limit]
    if not kept:
        raise ValueError(
            f"Expected a message before frame {max_frames} of the stream, at {limit} s, got the first at "
            f"{messages[0]['time']} s: shorten the window or raise max_frames."
        )
    count = sum(seconds <= kept[-1]["time"] for seconds in timestamps[:max_frames])
    if count == 0:
        raise ValueError(
            f"Expected a message at or after the first frame, at {timestamps[0]} s, got the last at "
            f"{kept[-1]['time']} s: times of messages count from the beginning of the file, as start_time does."
        )
    return kept, count


def interleave(
    timestamps: Sequence[float], messages: Sequence[dict[str, Any]], *, start_time: float = 0.0
) -> list[dict[str, Any]]:
    """Puts a `stream` message with one picture for every frame before the first message at or after it.

    Args:
        timestamps: (frames,) seconds, ascending.
        messages: with `time` on the same scale; it is taken off.
        start_time: pictures are labelled with the seconds since then.

    Returns:
        Messages for a chat template, one image part (without a source) per frame that comes before a message.
    """
    frames = iter(timestamps)
    waiting = next(frames, math.inf)
    result: list[dict[str, Any]] = []
    for message in messages:
        while waiting <= message["time"]:
            part = {"type": "image", "timestamp": waiting - start_time}
            result.append({"role": "stream", "content": [part]})
            waiting = next(frames, math.inf)
        result.append({key: value for key, value in message.items() if key != "time"})
    return result


def first_frames(planned: PlannedMedia, count: int) -> PlannedMedia:
    """The same video without what comes after its first `count` frames."""
    if count >= planned.num_frames:
        return planned

    def pictures(progress: Progress | None, prepare: Prepare | None) -> Iterator[Pixels]:
        for done, picture in enumerate(itertools.islice(planned.pictures(None, prepare), count), start=1):
            yield picture
            if progress is not None:
                progress(done, count)

    metadata = copy.copy(planned.metadata)
    if metadata is not None:
        metadata.frames_indices = list(metadata.frames_indices or [])[:count]
        metadata.timestamps_seconds = metadata.timestamps_seconds[:count]
    replan = planned.replan
    return dataclasses.replace(
        planned,
        num_frames=count,
        pictures=pictures,
        timestamps=None if planned.timestamps is None else planned.timestamps[:count],
        metadata=metadata,
        replan=None if replan is None else lambda: first_frames(replan(), count),
    )
