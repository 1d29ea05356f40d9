"""What `videollama3 batch` is asked about -> checked rows by number.

A folder, a glob, a media file or a JSONL file enters, with what the command line says for all rows; conversations
with resolved media leave, each with the digest that tells it from others. Reading media is left to `row_reader.py`.

A JSONL row names media and may say more than the command line; relative paths start at the file's folder:

    {"video": "a.mp4", "prompt": "What happens?", "id": "first", "fps": 2, "start_time": 3, "end_time": 9}
    {"media": ["a.png", "b.mp4"], "max_visual_tokens": 4096}
    {"messages": [{"role": "user", "content": [{"type": "video", "path": "a.mp4"}, {"type": "text", "text": "?"}]}]}
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..loading import IMAGE_SUFFIXES, is_image
from ..processing.conversations import MediaReference, read_conversation
from ..processing.frame_sampling import as_rate, check_max_frames, check_window
from ..processing.media_sources import describe
from ..training.row_sources import JsonLines

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".mpg", ".mpeg"),
    *(".ts", ".m2ts", ".mts", ".3gp", ".ogv", ".gif"),
)
_SOURCES = ("media", "image", "video")
_VIDEO_OPTIONS = ("fps", "max_frames", "start_time", "end_time")
_KEYS = {*_SOURCES, *_VIDEO_OPTIONS, "prompt", "id", "max_visual_tokens", "messages"}
_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+:")
# So many bad rows are shown at once.
_SHOWN_ERRORS = 3


@dataclasses.dataclass(frozen=True)
class RowDefaults:
    """What the command line says for every row that does not say it itself.

    Attributes:
        prompt: the question.
        fps: sampled frames per second of videos.
        max_frames: at most so many frames of a video.
        start_time: beginning of the window in seconds.
        end_time: end of the window in seconds.
        max_visual_tokens: limit of a row before pruning.
    """

    prompt: str | None = None
    fps: float | None = None
    max_frames: int | None = None
    start_time: float | None = None
    end_time: float | None = None
    max_visual_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class BulkRow:
    """One question.

    Attributes:
        index: its number in the input, from 0.
        id: its own, or its first medium as written.
        key: digest of the row as it stands in the input.
        media: its media as written, long data URLs cut short.
        prompt: the question; of `messages` the text of the last turn.
        messages: the conversation, with resolved media.
        max_visual_tokens: limit for all its media together, before pruning.
    """

    index: int
    id: str
    key: str
    media: tuple[str, ...]
    prompt: str
    messages: list[dict[str, Any]]
    max_visual_tokens: int | None


class InputRows(Sequence[BulkRow]):
    """Rows of the input by number; a JSONL file stays on disk.

    Args:
        name: how errors call the input.
        rows: dicts as in a JSONL file.
        root: folder that relative paths start from.
        defaults: what the command line says.
    """

    def __init__(self, name: str, rows: Any, root: str, defaults: RowDefaults) -> None:
        self.name = name
        self._rows, self._root, self._defaults = rows, root, defaults

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        """Reads row `index`.

        Raises:
            ValueError: naming file and row, for one that cannot be used.
        """
        try:
            return read_bulk_row(self._rows[index], index=index, root=self._root, defaults=self._defaults)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.name} row {index}: {error}") from error

    def __iter__(self) -> Iterator[BulkRow]:
        return (self[index] for index in range(len(self)))

    def key(self, index: int) -> str:
        """The digest of row `index`."""
        return _digest(self._rows[index])

    def check(self) -> None:
        """Reads every row.

        Raises:
            ValueError: with the number of bad rows and the first of them.
        """
        errors = [error for index in range(len(self)) if (error := self._error(index)) is not None]
        if errors:
            shown = " | ".join(errors[:_SHOWN_ERRORS])
            more = f" | and {len(errors) - _SHOWN_ERRORS} more" if len(errors) > _SHOWN_ERRORS else ""
            raise ValueError(f"Expected good rows only, got {len(errors)} bad of {len(self)}: {shown}{more}")

    def _error(self, index: int) -> str | None:
        try:
            self[index]
        except ValueError as error:
            return str(error)
        return None


def open_input(source: str, defaults: RowDefaults) -> InputRows:
    """Opens what the user named.

    Args:
        source: a .jsonl file, a folder (searched through, media told by their suffix), a glob (`**` for any folder),
            or one media file.
        defaults: what the command line says for all rows.

    Raises:
        FileNotFoundError: where nothing stands there.
        ValueError: for a file that is neither, or where no media are found.
    """
    if source.endswith(".jsonl"):
        if not os.path.isfile(source):
            raise FileNotFoundError(f"Expected rows in {source!r}, got no such file.")
        lines = JsonLines(source)
        assert lines.media_root is not None
        return _not_empty(InputRows(source, lines, lines.media_root, defaults), "one row")
    if os.path.isdir(source):
        found, root = _walk(source), source
    else:
        found, root = _match(source), ""
    rows = [{"media": path} for path in found]
    return _not_empty(InputRows(source, rows, root, defaults), f"media ({_suffixes()})")


def _not_empty(rows: InputRows, what: str) -> InputRows:
    if not len(rows):
        raise ValueError(f"Expected {rows.name!r} with at least {what}, got none.")
    return rows


def _walk(folder: str) -> list[str]:
    """Media under a folder, relative to it, in order of their names."""
    found = []
    for parent, _, files in os.walk(folder):
        found += [os.path.relpath(os.path.join(parent, file), folder) for file in files if _is_media(file)]
    return sorted(found)


def _match(pattern: str) -> list[str]:
    if os.path.isfile(pattern):
        if not _is_media(pattern):
            raise ValueError(
                f"Expected a .jsonl file, a folder, a glob or a media file ({_suffixes()}), got {pattern!r}."
            )
        return [pattern]
    if not glob.has_magic(pattern):
        raise FileNotFoundError(f"Expected a .jsonl file, a folder, a glob or a media file, got {pattern!r}: nothing.")
    return sorted(path for path in glob.glob(pattern, recursive=True) if _is_media(path) and os.path.isfile(path))


def _is_media(name: str) -> bool:
    return name.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))


def _suffixes() -> str:
    return " ".join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))


def read_bulk_row(row: Any, *, index: int, root: str, defaults: RowDefaults) -> BulkRow:
    """Brings one row to a conversation and checks what can be checked without opening media.

    Args:
        row: a dict as at this module's head; keys whose value is None count as absent.
        index: its number in the input.
        root: folder that relative paths start from.
        defaults: what the command line says.

    Raises:
        TypeError: for values of another type.
        ValueError: for unknown keys, options out of range, and a row without media or question.
    """
    if not isinstance(row, Mapping):
        raise TypeError(f"Expected a JSON object, got {row!r:.80}.")
    present = {key: value for key, value in row.items() if value is not None}
    unknown = sorted(set(present) - _KEYS)
    if unknown:
        raise ValueError(f"Expected keys among {', '.join(sorted(_KEYS))}, got {', '.join(map(repr, unknown))}.")
    limit = present.get("max_visual_tokens", defaults.max_visual_tokens)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"Expected max_visual_tokens as a positive integer, got {limit!r}.")
    messages = _given_messages(present) if "messages" in present else _built_messages(present, defaults)
    conversation = read_conversation(messages)
    references = [_with_defaults(reference, defaults) for reference in conversation.media]
    for reference in references:
        _check_reference(reference)
    media = tuple(_shown(reference.source) for reference in references)
    prompt = _last_text(conversation.messages)
    return BulkRow(
        index=index,
        id=str(present.get("id", media[0] if media else index)),
        key=_digest(row),
        media=media,
        prompt=prompt,
        messages=_resolved(conversation.messages, references, root),
        max_visual_tokens=limit,
    )


def _digest(row: Any) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()[
        :16
    ]


def _given_messages(row: Mapping[str, Any]) -> Any:
    beside = sorted(set(row) - {"messages", "id", "max_visual_tokens"})
    if beside:
        raise ValueError(
            f"Expected a row with `messages` to say the rest inside them, got {', '.join(map(repr, beside))} beside."
        )
    return row["messages"]


def _built_messages(row: Mapping[str, Any], defaults: RowDefaults) -> list[dict[str, Any]]:
    media = [(name, source) for name in _SOURCES for source in _as_list(row.get(name), name)]
    if not media:
        raise ValueError("Expected `media`, `video`, `image` or `messages`, got none of them.")
    prompt = row.get("prompt", defaults.prompt)
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"Expected a question in `prompt`, or --prompt for all rows, got {prompt!r:.80}.")
    parts = []
    for name, source in media:
        kind = ("image" if is_image(source) else "video") if name == "media" else name
        parts.append({"type": kind, kind: source, **(_video_options(row, defaults) if kind == "video" else {})})
    own = [name for name in _VIDEO_OPTIONS if name in row]
    if own and all(part["type"] == "image" for part in parts):
        raise ValueError(f"Expected {', '.join(own)} beside a video, got images only.")
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def _as_list(value: Any, name: str) -> list[str]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) and item for item in values):
        raise TypeError(f"Expected `{name}` as a path, a URL or a list of them, got {value!r:.80}.")
    return values


def _video_options(row: Mapping[str, Any], defaults: RowDefaults) -> dict[str, Any]:
    return {name: row.get(name, getattr(defaults, name)) for name in _VIDEO_OPTIONS}


def _with_defaults(reference: MediaReference, defaults: RowDefaults) -> MediaReference:
    """A video of `messages` takes what it does not say itself from the command line, but for a list of frames."""
    if reference.kind != "video" or isinstance(reference.source, list):
        return reference
    own = {name: value for name, value in reference.options.items() if value is not None}
    return dataclasses.replace(reference, options={**_video_options({}, defaults), **own})


def _check_reference(reference: MediaReference) -> None:
    options = {name: value for name, value in reference.options.items() if value is not None}
    if reference.source is None:
        raise ValueError(f"Expected {reference.where} with its {reference.kind}, got a placeholder only.")
    if "fps" in options:
        as_rate(options["fps"])
    if "max_frames" in options:
        check_max_frames(options["max_frames"])
    check_window(options.get("start_time"), options.get("end_time"))


def _shown(source: Any) -> str:
    return f"{len(source)} frames" if isinstance(source, list) else describe(source)


def _last_text(messages: list[dict[str, Any]]) -> str:
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _resolved(messages: list[dict[str, Any]], media: list[MediaReference], root: str) -> list[dict[str, Any]]:
    """Messages whose media parts carry their source, relative paths from `root`."""
    waiting = iter(media)
    result = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [part if part["type"] == "text" else _with_source(part, next(waiting), root) for part in content]
        result.append({**message, "content": content})
    return result


def _with_source(part: dict[str, Any], reference: MediaReference, root: str) -> dict[str, Any]:
    options = {name: value for name, value in reference.options.items() if value is not None}
    return {**part, **options, reference.kind: _from_root(reference.source, root)}


def _from_root(source: Any, root: str) -> Any:
    if isinstance(source, list):
        return [_from_root(item, root) for item in source]
    if not isinstance(source, str) or _URL.match(source):
        return source
    return os.path.join(root, os.path.expanduser(source))
