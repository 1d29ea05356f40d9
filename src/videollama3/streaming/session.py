"""A video that grows and a conversation that goes on, over one KV cache.

Frames with their times and questions enter, answers leave; each frame is encoded once and each token enters the cache
once. What was said is kept by `transcript.py`, what the model has read by `prompt_cache.py`, frames are left to
`tick_sampler.py` and `frame_encoder.py`, what is forgotten to `forgetting.py`, sources to `feed.py`.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
from collections.abc import Generator, Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ..processing.frame_sampling import as_rate
from ..processing.media_sources import Pixels, load_picture
from ..processing.prompt_tokens import SYSTEM_PROMPT
from ..processing.video_reading import Progress
from .feed import Feed, FeedOptions
from .finished_video import read_finished_video
from .forgetting import FORGETTING_POLICIES, ForgettingPolicy, with_room
from .frame_encoder import FrameEncoder, FrameTokens
from .prompt_cache import PromptCache
from .prompt_writer import PromptForm, check_template
from .records import Event, SessionState, TimedMessage
from .saved_session import load_parts, save_parts
from .text_generation import check_generation, generate_text, room_for, with_length
from .tick_sampler import Tick, TickSampler, as_time
from .transcript import Transcript

# Frames that are encoded at once when several ticks have ended.
_FRAMES_PER_BATCH = 16


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
        context = int(model.config.text_config.max_position_embeddings)
        if not 1 <= (context if max_cache_tokens is None else max_cache_tokens) <= context:
            raise ValueError(
                f"Expected max_cache_tokens between 1 and the model's context, {context}, got {max_cache_tokens}."
            )
        rate = as_rate(processor.video_processor.fps if fps is None else fps)
        system = SYSTEM_PROMPT if system_prompt is True else system_prompt or ""
        self.model = model
        self.processor = processor
        self.form: PromptForm = form
        self.max_cache_tokens = context if max_cache_tokens is None else max_cache_tokens
        # As `load` gives them back to this constructor.
        self._arguments: dict[str, Any] = {
            "form": form,
            "system_prompt": system or False,
            "horizon_seconds": horizon_seconds,
            "max_visual_tokens": max_visual_tokens,
            "max_cache_tokens": self.max_cache_tokens,
            "forget": forget,
            "max_gap_seconds": max_gap_seconds,
        }
        self._sampler: TickSampler[Pixels] = TickSampler(
            fps=rate, origin_seconds=origin_seconds, max_gap_seconds=max_gap_seconds
        )
        self._encoder = FrameEncoder(
            model,
            processor.video_processor.settings(),
            horizon_frames=max(1, math.floor(horizon_seconds * rate)),
            max_visual_tokens=max_visual_tokens,
        )
        self._transcript = Transcript(processor, form, system)
        self._cache: PromptCache | None = PromptCache(model, max_tokens=self.max_cache_tokens)
        self._busy = False

    def __enter__(self) -> StreamingSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the cache and the features; the session cannot be used afterwards."""
        self._cache = None
        self._transcript.frames.clear()

    def _open_cache(self) -> PromptCache:
        if self._cache is None:
            raise RuntimeError("Expected an open session, got a closed one.")
        if self._busy:
            raise RuntimeError("Expected the answer before to be taken to its end or closed, got a further call.")
        return self._cache

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
        self._open_cache()
        return self._show_ticks(self._sampler.push(_own_picture(frame), timestamp_seconds))

    def finish(self, end_seconds: float | Fraction) -> list[float]:
        """Says when the last frame ends, so that a tick that is complete by then counts; returns its label."""
        self._open_cache()
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
        self._open_cache()
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
        self._open_cache()
        video = read_finished_video(
            self.processor.video_processor,
            source,
            sampling,
            size=self._encoder.size,
            max_visual_tokens=self._arguments["max_visual_tokens"],
            progress=progress,
        )
        self._encoder.size = video.size
        self.show(video.pictures, video.timestamps_seconds)
        return video.timestamps_seconds

    def _add_frames(self, pictures: Sequence[Pixels], labels: Sequence[float]) -> None:
        if not pictures:
            return
        cache = self._open_cache()
        encoder, transcript = self._encoder.copy(), self._transcript.copy()
        for tokens in encoder.encode(pictures, labels):
            transcript.add_frame(tokens)
        self._go_over_to(transcript, with_room_for=0)
        self._encoder = encoder
        cache.read(self._transcript.writer, self._transcript.frames)

    def new_sampler(self) -> TickSampler[Any]:
        """A sampler of this session's rate, for a source that brings its own times."""
        return TickSampler(fps=self._sampler.rate, max_gap_seconds=self._arguments["max_gap_seconds"])

    @property
    def next_label_seconds(self) -> Fraction | None:
        """Where a further source goes on: the end of the last tick that was shown; None before the first."""
        if not self._transcript.frames:
            return None
        return as_time(next(reversed(self._transcript.frames.values())).seconds) + 1 / self._sampler.rate

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
        check_generation(generation)
        self._open_cache()
        return self._answer(Event("question", text), remember, generation)

    def _answer(self, event: Event, remember: bool, generation: dict[str, Any]) -> Generator[str, None, None]:
        # Again: between `ask` and the first piece, another answer may have begun.
        cache = self._open_cache()
        generation = with_length(generation, self.model, max_cache_tokens=self.max_cache_tokens)
        cost = self._transcript.cost(event)
        room = room_for(generation, self._transcript.num_tokens + cost)
        self._go_over_to(self._transcript, with_room_for=cost + room)
        self._busy = True
        ids: list[int] | None = None
        try:
            ids = yield from self._generate(event, cache, generation)
        finally:
            self._busy = False
            if ids is None or not remember:
                cache.kv.keep(self._transcript.num_tokens)
        if remember:
            self._say(event)
            self._say(Event("answer", ids=tuple(ids), frame=event.frame))
            cache.kv.keep(self._transcript.num_tokens)

    def _generate(
        self, event: Event, cache: PromptCache, generation: dict[str, Any]
    ) -> Generator[str, None, list[int]]:
        """Generates what follows an event; returns the new ids without the token that ends them."""
        writer = self._transcript.with_event(event)
        ids = [token for chunk in writer.chunks for token in chunk.ids]
        answer = yield from generate_text(
            self.model, self.processor.tokenizer, ids, cache=cache.kv, generation=generation
        )
        own = self.model.generation_config.eos_token_id
        ends = {writer.control_id("<|im_end|>"), *(own if isinstance(own, (list, tuple)) else [own])}
        return list(itertools.takewhile(lambda token: token not in ends, answer))

    def _say(self, event: Event) -> None:
        self._transcript.add(event)
        # The state after the last frame says no more how to go on.
        self._open_cache().last_hidden = None

    def _go_over_to(self, transcript: Transcript, *, with_room_for: int) -> None:
        """Makes a transcript this session's, without the frames that have to go for so many tokens more.

        Raises:
            ValueError: when there are not enough frames to forget; the session is then as it was.
        """
        fewer = with_room(
            transcript, with_room_for, max_tokens=self.max_cache_tokens, policy=self._arguments["forget"]
        )
        self._transcript = fewer
        if fewer is not transcript:
            self._open_cache().read_again(transcript.writer, fewer.writer, fewer.frames)

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
        check_generation(generation)
        self._open_cache()
        self._say(Event("instruction", instruction))
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
        yield from self._answer(Event("remark", frame=self._transcript.num_frames_seen - 1), True, generation)

    @torch.no_grad()
    def speaking_probability(self) -> float:
        """How likely the model begins a message now rather than waiting for the next frame, 0 to 1."""
        if self.form != "stream":
            raise ValueError(f'Expected a session of form "stream", got form {self.form!r}.')
        hidden = self._open_cache().last_hidden
        if hidden is None:
            raise ValueError("Expected a session whose last event is a frame, got none since the last words.")
        logits = self.model.lm_head(hidden).float()
        control_id = self._transcript.writer.control_id
        wanted = torch.tensor([control_id("<|im_start|>"), control_id("<|stream_start|>")])
        return float(logits[wanted.to(logits.device)].softmax(dim=0)[0])

    # ------------------------------------------------------------------ looking at the session

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far: role, content, and of frames their times."""
        return self._transcript.messages()

    @property
    def frames(self) -> list[FrameTokens]:
        """The frames held, the oldest first."""
        return list(self._transcript.frames.values())

    def state(self) -> SessionState:
        """Sizes and counts."""
        cache, held = self._open_cache(), self.frames
        return SessionState(
            num_tokens=self._transcript.num_tokens,
            num_frames=len(held),
            num_kept_tokens=sum(frame.num_kept for frame in held),
            seconds=held[-1].seconds - held[0].seconds + 1 / float(self._sampler.rate) if held else 0.0,
            cache_bytes=cache.kv.used_bytes,
            allocated_cache_bytes=cache.kv.allocated_bytes,
            num_forgotten_frames=self._transcript.num_frames_seen - len(held),
            num_skipped_ticks=self._sampler.skipped_ticks,
            num_encoded_frames=self._encoder.num_encoded,
            num_rebuilt_tokens=cache.num_rebuilt_tokens,
        )

    def fork(self) -> StreamingSession:
        """A session that goes on from here by itself; the caches share what they have in common."""
        cache = self._open_cache()
        twin = copy.copy(self)
        twin._sampler = copy.copy(self._sampler)
        twin._encoder = self._encoder.copy()
        twin._transcript = self._transcript.copy()
        twin._cache = cache.fork()
        return twin

    # ------------------------------------------------------------------ saving and loading

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes everything that going on needs: `session.json` and a safetensors file.

        A folder that holds a session already has the old one until the new one is complete.

        Args:
            folder: made where there is none.
        """
        cache = self._open_cache()
        save_parts(
            folder,
            self.model,
            self.processor,
            arguments=self._arguments,
            sampler=self._sampler,
            encoder=self._encoder,
            transcript=self._transcript,
            cache=cache,
        )

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
        saved = load_parts(folder, model, processor)
        session = cls(model, processor, fps=saved.sampler.rate, **saved.arguments)
        session._sampler = saved.sampler
        saved.restore(session._encoder, session._transcript, session._open_cache())
        return session


def _to_picture(frame: Any) -> Pixels:
    return load_picture(frame, what="frame")


def _own_picture(frame: Any) -> Pixels:
    """A picture that does not change when the caller fills its array again."""
    picture = _to_picture(frame)
    return picture.copy() if isinstance(frame, (np.ndarray, torch.Tensor)) else picture
