"""A video that grows and a conversation that goes on, over one KV cache.

Frames with their times and questions enter, answers leave; each frame is encoded once and each token enters the cache
once. The prompt's format is left to `prompt_writer.py`, frames to `tick_sampler.py` and `frame_encoder.py`, what is
forgotten to `forgetting.py`, sources that run by themselves to `feed.py`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import os
from collections.abc import Generator, Iterable, Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from transformers import DynamicCache

from ..processing.frame_sampling import as_rate
from ..processing.media_sources import Pixels, load_picture
from ..processing.prompt_tokens import SYSTEM_PROMPT
from ..processing.video_reading import Progress
from .feed import Feed, FeedOptions
from .finished_video import read_finished_video
from .forgetting import FORGETTING_POLICIES, ForgettingPolicy, frames_to_keep
from .frame_encoder import FrameEncoder, FrameTokens
from .prompt_writer import Chunk, PromptForm, PromptWriter, check_template
from .session_files import check_same_model, fingerprint, read_session, write_session
from .text_generation import generate_text
from .tick_sampler import Tick, TickSampler, as_time

# Tokens that go through the model at once when a prompt is built again.
_PREFILL_TOKENS = 4096
# Frames that are encoded at once when several ticks have ended.
_FRAMES_PER_BATCH = 16
# A rebuild leaves this share of the cache filled, so that the next one comes only after the rest has grown again:
# every new token then costs at most 0.75 / 0.25 = 3 tokens of building again.
_SHARE_AFTER_FORGETTING = 0.75
# Of an answer whose length nobody limits (`generate` alone would stop after 20).
_ANSWER_TOKENS = 512
# Event.frame of what belongs to no frame.
_NO_FRAME = -1
_LENGTHS = ("max_new_tokens", "max_length")
_NO_ANSWER_OPTIONS = ("num_beams", "num_return_sequences", "streamer", "past_key_values", "input_ids", "inputs_embeds")


@dataclasses.dataclass(frozen=True)
class SessionState:
    """What a session holds.

    Attributes:
        num_tokens: of the prompt so far.
        num_frames: frames among them.
        num_kept_tokens: visual tokens among them.
        seconds: from the label of the first frame held to the end of the last tick; 0 without frames.
        cache_bytes: of the KV cache.
        num_forgotten_frames: shown and dropped since.
        num_skipped_ticks: ticks in gaps that were left out.
        num_encoded_frames: pictures that went through the vision encoder.
        num_rebuilt_tokens: tokens that went through the language model again after forgetting.
    """

    num_tokens: int
    num_frames: int
    num_kept_tokens: int
    seconds: float
    cache_bytes: int
    num_forgotten_frames: int
    num_skipped_ticks: int
    num_encoded_frames: int
    num_rebuilt_tokens: int


@dataclasses.dataclass(frozen=True)
class TimedMessage:
    """What the model said by itself.

    Attributes:
        seconds: label of the frame after which it spoke.
        text: what it said.
        probability: of speaking rather than staying silent, after that frame.
    """

    seconds: float
    text: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing shown or said.

    Attributes:
        kind: a frame, a question, an instruction (said without asking), or the assistant's words: answers to
            questions, and what it said by itself.
        text: of a question or an instruction.
        frame: number of the frame; of what the model said by itself, of the frame after which it spoke.
        ids: of the assistant's words, without the token that ends them.
    """

    kind: Literal["frame", "question", "instruction", "answer", "remark"]
    text: str = ""
    frame: int = _NO_FRAME
    ids: tuple[int, ...] = ()


