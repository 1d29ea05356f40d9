r"""Rows of the authors' or of transformers' form -> one checked form.

A row as it stands in a file enters; messages with resolved media, or a timed conversation about a video, leave.
Reading rows from files is left to `row_sources.py`, reading media and tokens to `supervised_samples.py`.

    {"image": ["a.png"], "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", ...}]}
    {"messages": [{"role": "user", "content": [{"type": "video", "path": "a.mp4"}, ...]}, ...]}
    {"stream": true, "video": ["a.mp4"], "start_time": 0, "end_time": 9, "conversation": [{"role", "content", "time"}]}
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ..processing.conversations import MediaReference, read_conversation

RowKind = Literal["text", "image", "images", "video", "mixed", "stream"]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TAGS = {"image": "<image>", "video": "<video>"}
_TAG_PATTERN = re.compile("(<image>|<video>)")
_URL = re.compile(r"^(?:[a-zA-Z][a-zA-Z0-9+.-]+://|data:)")


@dataclasses.dataclass(frozen=True)
class StreamWindow:
    """The video of a streaming row.

    Attributes:
        video: its source.
        start_time: beginning of the window in seconds of the video; None: of the video.
        end_time: end of the window; None: of the video.
    """

    video: Any
    start_time: float | None
    end_time: float | None


@dataclasses.dataclass(frozen=True)
class TrainingRow:
    """One checked row.

    Attributes:
        kind: what it is about.
        messages: role and content; content is a string or a list of parts of type text, image or video with
            their sources. Those of a stream have a `time`, and text only.
        media: every source, in order.
        stream: of a streaming row.
    """

    kind: RowKind
    messages: list[dict[str, Any]]
    media: list[Any]
    stream: StreamWindow | None = None


def read_row(row: Any, *, media_root: str | os.PathLike[str] | None = None) -> TrainingRow:
    """Brings one row to one form and checks what can be checked without opening media.

    Args:
        row: a dict of one of the three forms of this module's head; keys whose value is None count as absent.
        media_root: folder that relative paths start from; the working directory by default. Absolute paths and
            URLs are left alone.

    Raises:
        TypeError: for values of another type than the form says.
        ValueError: for tags that do not match media, an empty answer, no answer, or a path that leaves the root.
    """
    if not isinstance(row, Mapping):
        raise TypeError(f"Expected a row as a JSON object, got {row!r:.80}.")
    present = {key: _from_cell(value) for key, value in row.items() if value is not None}
    if present.get("stream"):
        return _read_stream(present, media_root)
    if "conversations" in present:
        messages = _authors_messages(present)
    elif "messages" in present:
        messages = present["messages"]
        _check_roles(read_conversation(messages).messages, "")
    else:
        raise ValueError(
            f"Expected a row with `conversations` (the authors' form), `messages`, or `stream` and `conversation`, "
            f"got the keys {sorted(present)}."
        )
    messages, media = _with_sources(messages, present, media_root)
    _check_answers(messages)
    return TrainingRow(_kind(messages), messages, media)


def _from_cell(value: Any) -> Any:
    """A list that a table holds as JSON text, such as the cell of a CSV file."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def missing_files(row: TrainingRow) -> list[str]:
    """Paths among the row's media at which nothing stands."""
    sources = [file for source in row.media for file in (source if isinstance(source, list) else [source])]
    return [
        source
        for source in sources
        if isinstance(source, str) and not _URL.match(source) and not os.path.exists(source)
    ]


def _authors_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns = row["conversations"]
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise TypeError(f"Expected `conversations` as a non-empty list, got {turns!r:.80}.")
    messages = [_turn(turn, i) for i, turn in enumerate(turns)]
    if messages[0]["role"] == "assistant":
        raise ValueError("Expected a conversation that begins with human or system, got gpt first.")
    missing = _missing_tags(row, messages)
    for message in messages:
        if message["role"] == "user":
            message["content"] = _parts(missing + message["content"])
            missing = ""
    return messages


def _turn(turn: Any, i: int) -> dict[str, Any]:
    role = _ROLES.get(str(turn.get("from"))) if isinstance(turn, Mapping) else None
    if role is None or not isinstance(turn.get("value"), str):
        raise TypeError(
            f"Expected turn {i} as {{'from': 'human', 'gpt' or 'system', 'value': text}}, got {turn!r:.80}."
        )
    return {"role": role, "content": turn["value"]}


def _missing_tags(row: Mapping[str, Any], messages: list[dict[str, Any]]) -> str:
    """The tags to put in front, where none are written; raises where some but not all are."""
    missing = ""
    for kind, tag in _TAGS.items():
        written = sum(message["content"].count(tag) for message in messages if message["role"] == "user")
        given = len(_as_list(row.get(kind))) + len(_as_list(row.get(f"{kind}s")))
        if written == 0:
            missing += tag * given
        elif written != given:
            raise ValueError(
                f"Expected one {tag} tag for each {kind} of the row, got {written} tag(s) and {given} {kind}(s)."
            )
    return missing


def _parts(text: str) -> list[dict[str, Any]]:
    """Text and media of one human turn; as the authors do, text loses the space around it and around tags."""
    parts: list[dict[str, Any]] = []
    for chunk in _TAG_PATTERN.split(text):
        if chunk in _TAGS.values():
            parts.append({"type": chunk[1:-1]})
        elif chunk.strip():
            parts.append({"type": "text", "text": chunk.strip()})
    return parts


