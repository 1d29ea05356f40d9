"""Messages -> prompt text -> token ids, with placeholders expanded and user text kept as text.

Messages without media and records of the media enter; token ids leave, with the mask of what the assistant
said. Reading media is left to `media_requests.py`, padding to `processing_videollama3.py`.

Strings that a user wrote must never become control tokens. Before the template is rendered, every character
that could begin one is followed by a mark that occurs nowhere in the conversation; in the rendered text only
unmarked control tokens count, and the marks are taken out of what is left.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from transformers.utils.chat_template_utils import _get_template_variables, render_jinja_template

SYSTEM_PROMPT = (
    "You are VideoLLaMA3 created by Alibaba DAMO Academy, a helpful assistant to help people understand images "
    "and videos."
)

# The format the released weights were trained with; placeholders are per image and per video, the processor
# writes each frame's time and tokens.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if add_system_prompt and loop.first and message['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\n" + SYSTEM_PROMPT + "<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- set tag = 'stream' if message['role'] == 'stream' else 'im' -%}"
    "{{- '<|' + tag + '_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part is string -%}{{- part -}}{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endgeneration -%}"
    "{{- '\\n' -}}"
    "{%- elif message['content'] is string -%}"
    "{{- message['content'] + '<|' + tag + '_end|>\\n' -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part is string -%}{{- part -}}"
    "{%- elif part['type'] == 'image' -%}"
    "{%- if 'timestamp' in part -%}{{- 'Time ' + part['timestamp'] | round(1) | string + 's: ' -}}{%- endif -%}"
    "{{- '<|image_pad|>\\n' -}}"
    "{%- elif part['type'] == 'video' -%}{{- '<|video_pad|>\\n' -}}"
    "{%- else -%}{{- part['text'] -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{- '<|' + tag + '_end|>' + ('' if tag == 'stream' else '\\n') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

IMAGE_PLACEHOLDER = "<|image_pad|>"
VIDEO_PLACEHOLDER = "<|video_pad|>"
# The authors' placeholder, of an image or of one frame.
OFFICIAL_PLACEHOLDER = "<image>"
_ASSISTANT_HEADER = "assistant\n"
_STREAM_START, _STREAM_END = "<|stream_start|>", "<|stream_end|>"
_MESSAGE_STARTS = ("<|im_start|>", _STREAM_START)


def timestamp_text(seconds: float) -> str:
    """A label as the weights saw it: one decimal, scaled and rounded half to even (0.05 -> 0.0, 0.35 -> 0.4)."""
    return str(np.round(np.float64(seconds), 1))


def unused_character(texts: Sequence[str]) -> str:
    """A private-use character that occurs in none of the texts."""
    used = set().union(*(set(text) for text in texts)) if texts else set()
    for code in itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)):
        if chr(code) not in used:
            return chr(code)
    raise ValueError("Expected a conversation that leaves one private-use character unused, got all of them.")


def all_strings(value: Any) -> list[str]:
    """Every string inside nested dicts and lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in (*value.keys(), *value.values()) for text in all_strings(item)]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in all_strings(item)]
    return []