class StreamingSession:
    """Watches a growing video and answers at any time.

    Args:
        model: a `VideoLlama3ForCausalLM`, on its device, in evaluation mode.
        processor: its `VideoLlama3Processor`.
        form: how frames stand in the prompt: "video", one growing video inside a user turn (what the released
            models know best), or "stream", a message of role stream per tick (what `watch` needs).
        fps: ticks per second; the processor's by default.
        system_prompt: a system message; True for the released models' own, False for none.
        horizon_seconds: for a video of this length the size of the pictures is planned; a shorter horizon gives
            larger pictures. Pictures of a longer stream keep that size.
        max_visual_tokens: of a video of that length, before pruning; the processor's budget by default.
        max_cache_tokens: the prompt never grows beyond; the model's context by default.
        forget: which frames go when it is full: "oldest" first, "thin" (of the older half every second one, again
            and again), or "never" (an error instead). The system message, questions, instructions and answers
            stay; what the model said by itself goes with the frame after which it spoke.
        origin_seconds: time at which the first tick begins; that of the first frame by default.
        max_gap_seconds: after a longer pause the ticks in between are left out; None repeats the frame before.

    Raises:
        ValueError: for options out of range, and for a processor with another chat template than the released
            models'.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        form: PromptForm = "video",
        fps: float | Fraction | None = None,
        system_prompt: bool | str = True,
        horizon_seconds: float = 180,
        max_visual_tokens: int | None = None,
        max_cache_tokens: int | None = None,
        forget: ForgettingPolicy = "oldest",
        origin_seconds: float | Fraction | None = None,
        max_gap_seconds: float | None = None,
    ) -> None:
        if form not in ("video", "stream"):
            raise ValueError(f"Expected form 'video' or 'stream', got {form!r}.")
        if forget not in FORGETTING_POLICIES:
            raise ValueError(f"Expected forget as one of {', '.join(FORGETTING_POLICIES)}, got {forget!r}.")
        if not (math.isfinite(horizon_seconds) and horizon_seconds > 0):
            raise ValueError(f"Expected horizon_seconds above zero, got {horizon_seconds}.")
        check_template(processor)
        self.model = model
        self.processor = processor
        self.form: PromptForm = form
        self._forget: ForgettingPolicy = forget
        context = int(model.config.text_config.max_position_embeddings)
        self.max_cache_tokens = context if max_cache_tokens is None else max_cache_tokens
        if not 1 <= self.max_cache_tokens <= context:
            raise ValueError(
                f"Expected max_cache_tokens between 1 and the model's context, {context}, got {max_cache_tokens}."
            )
        rate = as_rate(processor.video_processor.fps if fps is None else fps)
        self._sampler: TickSampler[Pixels] = TickSampler(
            fps=rate, origin_seconds=origin_seconds, max_gap_seconds=max_gap_seconds
        )
        self._max_gap_seconds = max_gap_seconds
        self._horizon_seconds = horizon_seconds
        self._max_visual_tokens = max_visual_tokens
        self._encoder = FrameEncoder(
            model,
            processor.video_processor.settings(),
            horizon_frames=max(1, math.floor(horizon_seconds * rate)),
            max_visual_tokens=max_visual_tokens,
        )
        self._system = SYSTEM_PROMPT if system_prompt is True else system_prompt or ""
        self._events: list[Event] = []
        self._frames: dict[int, FrameTokens] = {}
        # Tokens that each frame put into the prompt, those of its time and of what was said by itself included.
        self._frame_costs: dict[int, int] = {}
        self._num_frames_seen = 0
        self._num_rebuilt_tokens = 0
        self._writer = self._new_writer()
        self._num_tokens = self._writer.num_tokens
        self._cache: Any = DynamicCache(config=model.config.text_config)
        self._last_hidden: torch.Tensor | None = None
        self._busy = False

    def __enter__(self) -> StreamingSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the cache and the features; the session cannot be used afterwards."""
        self._cache = None
        self._frames.clear()
        self._last_hidden = None

    # ------------------------------------------------------------------ frames

    def push(self, frame: Any, timestamp_seconds: float | Fraction) -> list[float]:
        """Takes the next frame of the source, whatever its rate.

        Args:
            frame: one picture: PIL, array or tensor, (height, width, 3) or (3, height, width). It is copied: the
                array may be filled again.
            timestamp_seconds: when it is shown; later than the frame before.

        Returns:
            Labels in seconds of the ticks that ended with it: usually none or one.

        Raises:
            ValueError: when it is not later than the frame before.
        """
        self._check_usable()
        return self._show_ticks(self._sampler.push(_own_picture(frame), timestamp_seconds))

    def finish(self, end_seconds: float | Fraction) -> list[float]:
        """Says when the last frame ends, so that a tick that is complete by then counts; returns its label."""
        self._check_usable()
        return self._show_ticks(self._sampler.finish(end_seconds))

    def _show_ticks(self, ticks: Sequence[Tick[Pixels]]) -> list[float]:
        self.show([tick.picture for tick in ticks], [tick.seconds for tick in ticks])
        return [tick.seconds for tick in ticks]

    def show(self, pictures: Iterable[Any], timestamps_seconds: Sequence[float]) -> None:
        """Takes frames that are already sampled; they all enter the prompt.

        Args:
            pictures: as `push` takes them.
            timestamps_seconds: their labels.

        Raises:
            ValueError: when there is no room for them; those that did not fit are as if never shown.
        """
        self._check_usable()
        batch: list[Pixels] = []
        labels: list[float] = []
        for picture, seconds in zip(pictures, timestamps_seconds, strict=True):
            batch.append(_to_picture(picture))
            labels.append(seconds)
            if len(batch) == _FRAMES_PER_BATCH:
                self._add_frames(batch, labels)
                batch, labels = [], []
        self._add_frames(batch, labels)

    def open(self, source: Any, **options: Any) -> Feed:
        """A file, URL or camera whose frames are pushed while it is iterated; see `FeedOptions` for `options`.

        Iterating gives the label of each tick that has entered the prompt.
        """
        return Feed(self, source, FeedOptions(**options))

    def show_video(self, source: Any, *, progress: Progress | None = None, **sampling: Any) -> list[float]:
        """Takes a finished video as the processor samples it, so that answers are those of the offline call.

        The size of the pictures is planned for this video, if no frame was shown before.

        Args:
            source: as the processor takes videos: path, URL, bytes, folder of pictures, list or array of frames.
            progress: called with (frames read, frames of the video).
            sampling: `fps`, `max_frames`, `start_time`, `end_time` and the processor's other options of one video.

        Returns:
            Labels of the frames in seconds.

        Raises:
            ValueError: when it cannot be read, or there is no room for it.
        """
        self._check_usable()
        video = read_finished_video(
            self.processor.video_processor,
            source,
            sampling,
            size=self._encoder.size,
            max_visual_tokens=self._max_visual_tokens,
            progress=progress,
        )
        self._encoder.size = video.size
        self.show(video.pictures, video.timestamps_seconds)
        return video.timestamps_seconds

    def _add_frames(self, pictures: Sequence[Pixels], labels: Sequence[float]) -> None:
        if not pictures:
            return
        before = self._snapshot()
        for tokens in self._encoder.encode(pictures, labels):
            number = self._num_frames_seen
            self._num_frames_seen += 1
            self._frames[number] = tokens
            self._add(Event("frame", frame=number))
        try:
            self._make_room(0)
        except ValueError:
            self.__dict__.update(before)
            raise
        self._prefill(self._writer)

    def _snapshot(self) -> dict[str, Any]:
        """What showing frames changes before the model reads them."""
        return {
            "_encoder": self._encoder.copy(),
            "_writer": self._writer.copy(),
            "_events": list(self._events),
            "_frames": dict(self._frames),
            "_frame_costs": dict(self._frame_costs),
            "_num_frames_seen": self._num_frames_seen,
            "_num_tokens": self._num_tokens,
        }

    def new_sampler(self) -> TickSampler[Any]:
        """A sampler of this session's rate, for a source that brings its own times."""
        return TickSampler(fps=self._sampler.rate, max_gap_seconds=self._max_gap_seconds)

    @property
    def next_label_seconds(self) -> Fraction | None:
        """Where a further source goes on: the end of the last tick that was shown; None before the first."""
        if not self._frames:
            return None
        return as_time(next(reversed(self._frames.values())).seconds) + 1 / self._sampler.rate

    # ------------------------------------------------------------------ words

    def ask(self, text: str, *, remember: bool = True, **generation: Any) -> Generator[str, None, None]:
        """Asks about what has been shown so far.

        Args:
            text: the question.
            remember: whether question and answer stay in the conversation; otherwise the session is afterwards as
                it was before (but that a full one forgets frames to make room).
            generation: options of `generate` (`max_new_tokens`, `do_sample`, ...), but beams. An answer has at most
                512 tokens, and a quarter of `max_cache_tokens`, where neither they nor the model's generation config
                say otherwise.

        Yields:
            Pieces of the answer as they are generated. An answer that is not taken to its end is not remembered.

        Raises:
            ValueError: when there is no room for question and answer.
        """
        self._check_generation(generation)
        self._check_usable()
        return self._answer(Event("question", text), remember, generation)

    def _answer(self, event: Event, remember: bool, generation: dict[str, Any]) -> Generator[str, None, None]:
        # Again: between `ask` and the first piece, another answer may have begun.
        self._check_usable()
        cost = self._cost(event)
        generation = self._with_length(generation)
        if "max_new_tokens" in generation:
            room = generation["max_new_tokens"]
        else:
            room = max(0, generation["max_length"] - self._num_tokens - cost)
        self._make_room(cost + room)
        writer = self._writer.copy()
        self._write(writer, event)
        self._busy = True
        ids: list[int] | None = None
        try:
            ids = yield from self._generate(writer.chunks, generation)
        finally:
            self._busy = False
            if ids is None or not remember:
                self._crop(self._num_tokens)
        if remember:
            self._add(event)
            self._add(Event("answer", ids=tuple(ids), frame=event.frame))
            self._crop(self._num_tokens)

    def _with_length(self, generation: dict[str, Any]) -> dict[str, Any]:
        """Options of generation that limit the length of the answer."""
        given = {name: value for name, value in generation.items() if value is not None or name not in _LENGTHS}
        if any(name in given for name in _LENGTHS):
            return given
        own = (given.get("generation_config") or self.model.generation_config).max_new_tokens
        return {**given, "max_new_tokens": own or min(_ANSWER_TOKENS, max(1, self.max_cache_tokens // 4))}

    def watch(
        self,
        instruction: str,
        frames: Iterable[Any],
        *,
        threshold: float = 0.5,
        **generation: Any,
    ) -> Generator[TimedMessage, None, None]:
        """Lets the model speak by itself: after each tick it starts a message or stays silent.

        Args:
            instruction: what to look out for ("Tell me when the red circle appears.").
            frames: pairs of a picture and its time, as `push` takes them, or a source that this session opened
                (`open`).
            threshold: it speaks when the probability of beginning a message, against that of waiting for the next
                frame, is at least this.
            generation: options of `generate`.

        Yields:
            What it says, with the time of the frame after which it says it.

        Raises:
            ValueError: when the session's form is not "stream", or the tokenizer has no stream tokens.
        """
        if self.form != "stream":
            raise ValueError(f'Expected a session of form "stream" to watch, got form {self.form!r}.')
        if isinstance(frames, Feed) and frames.session is not self:
            raise ValueError("Expected a source that this session opened, got another session's.")
        self._check_generation(generation)
        self._check_usable()
        self._add(Event("instruction", instruction))
        with contextlib.closing(self._ticks_of(frames)) as ticks:
            for seconds in ticks:
                probability = self.speaking_probability()
                if probability >= threshold:
                    text = "".join(self._speak(generation))
                    yield TimedMessage(seconds, text, probability)

    def _ticks_of(self, frames: Iterable[Any]) -> Generator[float, None, None]:
        """Labels of ticks, each given before the next one enters."""
        if isinstance(frames, Feed):
            yield from frames
            return
        for picture, seconds in frames:
            # One at a time: the model may speak after each.
            for tick in self._sampler.push(_own_picture(picture), seconds):
                yield from self._show_ticks([tick])

    def _speak(self, generation: dict[str, Any]) -> Generator[str, None, None]:
        yield from self._answer(Event("remark", frame=self._num_frames_seen - 1), True, generation)

    @torch.no_grad()
    def speaking_probability(self) -> float:
        """How likely the model begins a message now rather than waiting for the next frame, 0 to 1."""
        if self.form != "stream":
            raise ValueError(f'Expected a session of form "stream", got form {self.form!r}.')
        if self._last_hidden is None:
            raise ValueError("Expected a session whose last event is a frame, got none since the last words.")
        logits = self.model.lm_head(self._last_hidden).float()
        wanted = torch.tensor([self._writer.control_id("<|im_start|>"), self._writer.control_id("<|stream_start|>")])
        return float(logits[wanted.to(logits.device)].softmax(dim=0)[0])

    def _check_generation(self, generation: dict[str, Any]) -> None:
        refused = [name for name in _NO_ANSWER_OPTIONS if name in generation and generation[name] != 1]
        if refused:
            raise ValueError(
                f"Expected options of generate for one answer from this session's cache, got {', '.join(refused)}."
            )

    # ------------------------------------------------------------------ looking at the session

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far: role, content, and of frames their times."""
        result: list[dict[str, Any]] = []
        if self._system:
            result.append({"role": "system", "content": self._system})
        shown = "stream" if self.form == "stream" else "user"
        decode = self.processor.tokenizer.decode
        for event in self._events:
            if event.kind == "frame":
                seconds = self._frames[event.frame].seconds
                if not result or "timestamps_seconds" not in result[-1]:
                    result.append({"role": shown, "content": "", "timestamps_seconds": []})
                result[-1]["timestamps_seconds"].append(seconds)
            elif event.kind in ("question", "instruction"):
                result.append({"role": "user", "content": event.text})
            elif event.kind == "answer":
                result.append({"role": "assistant", "content": decode(event.ids, skip_special_tokens=True)})
        return result

    @property
    def frames(self) -> list[FrameTokens]:
        """The frames held, the oldest first."""
        return list(self._frames.values())

    def state(self) -> SessionState:
        """Sizes and counts."""
        held = list(self._frames.values())
        return SessionState(
            num_tokens=self._num_tokens,
            num_frames=len(held),
            num_kept_tokens=sum(frame.num_kept for frame in held),
            seconds=held[-1].seconds - held[0].seconds + 1 / float(self._sampler.rate) if held else 0.0,
            cache_bytes=sum(
                layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers if layer.is_initialized
            ),
            num_forgotten_frames=self._num_frames_seen - len(held),
            num_skipped_ticks=self._sampler.skipped_ticks,
            num_encoded_frames=self._encoder.num_encoded,
            num_rebuilt_tokens=self._num_rebuilt_tokens,
        )

    def fork(self) -> StreamingSession:
        """A session that goes on from here by itself; the caches share what they have in common."""
        self._check_usable()
        twin = copy.copy(self)
        twin._sampler = copy.copy(self._sampler)
        twin._encoder = self._encoder.copy()
        twin._events = list(self._events)
        twin._frames, twin._frame_costs = dict(self._frames), dict(self._frame_costs)
        twin._writer = self._writer.copy()
        # Growing a cache makes new tensors, so that the old ones can be shared.
        twin._cache = copy.copy(self._cache)
        twin._cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        return twin

    # ------------------------------------------------------------------ saving and loading

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes everything that going on needs: `session.json` and a safetensors file.

        A folder that holds a session already has the old one until the new one is complete.

        Args:
            folder: made where there is none.
        """
        self._check_usable()
        record = {
            "fingerprint": fingerprint(self.model, self.processor),
            "arguments": {
                "form": self.form,
                "system_prompt": self._system or False,
                "horizon_seconds": self._horizon_seconds,
                "max_visual_tokens": self._max_visual_tokens,
                "max_cache_tokens": self.max_cache_tokens,
                "forget": self._forget,
                "max_gap_seconds": self._max_gap_seconds,
            },
            "sampler": self._sampler.state(),
            "size": self._encoder.size,
            "num_encoded": self._encoder.num_encoded,
            "events": [dataclasses.asdict(event) for event in self._events],
            "frames": [
                [number, frame.seconds, frame.num_kept, frame.num_visual_tokens, self._frame_costs[number]]
                for number, frame in self._frames.items()
            ],
            "num_frames_seen": self._num_frames_seen,
            "num_rebuilt_tokens": self._num_rebuilt_tokens,
        }
        write_session(folder, record, self._tensors())

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {f"encoder.{name}": tensor for name, tensor in self._encoder.tensors().items()}
        if self._frames:
            tensors["features"] = torch.cat([frame.features for frame in self._frames.values()])
        if self._sampler.picture is not None:
            tensors["picture"] = torch.from_numpy(self._sampler.picture)
        if self._last_hidden is not None:
            tensors["last_hidden"] = self._last_hidden
        for number, layer in enumerate(self._cache.layers):
            if layer.is_initialized:
                tensors[f"cache.{number}.keys"], tensors[f"cache.{number}.values"] = layer.keys, layer.values
        return tensors

    @classmethod
    def load(cls, model: Any, processor: Any, folder: str | os.PathLike[str]) -> StreamingSession:
        """The session that was saved; it goes on within the same tick.

        Args:
            model: the one that it was saved with: same configuration, weights and dtype, on any device.
            processor: likewise.
            folder: of `save`.

        Raises:
            FileNotFoundError: where no session was saved.
            ValueError: for another model or processor, and for damaged files.
        """
        record, tensors = read_session(folder)
        check_same_model(record["fingerprint"], fingerprint(model, processor))
        session = cls(model, processor, fps=Fraction(record["sampler"]["fps"]), **record["arguments"])
        session._restore(record, tensors)
        return session

    def _restore(self, record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        device = self.model.get_input_embeddings().weight.device
        picture = tensors.get("picture")
        self._sampler = TickSampler.from_state(record["sampler"], None if picture is None else picture.numpy())
        self._encoder.size = tuple(record["size"]) if record["size"] else None
        self._encoder.num_encoded = record["num_encoded"]
        self._encoder.restore(
            {
                name: tensors[f"encoder.{name}"].to(device)
                for name in ("patches", "tokens")
                if f"encoder.{name}" in tensors
            }
        )
        features = iter(
            tensors["features"].to(device).split([row[2] for row in record["frames"]]) if record["frames"] else ()
        )
        for number, seconds, _, num_visual_tokens, cost in record["frames"]:
            self._frames[number] = FrameTokens(seconds, next(features), num_visual_tokens)
            self._frame_costs[number] = cost
        self._num_frames_seen, self._num_rebuilt_tokens = record["num_frames_seen"], record["num_rebuilt_tokens"]
        self._events = [Event(**{**event, "ids": tuple(event["ids"])}) for event in record["events"]]
        self._writer = self._rewritten(self._events)
        self._num_tokens = self._writer.num_tokens
        for number, layer in enumerate(self.model.model.language_model.layers):
            if f"cache.{number}.keys" in tensors:
                place = next(layer.parameters()).device
                keys, values = (tensors[f"cache.{number}.{part}"].to(place) for part in ("keys", "values"))
                self._cache.update(keys, values, number)
        if "last_hidden" in tensors:
            self._last_hidden = tensors["last_hidden"].to(device)

    # ------------------------------------------------------------------ prompt and cache

    def _check_usable(self) -> None:
        if self._cache is None:
            raise RuntimeError("Expected an open session, got a closed one.")
        if self._busy:
            raise RuntimeError("Expected the answer before to be taken to its end or closed, got a further call.")

    def _new_writer(self) -> PromptWriter:
        writer = PromptWriter(self.processor, self.form)
        if self._system:
            writer.system(self._system)
        return writer

    def _write(self, writer: PromptWriter, event: Event) -> None:
        if event.kind == "frame":
            frame = self._frames[event.frame]
            writer.frame(event.frame, frame.seconds, frame.num_kept)
        elif event.kind == "question":
            writer.question(event.text)
        elif event.kind == "instruction":
            writer.instruction(event.text)
        elif event.kind == "remark":
            writer.speak()
        else:
            writer.answer(list(event.ids))

    def _add(self, event: Event) -> None:
        before = self._writer.num_tokens
        self._write(self._writer, event)
        self._events.append(event)
        self._num_tokens = self._writer.num_tokens
        if event.frame != _NO_FRAME:
            cost = self._frame_costs.get(event.frame, 0)
            self._frame_costs[event.frame] = cost + self._num_tokens - before
        if event.kind != "frame":
            # The state after the last frame says no more how to go on.
            self._last_hidden = None

    def _cost(self, event: Event) -> int:
        writer = self._writer.copy()
        self._write(writer, event)
        return writer.num_tokens - self._num_tokens

    def _make_room(self, num_tokens: int) -> None:
        """Forgets frames when the prompt, with `num_tokens` more, would be longer than allowed.

        Raises:
            ValueError: when there are not enough frames to forget; the session is then as it was.
        """
        total, kept = self._num_tokens, list(self._frames)
        events, writer = self._events, self._writer
        while total + num_tokens > self.max_cache_tokens:
            fewer = frames_to_keep(
                {number: self._frame_costs[number] for number in kept},
                excess=total + num_tokens - int(self.max_cache_tokens * _SHARE_AFTER_FORGETTING),
                policy=self._forget,
            )
            if len(fewer) == len(kept):
                raise ValueError(
                    f"Expected at most max_cache_tokens={self.max_cache_tokens} tokens, got {total + num_tokens} with "
                    f"{len(fewer)} frames left and forget={self._forget!r}: raise it, ask for shorter answers, or "
                    "remember less."
                )
            kept, staying = fewer, {*fewer, _NO_FRAME}
            events = [event for event in events if event.frame in staying]
            writer = self._rewritten(events)
            total = writer.num_tokens
        if writer is not self._writer:
            self._rebuild(kept, events, writer)

    def _rewritten(self, events: Sequence[Event]) -> PromptWriter:
        writer = self._new_writer()
        for event in events:
            self._write(writer, event)
        return writer

    def _rebuild(self, kept: Sequence[int], events: list[Event], writer: PromptWriter) -> None:
        """Goes over to a prompt with fewer frames, and reads it again where it differs."""
        same, new = self._unread_tokens(writer)
        self._frames = {number: self._frames[number] for number in kept}
        self._frame_costs = {number: self._frame_costs[number] for number in kept}
        self._events, self._writer, self._num_tokens = events, writer, writer.num_tokens
        self._crop(same)
        self._num_rebuilt_tokens += writer.num_tokens - self._cached_tokens - new
        self._prefill(writer)

    def _unread_tokens(self, writer: PromptWriter) -> tuple[int, int]:
        """Tokens at the beginning of a new prompt that the cache holds, and at its end that it never held."""
        same = sum(len(chunk.ids) for chunk in _common(self._writer.chunks, writer.chunks))
        never = sum(len(chunk.ids) for chunk in _common(self._writer.chunks[::-1], writer.chunks[::-1]))
        return min(same, self._cached_tokens), min(never, self._num_tokens - self._cached_tokens)

    @property
    def _cached_tokens(self) -> int:
        return int(self._cache.get_seq_length())

    def _crop(self, num_tokens: int) -> None:
        """Takes the cache back to its first `num_tokens` tokens."""
        if num_tokens >= self._cached_tokens:
            return
        for layer in self._cache.layers:
            layer.keys = layer.keys[..., :num_tokens, :]
            layer.values = layer.values[..., :num_tokens, :]

    @torch.no_grad()
    def _prefill(self, writer: PromptWriter) -> None:
        """Runs the model over what the cache does not hold yet."""
        embeds = self._embeds(writer)
        for part in embeds.split(_PREFILL_TOKENS, dim=1) if embeds is not None else ():
            outputs = self.model.model(inputs_embeds=part, past_key_values=self._cache, use_cache=True)
            self._last_hidden = outputs.last_hidden_state[0, -1].clone()

    def _embeds(self, writer: PromptWriter) -> torch.Tensor | None:
        """(1, tokens, width) of the tokens that the cache does not hold; None where it holds all."""
        table = self.model.get_input_embeddings()
        parts = []
        for chunk, skip in self._missing(writer):
            if chunk.frame is None:
                parts.append(table(torch.tensor(chunk.ids[skip:], device=table.weight.device)))
            else:
                parts.append(self._frames[chunk.frame].features[skip:].to(table.weight.device, table.weight.dtype))
        return torch.cat(parts).unsqueeze(0) if parts else None

    def _missing(self, writer: PromptWriter) -> list[tuple[Chunk, int]]:
        """Chunks that the cache lacks, wholly or but for their first tokens, with the number of these."""
        end = writer.num_tokens
        missing: list[tuple[Chunk, int]] = []
        for chunk in reversed(writer.chunks):
            if end <= self._cached_tokens:
                break
            end -= len(chunk.ids)
            missing.append((chunk, max(0, self._cached_tokens - end)))
        return missing[::-1]

    def _generate(self, chunks: Sequence[Chunk], generation: dict[str, Any]) -> Generator[str, None, list[int]]:
        """Generates from the prompt, of which the cache holds all but the last words; returns the new ids."""
        ids = [token for chunk in chunks for token in chunk.ids]
        answer = yield from generate_text(
            self.model, self.processor.tokenizer, ids, cache=self._cache, generation=generation
        )
        ends = self._end_ids()
        return list(itertools.takewhile(lambda token: token not in ends, answer))

    def _end_ids(self) -> set[int]:
        own = self.model.generation_config.eos_token_id
        return {self._writer.control_id("<|im_end|>"), *(own if isinstance(own, (list, tuple)) else [own])}


def _common(one: Sequence[Chunk], other: Sequence[Chunk]) -> list[Chunk]:
    """Chunks that both begin with."""
    return [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def _to_picture(frame: Any) -> Pixels:
    return load_picture(frame, what="frame")


def _own_picture(frame: Any) -> Pixels:
    """A picture that does not change when the caller fills its array again."""
    picture = _to_picture(frame)
    return picture.copy() if isinstance(frame, (np.ndarray, torch.Tensor)) else picture