def _with_sources(
    messages: Any, row: Mapping[str, Any], media_root: str | os.PathLike[str] | None
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages whose media parts carry their resolved source, and the sources.

    A part without a source takes the next of the row's `image`/`images` or `video`/`videos`. `start_time` and
    `end_time` of a row are those of its only video.
    """
    conversation = read_conversation(messages)
    pools = {kind: [*_as_list(row.get(kind)), *_as_list(row.get(f"{kind}s"))] for kind in _TAGS}
    waiting = {kind: iter(pool) for kind, pool in pools.items()}
    window = _window(row, conversation.media)
    sources, references = [], []
    for reference in conversation.media:
        source = reference.source if reference.source is not None else next(waiting[reference.kind], None)
        options = {**(window if reference.kind == "video" else {}), **reference.options}
        if isinstance(source, Mapping):
            # As it may stand in a part: with a path and, of a video, with how it is sampled.
            part = {"type": reference.kind, reference.kind: source}
            (inner,) = read_conversation([{"role": "user", "content": [part]}]).media
            source, options = inner.source, {**options, **inner.options}
        references.append(dataclasses.replace(reference, options=options))
        if source is None:
            raise ValueError(
                f"Expected {reference.where} with its {reference.kind}, or one more in the row's "
                f"`{reference.kind}s`, got {len(pools[reference.kind])}."
            )
        sources.append(_resolve(source, media_root, reference.where))
    for kind, rest in waiting.items():
        if left := len(list(rest)):
            raise ValueError(
                f"Expected a place in the messages for each {kind} of the row, got {len(pools[kind])} {kind}(s), "
                f"{left} without one: in `messages` a part {{'type': '{kind}'}} is a place, {_TAGS[kind]} in a text "
                "is one in `conversations` only."
            )
    filled = zip(references, sources, strict=True)
    return [_fill(message, filled) for message in conversation.messages], sources


def _window(row: Mapping[str, Any], media: Sequence[MediaReference]) -> dict[str, Any]:
    """What part of its video a row is about."""
    window = {name: row[name] for name in ("start_time", "end_time") if name in row}
    count = sum(reference.kind == "video" for reference in media)
    if window and count > 1:
        raise ValueError(
            f"Expected start_time and end_time with one video in a row, got {count} videos: put them into the parts "
            "of `messages`."
        )
    return window


def _fill(message: dict[str, Any], media: Iterator[tuple[MediaReference, Any]]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return dict(message)
    parts = []
    for part in content:
        if part["type"] == "text":
            parts.append(part)
        else:
            reference, source = next(media)
            parts.append({**part, **reference.options, part["type"]: source})
    return {**message, "content": parts}


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_path(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike))


def _resolve(source: Any, media_root: str | os.PathLike[str] | None, where: str) -> Any:
    """A source as the processor takes it."""
    if isinstance(source, Mapping):
        # An undecoded image or video of `datasets`.
        source = source.get("bytes") or source.get("path")
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if source is None or (isinstance(source, str) and not source):
        raise ValueError(f"Expected {where} with a source, got an empty one.")
    if isinstance(source, (list, tuple)):
        # The frames of a video, of which some are named by their files.
        return [_resolve(frame, media_root, f"a frame of {where}") if _is_path(frame) else frame for frame in source]
    if not isinstance(source, str) or _URL.match(source):
        return source
    path = os.path.expanduser(source)
    if os.path.isabs(path):
        return path
    root = os.path.abspath(media_root or "")
    full = os.path.normpath(os.path.join(root, path))
    if os.path.commonpath([root, full]) != root:
        raise ValueError(
            f"Expected {where} inside the media root {root!r}, got {source!r}, which leads out of it: give an "
            "absolute path, or another media root."
        )
    return full


def _check_roles(messages: Sequence[Mapping[str, Any]], where: str) -> None:
    unknown = sorted({message["role"] for message in messages} - {"user", "assistant", "system"})
    if unknown:
        raise ValueError(f"Expected the roles user, assistant and system{where}, got {unknown}.")


def _check_answers(messages: list[dict[str, Any]]) -> None:
    answers = [(i, message) for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("Expected a conversation with an answer of the assistant to learn, got none.")
    _check_not_empty(answers)


def _check_not_empty(answers: list[tuple[int, dict[str, Any]]]) -> None:
    for i, message in answers:
        content = message["content"]
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        if not text.strip():
            raise ValueError(f"Expected an answer in message {i}, got an empty one.")


def _kind(messages: list[dict[str, Any]]) -> RowKind:
    kinds = [
        part["type"] for message in messages if isinstance(message["content"], list) for part in message["content"]
    ]
    images, videos = kinds.count("image"), kinds.count("video")
    if images and videos:
        return "mixed"
    if videos:
        return "video"
    return "text" if not images else "image" if images == 1 else "images"


def _read_stream(row: Mapping[str, Any], media_root: str | os.PathLike[str] | None) -> TrainingRow:
    videos = _as_list(row.get("video"))
    if len(videos) != 1:
        raise ValueError(f"Expected one video in a streaming row, got {len(videos)}.")
    messages = row.get("conversation")
    conversation = read_conversation(messages)
    if conversation.media:
        raise ValueError(f"Expected text only in a streaming row, got {conversation.media[0].where} with media.")
    _check_roles(conversation.messages, " in a streaming row")
    _check_not_empty([(i, m) for i, m in enumerate(conversation.messages) if m["role"] == "assistant"])
    times = [row.get(name) for name in ("start_time", "end_time")]
    source = _resolve(videos[0], media_root, "the video")
    return TrainingRow("stream", conversation.messages, [source], StreamWindow(source, times[0], times[1]))