def mark_strings(value: Any, first_characters: str, mark: str) -> Any:
    """Puts `mark` behind every one of `first_characters` in all strings of messages.

    Roles and part types stay as they are: templates compare them.
    """
    if isinstance(value, str):
        for character in first_characters:
            value = value.replace(character, character + mark)
        return value
    if isinstance(value, dict):
        return {
            key: item
            if key in ("role", "type") and not _has(item, first_characters)
            else mark_strings(item, first_characters, mark)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [mark_strings(item, first_characters, mark) for item in value]
    return value


def _has(value: Any, characters: str) -> bool:
    return isinstance(value, str) and any(character in value for character in characters)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of prompt: either text to tokenize or one token repeated.

    Attributes:
        text: the text, or the control token's.
        token_id: id of a control token or placeholder; None for text.
        count: how many times the token stands.
        lead: how many characters at the end of a text belong to the picture after it: a frame's time.
    """

    text: str
    token_id: int | None = None
    count: int = 1
    lead: int = 0


@dataclasses.dataclass(frozen=True)
class TokenizedPrompt:
    """Token ids of one row, the mask of what the assistant says, and where pictures stand.

    Attributes:
        input_ids: token ids.
        assistant_mask: 1 on tokens of assistant messages, their closing `<|im_end|>` included, the header
            and the newline after it not.
        after_stream_mask: 1 on the first token of every message that follows a `stream` message: there the
            model decides to speak (`<|im_start|>`) or to stay silent (`<|stream_start|>`).
        pictures: (begin, end) of the tokens of each image or frame, from its time on, in order; of the first
            in a `stream` message from the message's beginning on.
    """

    input_ids: list[int]
    assistant_mask: list[int]
    after_stream_mask: list[int] = dataclasses.field(default_factory=list)
    pictures: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def cut(self, begin: int, end: int) -> TokenizedPrompt:
        """The tokens from `begin` to before `end`, with the pictures that lie whole among them."""
        return TokenizedPrompt(
            self.input_ids[begin:end],
            self.assistant_mask[begin:end],
            self.after_stream_mask[begin:end],
            [(first - begin, last - begin) for first, last in self.pictures if begin <= first and last <= end],
        )


@functools.lru_cache(maxsize=32)
def template_variables(chat_template: str) -> frozenset[str]:
    """Names that a chat template reads without defining them."""
    return frozenset(_get_template_variables(chat_template))


class PromptTokenizer:
    """Splits rendered prompts at control tokens and turns them into ids.

    Args:
        tokenizer: a fast tokenizer of transformers.
        image_token_id: id of the placeholder of an image's tokens.
        video_token_id: id of the placeholder of a video's kept tokens.
    """

    def __init__(self, tokenizer: Any, *, image_token_id: int, video_token_id: int) -> None:
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        special = {
            token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        special.update({IMAGE_PLACEHOLDER: image_token_id, VIDEO_PLACEHOLDER: video_token_id})
        self.control_ids: dict[str, int] = special
        longest_first = sorted(special, key=len, reverse=True)
        self._pattern = re.compile("|".join(re.escape(token) for token in longest_first))
        self.first_characters = "".join(sorted({token[0] for token in special}))
        self.placeholders = [
            token for token in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, OFFICIAL_PLACEHOLDER) if token in special
        ]

    def require_stream_tokens(self) -> None:
        """Raises a `ValueError` where the tokenizer does not know the tokens around a `stream` message."""
        missing = [token for token in (_STREAM_START, _STREAM_END) if token not in self.control_ids]
        if missing:
            raise ValueError(
                f"Expected a tokenizer with the special tokens {_STREAM_START} and {_STREAM_END} for a stream, got "
                f"one without {' and '.join(missing)}: add them, or begin with `videollama3 init`, which does."
            )

    def render(self, messages: list[dict[str, Any]], chat_template: str, **variables: Any) -> tuple[str, str]:
        """Renders one conversation; user text cannot write control tokens.

        Args:
            messages: from `conversations.read_conversation`.
            chat_template: Jinja source.
            variables: `add_generation_prompt`, `continue_final_message`, `tools`, `documents` and whatever
                the template reads.

        Returns:
            The rendered text, still marked, and the mark.
        """
        tools, documents = variables.pop("tools", None), variables.pop("documents", None)
        mark = unused_character(all_strings([messages, tools, documents, chat_template]))
        marked = [
            {**message, "content": self._template_parts(message["content"])}
            for message in mark_strings(messages, self.first_characters, mark)
        ]
        special_tokens = {
            name: value for name, value in self.tokenizer.special_tokens_map.items() if isinstance(value, str)
        }
        rendered, _ = render_jinja_template(
            conversations=[marked],
            tools=mark_strings(tools, self.first_characters, mark),
            documents=mark_strings(documents, self.first_characters, mark),
            chat_template=chat_template,
            **{
                **special_tokens,
                "image_token": IMAGE_PLACEHOLDER,
                "video_token": VIDEO_PLACEHOLDER,
                **variables,
            },
        )
        return rendered[0], mark

    @staticmethod
    def _template_parts(content: Any) -> Any:
        """Parts as templates read them: a video as one frame without times, which every template can show."""
        if isinstance(content, str):
            return content
        parts = []
        for part in content:
            if part["type"] == "video":
                part = {**part, "num_frames": 1}
            elif "timestamp" in part:
                # Rounded here: templates see Python floats, which round otherwise than the authors' did.
                part = {**part, "timestamp": float(timestamp_text(part["timestamp"]))}
            parts.append(part)
        return parts

    def split(self, text: str, mark: str | None = None) -> list[Piece]:
        """Cuts a prompt at its control tokens and takes the marks out of the text between them."""
        pieces: list[Piece] = []
        start = 0
        for match in self._pattern.finditer(text):
            if match.start() > start:
                pieces.append(Piece(_unmark(text[start : match.start()], mark)))
            pieces.append(Piece(match.group(), self.control_ids[match.group()]))
            start = match.end()
        if start < len(text):
            pieces.append(Piece(_unmark(text[start:], mark)))
        return pieces

    def image_pieces(self, num_tokens: int) -> list[Piece]:
        """What one image becomes."""
        return [Piece(IMAGE_PLACEHOLDER, self.image_token_id, num_tokens)]

    def video_pieces(self, timestamps: Sequence[float], kept_per_frame: Sequence[int]) -> list[Piece]:
        """What one video becomes: `Time 0.0s:` and the frame's kept tokens, frames joined by commas."""
        pieces = []
        for i, (seconds, count) in enumerate(zip(timestamps, kept_per_frame, strict=True)):
            text = ("," if i else "") + f"Time {timestamp_text(seconds)}s:"
            pieces.append(Piece(text, lead=len(text)))
            pieces.append(Piece(VIDEO_PLACEHOLDER, self.video_token_id, count))
        return pieces

    def tokenize(self, pieces: list[Piece]) -> TokenizedPrompt:
        """Ids, masks and places of pictures of one row, grown together."""
        pieces = _join_text(pieces)
        encoded = iter(self._encode([piece.text for piece in pieces if piece.token_id is None]))
        row = _GrowingRow({self.image_token_id, self.video_token_id})
        for piece in pieces:
            if piece.token_id is not None:
                row.add_tokens(piece, piece.token_id)
            else:
                row.add_text(piece, *next(encoded))
        return TokenizedPrompt(row.ids, row.assistant_mask, row.after_stream_mask, row.pictures)

    def ends_with_generation_prompt(self, pieces: list[Piece]) -> bool:
        """Whether the model is to speak next."""
        return (
            len(pieces) >= 2
            and pieces[-2].text == "<|im_start|>"
            and pieces[-2].token_id is not None
            and pieces[-1].text == _ASSISTANT_HEADER
        )

    def _encode(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        if not texts:
            return []
        if not getattr(self.tokenizer, "is_fast", False):
            raise TypeError(f"Expected a fast tokenizer (backed by tokenizers), got {type(self.tokenizer).__name__}.")
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


class _GrowingRow:
    """The lists of a `TokenizedPrompt`, and what has to be remembered while they grow."""

    def __init__(self, placeholder_ids: Collection[int]) -> None:
        self.ids: list[int] = []
        self.assistant_mask: list[int] = []
        self.after_stream_mask: list[int] = []
        self.pictures: list[tuple[int, int]] = []
        self._placeholder_ids = placeholder_ids
        self._previous: str | None = None
        self._speaking = False
        self._stream_ended = False
        # Where what belongs to the next picture begins; None: with the picture itself.
        self._picture_begin: int | None = None

    def add_tokens(self, piece: Piece, token_id: int) -> None:
        begin = len(self.ids)
        opens = piece.text in _MESSAGE_STARTS
        self.ids += [token_id] * piece.count
        self.assistant_mask += [int(self._speaking)] * piece.count
        self.after_stream_mask += [int(opens and self._stream_ended)] * piece.count
        if opens:
            self._stream_ended = False
            self._picture_begin = begin if piece.text == _STREAM_START else None
        elif token_id in self._placeholder_ids:
            self.pictures.append((begin if self._picture_begin is None else self._picture_begin, len(self.ids)))
            self._picture_begin = None
        elif piece.text == "<|im_end|>":
            self._speaking = False
        elif piece.text == _STREAM_END:
            self._stream_ended = True
        self._previous = piece.text

    def add_text(self, piece: Piece, ids: list[int], offsets: list[tuple[int, int]]) -> None:
        begin = 0
        if self._previous == "<|im_start|>":
            self._speaking = piece.text.startswith(_ASSISTANT_HEADER)
            begin = len(_ASSISTANT_HEADER)
        if piece.lead and self._picture_begin is None:
            before = sum(end <= len(piece.text) - piece.lead for _, end in offsets)
            self._picture_begin = len(self.ids) + before
        self.ids += ids
        self.assistant_mask += [int(self._speaking and end > begin) for _, end in offsets]
        self.after_stream_mask += [0] * len(ids)
        self._previous = None


def _unmark(text: str, mark: str | None) -> str:
    return text.replace(mark, "") if mark else text


def _join_text(pieces: list[Piece]) -> list[Piece]:
    """Joins neighbouring texts, so that they are tokenized as the one text that they are."""
    joined: list[Piece] = []
    for piece in pieces:
        if piece.token_id is None and joined and joined[-1].token_id is None:
            joined[-1] = Piece(joined[-1].text + piece.text, lead=piece.lead)
        elif piece.token_id is not None or piece.text:
            joined.append(piece)
    return joined
