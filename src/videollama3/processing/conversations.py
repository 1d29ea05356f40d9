"""Conversations in the authors' or in transformers' form -> one form, with its media in document order.

Messages with content dicts enter; the same messages with plain placeholders, and the list of media with
their options, leave. Rendering them to text is left to `prompt_tokens.py`, reading media to
`planned_media.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .video_processing_videollama3 import PER_VIDEO_OPTIONS

_IMAGE_SOURCES = ("image", "image_url", "image_path", "url", "path", "base64")
_VIDEO_SOURCES = ("video", "video_url", "video_path", "url", "path", "base64")
# Keys that say how an image or video is shown, or that the authors' loader leaves behind.
_IMAGE_KEYS = {*_IMAGE_SOURCES, "type", "timestamp"}
_VIDEO_KEYS = {*_VIDEO_SOURCES, *PER_VIDEO_OPTIONS, "type", "num_frames"}
_MISSING = object()


@dataclasses.dataclass(frozen=True)
class MediaReference:
    """One image or video of a conversation.

    Attributes:
        kind: image or video.
        source: what the user gave; None where only a placeholder stands (media passed separately).
        options: sampling options of a video.
        where: its place, for errors ("message 0, part 1").
    """

    kind: Literal["image", "video"]
    source: Any
    options: dict[str, Any]
    where: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation whose media have been taken out.

    Attributes:
        messages: role and content, the content a string or a list of parts of type text, image or video,
            media parts without their source.
        media: in document order, one per image or video part.
    """

    messages: list[dict[str, Any]]
    media: list[MediaReference]


def is_batch(conversation: Any) -> bool:
    """Whether this is a list of conversations rather than one conversation (a list of messages)."""
    return (
        isinstance(conversation, (list, tuple))
        and len(conversation) > 0
        and isinstance(conversation[0], (list, tuple))
    )


def read_conversation(messages: Any) -> Conversation:
    """Checks one conversation and takes its media out.

    Args:
        messages: dicts with `role` and `content`; content is a string or a list of strings and dicts. Media
            dicts may be transformers' (`{"type": "video", "path": ...}`), OpenAI's (`image_url`,
            `video_url`) or the authors' (`{"type": "video", "video": {"video_path": ..., "fps": 1}}`).
            Keys whose value is None count as absent.

    Raises:
        TypeError: for something that is not a message or a part.
        ValueError: for a part without or with two sources, or with an unknown key.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TypeError(f"Expected a conversation as a non-empty list of messages, got {messages!r:.80}.")
    result: list[dict[str, Any]] = []
    media: list[MediaReference] = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f"Expected message {i} as a dict with `role` and `content`, got {message!r:.80}.")
        plain = {key: value for key, value in message.items() if value is not None}
        content = plain.get("content", "")
        if not isinstance(content, str):
            content = [_read_part(part, f"message {i}, part {k}", media) for k, part in enumerate(_parts(content, i))]
        result.append({**plain, "content": content})
    return Conversation(result, media)


def _parts(content: Any, message: int) -> Sequence[Any]:
    if isinstance(content, Mapping):
        return [content]
    if not isinstance(content, (list, tuple)):
        raise TypeError(f"Expected the content of message {message} as a string or a list, got {content!r:.80}.")
    return content


def _read_part(part: Any, where: str, media: list[MediaReference]) -> dict[str, Any] | str:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise TypeError(f"Expected {where} as a string or a dict, got {part!r:.80}.")
    present = {key: value for key, value in part.items() if value is not None}
    kind = _kind(present, where)
    if kind == "text":
        if not isinstance(present.get("text"), str):
            raise TypeError(f"Expected the text of {where} as a string, got {present.get('text')!r:.80}.")
        return {"type": "text", "text": present["text"]}
    reference = _read_image(present, where) if kind == "image" else _read_video(present, where)
    media.append(reference)
    shown: dict[str, Any] = {"type": kind}
    if kind == "image" and "timestamp" in present:
        shown["timestamp"] = float(present["timestamp"])
    return shown


def _kind(part: Mapping[str, Any], where: str) -> Literal["text", "image", "video"]:
    kind = part.get("type")
    if kind is None:
        kind = next((name for name in ("text", "image", "image_url", "video", "video_url") if name in part), None)
    if kind in ("text", "image", "video"):
        return kind  # type: ignore[return-value]
    if kind in ("image_url", "input_image"):
        return "image"
    if kind in ("video_url", "input_video"):
        return "video"
    raise ValueError(f"Expected {where} of type text, image or video, got {kind!r} with keys {sorted(part)}.")


def _read_image(part: Mapping[str, Any], where: str) -> MediaReference:
    unknown = sorted(set(part) - _IMAGE_KEYS)
    if unknown:
        raise ValueError(f"Expected {where} (an image) with keys among {sorted(_IMAGE_KEYS)}, got {unknown}.")
    source = _source(part, _IMAGE_SOURCES, where)
    if isinstance(source, Mapping):
        source = _inner_source({k: v for k, v in source.items() if v is not None}, _IMAGE_SOURCES, where)
    if "base64" in part and isinstance(source, str) and not source.startswith("data:"):
        source = f"data:;base64,{source}"
    return MediaReference("image", None if source is _MISSING else source, {}, where)


def _read_video(part: Mapping[str, Any], where: str) -> MediaReference:
    options = {key: part[key] for key in PER_VIDEO_OPTIONS if key in part}
    unknown = sorted(set(part) - _VIDEO_KEYS)
    source = _source(part, _VIDEO_SOURCES, where)
    if isinstance(source, Mapping):
        inner = {key: value for key, value in source.items() if value is not None}
        options.update({key: inner[key] for key in PER_VIDEO_OPTIONS if key in inner})
        unknown += sorted(set(inner) - _VIDEO_KEYS - {"bytes"})
        source = _inner_source(inner, _VIDEO_SOURCES, where)
    if unknown:
        raise ValueError(f"Expected {where} (a video) with keys among {sorted(_VIDEO_KEYS)}, got {unknown}.")
    if "base64" in part and isinstance(source, str) and not source.startswith("data:"):
        source = f"data:;base64,{source}"
    return MediaReference("video", None if source is _MISSING else source, options, where)


def _inner_source(inner: Mapping[str, Any], names: tuple[str, ...], where: str) -> Any:
    """Of a dict in the place of a source: OpenAI's, or undecoded media of `datasets`, whose bytes count."""
    source = inner["bytes"] if "bytes" in inner else _source(inner, names, where)
    if source is _MISSING:
        raise ValueError(f"Expected {where} with a source, got a dict without one, with keys {sorted(inner)}.")
    return source


def _source(part: Mapping[str, Any], names: tuple[str, ...], where: str) -> Any:
    found = [name for name in names if name in part]
    if len(found) > 1:
        raise ValueError(f"Expected one source for {where}, got {found}.")
    return part[found[0]] if found else _MISSING
