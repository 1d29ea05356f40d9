r"""The prompt of a stream as it grows: control tokens, text and frames, in the released models' format.

What is said and shown enters event by event; chunks leave, runs of token ids between which nothing is ever joined.
Turning frames into features is left to `frame_encoder.py`, running the model to `session.py`.

A text is tokenized when a control token or a frame ends it, together with all that stands before it since the last
one, as if the whole prompt had been tokenized at once:

    <|im_start|> | user\nTime 0.0s: | [frame] | ,Time 1.0s: | [frame] | \nWhat happens? | <|im_end|> | \n
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ..processing.prompt_tokens import SYSTEM_PROMPT, timestamp_text

PromptForm = Literal["video", "stream"]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A run of tokens.

    Attributes:
        ids: token ids; of a frame one placeholder per kept token.
        frame: number of the frame whose features take their place; None for text and control tokens.
    """

    ids: tuple[int, ...]
    frame: int | None = None


class PromptWriter:
    """Writes chunks; can be copied and taken back to an earlier point.

    Args:
        processor: a `VideoLlama3Processor` whose chat template is the released models'.
        form: "video": frames are one growing video inside a user turn; "stream": each tick is a message of role
            stream, between those of user and assistant.

    Attributes:
        chunks: what has been written.
        num_tokens: their tokens.
    """

    def __init__(self, processor: Any, form: PromptForm) -> None:
        self._tokenizer = processor.tokenizer
        self._video_token_id: int = processor.video_token_id
        self._form = form
        self.chunks: list[Chunk] = []
        self.num_tokens = 0
        self._text = ""
        # Looked up once: a tokenizer builds its whole vocabulary for each look.
        self._control_ids: dict[str, tuple[int, ...]] = {}
        # In the video form: whether a user turn is open, and whether it holds a frame already.
        self._turn: Literal["closed", "open", "shown"] = "closed"

    def copy(self) -> PromptWriter:
        """A writer that goes on from the same point."""
        twin: PromptWriter = object.__new__(PromptWriter)
        twin.__dict__.update(self.__dict__)
        twin.chunks = list(self.chunks)
        return twin

    def system(self, text: str) -> None:
        """A system message."""
        self._message("system", text)

    def frame(self, number: int, seconds: float, num_kept: int) -> None:
        """A frame, of which `num_kept` tokens stand in the prompt."""
        label = f"Time {timestamp_text(seconds)}s:"
        if self._form == "stream":
            # A message with one picture, as in the rows that the models were trained on.
            self._control("<|stream_start|>")
            self._text += f"stream\n{label} "
            self._frame_chunk(number, num_kept)
            self._text += "\n"
            self._control("<|stream_end|>")
            return
        if self._turn == "closed":
            self._open("user")
        self._text += ("," if self._turn == "shown" else "") + label
        self._frame_chunk(number, num_kept)
        self._turn = "shown"

    def question(self, text: str) -> None:
        """What the user says; the assistant speaks next."""
        if self._turn == "closed":
            self._open("user")
        self._text += ("\n" if self._turn == "shown" else "") + text
        self._close()
        self._open("assistant")
        self._flush()

    def instruction(self, text: str) -> None:
        """What the user says without asking for an answer now."""
        self._message("user", text)

    def speak(self) -> None:
        """The assistant speaks next, without being asked."""
        self._open("assistant")
        self._flush()

    def answer(self, ids: list[int]) -> None:
        """What the assistant said, without the token that ends it."""
        self._append(Chunk(tuple(ids)))
        self._close()

    def control_id(self, token: str) -> int:
        """The id of a control token.

        Raises:
            ValueError: when the tokenizer has none of that name.
        """
        (token_id,) = self._encode_control(token)
        return token_id

    def _message(self, role: str, text: str) -> None:
        self._open(role)
        self._text += text
        self._close()

    def _open(self, role: str) -> None:
        self._control("<|im_start|>")
        self._text += f"{role}\n"
        self._turn = "open"

    def _close(self) -> None:
        self._control("<|im_end|>")
        self._text += "\n"
        self._turn = "closed"

    def _control(self, token: str) -> None:
        self._flush()
        self._append(Chunk(self._encode_control(token)))

    def _frame_chunk(self, number: int, num_kept: int) -> None:
        self._flush()
        self._append(Chunk((self._video_token_id,) * num_kept, number))

    def _append(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.num_tokens += len(chunk.ids)

    def _flush(self) -> None:
        if self._text:
            self._append(Chunk(self._encode(self._text)))
            self._text = ""

    def _encode_control(self, token: str) -> tuple[int, ...]:
        if token not in self._control_ids:
            token_id = self._tokenizer.get_vocab().get(token)
            if token_id is None:
                raise ValueError(
                    f"Expected a tokenizer with the token {token!r}, got one without: the checkpoint cannot stream."
                )
            self._control_ids[token] = (int(token_id),)
        return self._control_ids[token]

    def _encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text in which control tokens are plain text."""
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return tuple(encoded["input_ids"])


def check_template(processor: Any) -> None:
    """Raises ValueError where the processor's chat template does not write the released models' format."""
    conversation = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    expected = (
        "<|im_start|>system\na<|im_end|>\n<|im_start|>user\n<|video_pad|>\nb<|im_end|>\n<|im_start|>assistant\nc"
        "<|im_end|>\n<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n"
    )
    rendered = processor.apply_chat_template(conversation, add_generation_prompt=True)
    if rendered != expected:
        raise ValueError(
            f"Expected a processor whose chat template writes the released models' format, {expected!r}, got "
            f"{rendered!r}: a growing prompt is written in that format only."
        )


__all__ = ["SYSTEM_PROMPT", "Chunk", "PromptForm", "PromptWriter", "check_template"]
