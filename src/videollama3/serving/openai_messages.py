"""Chat messages as OpenAI's clients write them -> the conversation that the processor takes.

Messages of a request enter, checked, and the same messages with media that may be opened leave. Reading the media is
left to the processor, and which may be read to `media_access.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .media_access import MediaAccess

# What a client may say of one video, beside its URL; of the processor's options those that describe decoded frames
# or protect the server are left out.
VIDEO_OPTIONS = ("fps", "max_frames", "start_time", "end_time", "max_visual_tokens")
_ROLES = ("system", "user", "assistant")
# OpenAI's names of text parts: chat completions, and what is said and answered in the Responses API.
_TEXT_TYPES = ("text", "input_text", "output_text")
_MEDIA_TYPES = {"image_url": "image", "input_image": "image", "video_url": "video"}
# Fields of an assistant's message that this model can neither write nor read.
_UNKNOWN_SPEECH = ("tool_calls", "function_call", "audio")


def read_messages(messages: Any, access: MediaAccess) -> list[dict[str, Any]]:
    """Checks the messages of one request.

    Args:
        messages: dicts with `role` (system, user, assistant) and `content`: a string, or a list of parts of type
            `text`, `image_url` (`{"url": ...}`) and `video_url` (`{"url": ..., "fps": ..., ...}`, see
            `VIDEO_OPTIONS`), or of their names in the Responses API. Keys whose value is None count as absent.
        access: which media may be opened.

    Returns:
        Messages with content dicts of type text, image and video.

    Raises:
        TypeError: for something that is no message or no part.
        ValueError: for roles, parts and options that VideoLLaMA3 does not know, and for media that may not be
            opened; the message names the part.
    """
    if not isinstance(messages, list) or not messages:
        raise TypeError(f"Expected `messages` as a non-empty list, got {messages!r:.80}.")
    return [_read_message(message, f"message {i}", access) for i, message in enumerate(messages)]


def _read_message(message: Any, where: str, access: MediaAccess) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"Expected {where} as an object with `role` and `content`, got {message!r:.80}.")
    if message.get("role") not in _ROLES:
        raise ValueError(f"Expected {where} with a role among {', '.join(_ROLES)}, got {message.get('role')!r:.80}.")
    spoken = [name for name in _UNKNOWN_SPEECH if message.get(name) is not None]
    if spoken:
        raise ValueError(f"Expected {where} with text, images and videos only, got {', '.join(spoken)}.")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": message["role"], "content": content}
    if not isinstance(content, list):
        raise TypeError(f"Expected the content of {where} as a string or a list, got {content!r:.80}.")
    parts = [_read_part(part, f"{where}, part {k}", access) for k, part in enumerate(content)]
    return {"role": message["role"], "content": parts}


def _read_part(part: Any, where: str, access: MediaAccess) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise TypeError(f"Expected {where} as an object with a `type`, got {part!r:.80}.")
    name = part.get("type")
    if name in _TEXT_TYPES:
        if not isinstance(part.get("text"), str):
            raise TypeError(f"Expected the text of {where} as a string, got {part.get('text')!r:.80}.")
        return {"type": "text", "text": part["text"]}
    if name not in _MEDIA_TYPES:
        known = ", ".join((*_TEXT_TYPES, *_MEDIA_TYPES))
        raise ValueError(f"Expected {where} with a type among {known}, got {name!r:.80}.")
    return _read_medium(part, _MEDIA_TYPES[name], where, access)


def _read_medium(part: Mapping[str, Any], kind: str, where: str, access: MediaAccess) -> dict[str, Any]:
    # Chat completions put an object there, the Responses API the URL itself.
    field = f"{kind}_url"
    given = part.get(field)
    described: Mapping[str, Any] = given if isinstance(given, Mapping) else {"url": given}
    allowed = VIDEO_OPTIONS if kind == "video" else ("detail",)
    unknown = sorted(set(described) - {"url", *allowed})
    if unknown:
        raise ValueError(f"Expected {where} with `{field}` of url, {', '.join(allowed)}; got {', '.join(unknown)}.")
    source = access.admit(described.get("url"), what=f"{where} ({kind})")
    options = {name: described[name] for name in VIDEO_OPTIONS if described.get(name) is not None}
    return {"type": kind, kind: source, **options}
