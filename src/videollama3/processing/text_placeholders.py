"""What is given beside texts or conversations -> the media of each, in order, with what is known of each video.

Texts cut at their control tokens and what the user gave beside them enter, one list of `MediaReference` per text
leaves. Conversations, whose media stand where they belong, are read by `conversations.py`; here records of their
videos are dealt out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, Literal

from .conversations import Conversation, MediaReference
from .image_processing_videollama3 import image_rows
from .prompt_tokens import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Piece
from .video_processing_videollama3 import split_per_video, split_timestamps, video_rows

_PER_VIDEO = ("video_metadata", "timestamps")


def deal_out(batch: list[Conversation], options: dict[str, Any]) -> tuple[list[Conversation], dict[str, Any]]:
    """Deals out `video_metadata` and `timestamps` that were given for all videos of conversations, one for each.

    Args:
        batch: conversations; what a video says of itself comes first.
        options: of the processor's call.

    Returns:
        The conversations with these among the options of their videos, and the options that are left for all.

    Raises:
        ValueError: when they are not as many as the videos.
    """
    if not any(name in options for name in _PER_VIDEO):
        return batch, options
    num_videos = sum(reference.kind == "video" for row in batch for reference in row.media)
    records = iter(split_per_video(options.get("video_metadata"), num_videos, what="video_metadata"))
    labels = iter(split_timestamps(options.get("timestamps"), num_videos))
    dealt = []
    for row in batch:
        media = []
        for reference in row.media:
            if reference.kind == "video":
                given = {"video_metadata": next(records), "timestamps": next(labels), **reference.options}
                reference = dataclasses.replace(reference, options=given)
            media.append(reference)
        dealt.append(dataclasses.replace(row, media=media))
    return dealt, {key: value for key, value in options.items() if key not in _PER_VIDEO}


def media_of_texts(
    texts: Sequence[Sequence[Piece]],
    *,
    images: Any,
    videos: Any,
    options: dict[str, Any],
    placeholders: Collection[str],
) -> tuple[list[list[MediaReference]], dict[str, Any]]:
    """Deals out media to the placeholders of texts.

    Args:
        texts: each cut into pieces at its control tokens.
        images: one, a flat list in order of the placeholders, or a list per text; None for none.
        videos: likewise.
        options: of the processor's call, among them `video_metadata` and `timestamps`, one for each video.
        placeholders: texts of the tokens that stand for media.

    Returns:
        The media of each text, and the options that are left for all.

    Raises:
        ValueError: when media and placeholders do not match in number.
    """
    kinds = [[_kind(piece) for piece in text if _is_placeholder(piece, placeholders)] for text in texts]
    counts = {kind: [text.count(kind) for text in kinds] for kind in ("image", "video")}
    dealt = {
        "image": _deal(image_rows(images) if images is not None else [], counts["image"], "image", IMAGE_PLACEHOLDER),
        "video": _deal(video_rows(videos) if videos is not None else [], counts["video"], "video", VIDEO_PLACEHOLDER),
    }
    num_videos = sum(counts["video"])
    records = iter(split_per_video(options.get("video_metadata"), num_videos, what="video_metadata"))
    labels = iter(split_timestamps(options.get("timestamps"), num_videos))
    seen = {"image": 0, "video": 0}
    rows = []
    for i, text in enumerate(kinds):
        sources = {kind: iter(dealt[kind][i]) for kind in dealt}
        references = []
        for kind in text:
            own = {"video_metadata": next(records), "timestamps": next(labels)} if kind == "video" else {}
            references.append(MediaReference(kind, next(sources[kind]), own, f"{kind} {seen[kind]}"))
            seen[kind] += 1
        rows.append(references)
    return rows, {key: value for key, value in options.items() if key not in _PER_VIDEO}


def _is_placeholder(piece: Piece, placeholders: Collection[str]) -> bool:
    return piece.token_id is not None and piece.text in placeholders


def _kind(piece: Piece) -> Literal["image", "video"]:
    return "video" if piece.text == VIDEO_PLACEHOLDER else "image"


def _deal(rows: list[list[Any]], counts: list[int], kind: str, marker: str) -> list[list[Any]]:
    """Media for each text: given per row, or dealt out in order of the placeholders."""
    flat = [item for row in rows for item in row]
    nested = len(rows) == len(counts) and len(rows) > 1
    if len(flat) != sum(counts) or (nested and [len(row) for row in rows] != counts):
        given = [len(row) for row in rows] if nested else len(flat)
        raise ValueError(
            f"Expected one {kind} for each {marker} in `text`, got {counts if nested else sum(counts)} "
            f"placeholder(s) and {given} {kind}(s)."
        )
    dealt = []
    start = 0
    for count in counts:
        dealt.append(flat[start : start + count])
        start += count
    return dealt
