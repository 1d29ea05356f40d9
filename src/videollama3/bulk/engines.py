"""Engines that answer read rows: transformers' `generate` here, vLLM in `vllm_engine.py`.

Token ids and uint8 patches of several rows enter, texts leave; which rows go together is left to `token_batches.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from ..demonstrator import demonstrator_path
from ..loading import GREEDY, load_model_and_processor, naming_model
from ..processing.media_requests import to_image_tensors, to_video_tensors
from ..processing.processing_videollama3 import VideoLlama3Processor
from ..processing.token_rows import batch_rows
from .row_reader import ReadRow, RowReader

EngineName = Literal["transformers", "vllm"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said to one row.

    Attributes:
        text: without control tokens.
        num_new_tokens: the stop token included.
        finished: whether the model stopped by itself, rather than at the limit.
    """

    text: str
    num_new_tokens: int
    finished: bool


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A row that an engine cannot take.

    Attributes:
        reason: one line.
    """

    reason: str


class Engine(Protocol):
    """Answers rows."""

    def answer(self, rows: Sequence[ReadRow]) -> list[Answer | Refusal]:
        """One answer per row, in their order."""


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Everything an engine is made of; can be pickled.

    Attributes:
        engine: which one.
        model: folder or repository; None for the demonstrator.
        dtype: as on the command line.
        device: as on the command line; of transformers.
        attn: attention implementation of transformers, or None for the default.
        max_new_tokens: of an answer.
        vllm_options: arguments of `vllm.LLM`.
    """

    engine: EngineName
    model: str | None
    dtype: str
    device: str
    attn: str | None
    max_new_tokens: int
    vllm_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def load_processor(self) -> VideoLlama3Processor:
        """The checkpoint's processor."""
        checkpoint = demonstrator_path() if self.model is None else self.model
        with naming_model(checkpoint, "--model"):
            processor: VideoLlama3Processor = VideoLlama3Processor.from_pretrained(checkpoint)
        return processor

    def build(self, reader: RowReader) -> Engine:
        """Loads the model; `reader` is what its rows are read with."""
        if self.engine == "vllm":
            from .vllm_engine import VllmEngine

            return VllmEngine(self, reader)
        options = argparse.Namespace(model=self.model, dtype=self.dtype, device=self.device, attn=self.attn)
        model, processor = load_model_and_processor(options)
        return TransformersEngine(model, processor, max_new_tokens=self.max_new_tokens)


class TransformersEngine:
    """Greedy `generate` on left-padded batches.

    Args:
        model: in evaluation mode.
        processor: of the same checkpoint.
        max_new_tokens: of an answer.
    """

    def __init__(self, model: Any, processor: VideoLlama3Processor, *, max_new_tokens: int) -> None:
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        stops = model.generation_config.eos_token_id
        self._stops = set(stops) if isinstance(stops, list) else {stops}

    def answer(self, rows: Sequence[ReadRow]) -> list[Answer | Refusal]:
        """One answer per row, in their order."""
        inputs = self._batch(rows)
        output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, **GREEDY)
        return [self._answer(ids) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()]

    def _batch(self, rows: Sequence[ReadRow]) -> dict[str, torch.Tensor]:
        media = [item for row in rows for item in row.prompt.media]
        tensors = batch_rows(
            [row.prompt.prompt for row in rows],
            pad_token_id=self.processor.tokenizer.pad_token_id,
            padding_side="left",
            kinds={},
            options={"padding": True, "return_tensors": "pt"},
        )
        tensors = {**tensors, **to_image_tensors(media), **to_video_tensors(media)}
        return {name: tensor.to(self.model.device) for name, tensor in tensors.items()}

    def _answer(self, ids: list[int]) -> Answer:
        """Cuts what `generate` pads a row with after its stop token."""
        end = next((i + 1 for i, token in enumerate(ids) if token in self._stops), None)
        ids = ids[:end]
        text: str = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(text, len(ids), finished=end is not None)
