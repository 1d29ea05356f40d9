"""What was shown and said so far, and the prompt that it makes.

Frames and words enter as events, a growing prompt leaves, with the tokens that each frame costs. How the prompt is
worded is left to `prompt_writer.py`, what is dropped to `forgetting.py`, reading it to `prompt_cache.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch

from .frame_encoder import FrameTokens
from .prompt_writer import PromptForm, PromptWriter
from .records import NO_FRAME, Event


class Transcript:
    """Events in order of time; can be copied.

    Args:
        processor: a `VideoLlama3Processor`.
        form: of the prompt.
        system: the system message; empty for none.

    Attributes:
        events: what was shown and said, but for frames that are forgotten.
        frames: those held, by their number.
        frame_costs: tokens that each frame put into the prompt, those of its time and of what was said by itself
            included.
        num_frames_seen: frames shown, those forgotten included.
        writer: of the prompt.
    """

    def __init__(self, processor: Any, form: PromptForm, system: str) -> None:
        self._processor = processor
        self._form: PromptForm = form
        self._system = system
        self.events: list[Event] = []
        self.frames: dict[int, FrameTokens] = {}
        self.frame_costs: dict[int, int] = {}
        self.num_frames_seen = 0
        self.writer = self._new_writer()

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.writer.num_tokens

    def add_frame(self, tokens: FrameTokens) -> None:
        """Shows the next frame."""
        number = self.num_frames_seen
        self.num_frames_seen += 1
        self.frames[number] = tokens
        self.add(Event("frame", frame=number))

    def add(self, event: Event) -> None:
        """Adds what was said; a frame must be held already."""
        before = self.num_tokens
        self.write(self.writer, event)
        self.events.append(event)
        if event.frame != NO_FRAME:
            self.frame_costs[event.frame] = self.frame_costs.get(event.frame, 0) + self.num_tokens - before

    def cost(self, event: Event) -> int:
        """Tokens that an event would add now."""
        return self.with_event(event).num_tokens - self.num_tokens

    def with_event(self, event: Event) -> PromptWriter:
        """The prompt with one event more; the transcript stays as it is."""
        writer = self.writer.copy()
        self.write(writer, event)
        return writer

    def write(self, writer: PromptWriter, event: Event) -> None:
        """Writes an event into a prompt."""
        if event.kind == "frame":
            frame = self.frames[event.frame]
            writer.frame(event.frame, frame.seconds, frame.num_kept)
        elif event.kind == "question":
            writer.question(event.text)
        elif event.kind == "instruction":
            writer.instruction(event.text)
        elif event.kind == "remark":
            writer.speak()
        else:
            writer.answer(list(event.ids))

    def copy(self) -> Transcript:
        """A transcript that goes on from here."""
        twin: Transcript = object.__new__(Transcript)
        twin.__dict__.update(self.__dict__)
        twin.events = list(self.events)
        twin.frames, twin.frame_costs = dict(self.frames), dict(self.frame_costs)
        twin.writer = self.writer.copy()
        return twin

    def with_frames(self, numbers: Collection[int]) -> Transcript:
        """The transcript without the other frames and what was said by itself after them."""
        twin: Transcript = object.__new__(Transcript)
        twin.__dict__.update(self.__dict__)
        twin.frames = {number: self.frames[number] for number in numbers}
        twin.frame_costs = {number: self.frame_costs[number] for number in numbers}
        staying = {*numbers, NO_FRAME}
        twin.events = [event for event in self.events if event.frame in staying]
        twin.rewrite()
        return twin

    def rewrite(self) -> None:
        """Writes the whole prompt again."""
        self.writer = self._new_writer()
        for event in self.events:
            self.write(self.writer, event)

    def _new_writer(self) -> PromptWriter:
        writer = PromptWriter(self._processor, self._form)
        if self._system:
            writer.system(self._system)
        return writer

    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far: role, content, and of frames their times."""
        result: list[dict[str, Any]] = []
        if self._system:
            result.append({"role": "system", "content": self._system})
        shown = "stream" if self._form == "stream" else "user"
        decode = self._processor.tokenizer.decode
        for event in self.events:
            if event.kind == "frame":
                seconds = self.frames[event.frame].seconds
                if not result or "timestamps_seconds" not in result[-1]:
                    result.append({"role": shown, "content": "", "timestamps_seconds": []})
                result[-1]["timestamps_seconds"].append(seconds)
            elif event.kind in ("question", "instruction"):
                result.append({"role": "user", "content": event.text})
            elif event.kind == "answer":
                result.append({"role": "assistant", "content": decode(event.ids, skip_special_tokens=True)})
        return result

    # ------------------------------------------------------------------ saving and loading

    def record(self) -> dict[str, Any]:
        """Everything but the features, as JSON can hold it."""
        return {
            "events": [dataclasses.asdict(event) for event in self.events],
            "frames": [
                [number, frame.seconds, frame.num_kept, frame.num_visual_tokens, self.frame_costs[number]]
                for number, frame in self.frames.items()
            ],
            "num_frames_seen": self.num_frames_seen,
        }

    def features(self) -> torch.Tensor | None:
        """(kept tokens of all frames held, width); None without frames."""
        return torch.cat([frame.features for frame in self.frames.values()]) if self.frames else None

    def restore(self, record: dict[str, Any], features: torch.Tensor | None) -> None:
        """The reverse of `record` and `features`."""
        rows: Sequence[Sequence[Any]] = record["frames"]
        parts = () if features is None else features.split([row[2] for row in rows])
        for (number, seconds, _, num_visual_tokens, cost), part in zip(rows, parts, strict=True):
            self.frames[number] = FrameTokens(seconds, part, num_visual_tokens)
            self.frame_costs[number] = cost
        self.num_frames_seen = record["num_frames_seen"]
        self.events = [Event(**{**event, "ids": tuple(event["ids"])}) for event in record["events"]]
        self.rewrite()
