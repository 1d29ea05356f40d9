"""What the language model has read of the prompt.

A prompt and the features of its frames enter, the KV cache and the last hidden state are kept; tokens that are held
are not read again. What the prompt says is left to `transcript.py`, the cache's memory to `growing_cache.py`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .frame_encoder import FrameTokens
from .grouped_attention import grouped_attention
from .growing_cache import GrowingCache
from .placement import input_device
from .prompt_writer import Chunk, PromptWriter

# Tokens that go through the model at once when a prompt is built again.
_PREFILL_TOKENS = 4096


class PromptCache:
    """The beginning of a prompt, read.

    Args:
        model: a `VideoLlama3ForCausalLM`.
        max_tokens: of the longest prompt.

    Attributes:
        kv: transformers' cache, for `generate`.
        last_hidden: (width,) after the last token that `read` took; None when words came after.
        num_rebuilt_tokens: that were read again.
    """

    def __init__(self, model: Any, *, max_tokens: int) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self.kv = self._empty()
        self.last_hidden: torch.Tensor | None = None
        self.num_rebuilt_tokens = 0

    def _empty(self) -> GrowingCache:
        return GrowingCache(self._model.config.text_config.num_hidden_layers, max_tokens=self._max_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return int(self.kv.get_seq_length())

    @property
    def device(self) -> torch.device:
        """Where features and hidden states lie."""
        return input_device(self._model.get_input_embeddings())

    def fork(self) -> PromptCache:
        """A cache that goes on from here."""
        twin = copy.copy(self)
        twin.kv = self.kv.fork()
        return twin

    def clear(self) -> None:
        """Holds nothing any more."""
        self.kv, self.last_hidden = self._empty(), None

    @torch.no_grad()
    def read(self, writer: PromptWriter, frames: Mapping[int, FrameTokens]) -> None:
        """Runs the model over what the cache does not hold yet.

        Args:
            writer: of a prompt that begins with the tokens held.
            frames: those of the prompt, by number.
        """
        embeds = self._embeds(writer, frames)
        for part in embeds.split(_PREFILL_TOKENS, dim=1) if embeds is not None else ():
            with grouped_attention(self._model):
                outputs = self._model.model(inputs_embeds=part, past_key_values=self.kv, use_cache=True)
            self.last_hidden = outputs.last_hidden_state[0, -1].clone()

    def read_again(self, before: PromptWriter, writer: PromptWriter, frames: Mapping[int, FrameTokens]) -> None:
        """Goes over to another prompt, from the first token that differs.

        Args:
            before: the prompt so far.
            writer: the other one, which ends like it.
            frames: those of the other one.
        """
        same = sum(len(chunk.ids) for chunk in _common(before.chunks, writer.chunks))
        never = sum(len(chunk.ids) for chunk in _common(before.chunks[::-1], writer.chunks[::-1]))
        new = min(never, before.num_tokens - self.num_tokens)
        self.kv.keep(same)
        self.num_rebuilt_tokens += writer.num_tokens - self.num_tokens - new
        self.read(writer, frames)

    def _embeds(self, writer: PromptWriter, frames: Mapping[int, FrameTokens]) -> torch.Tensor | None:
        """(1, tokens, width) of the tokens that the cache does not hold; None where it holds all."""
        table, device = self._model.get_input_embeddings(), self.device
        parts = []
        for chunk, skip in self._missing(writer):
            if chunk.frame is None:
                parts.append(table(torch.tensor(chunk.ids[skip:], device=device)))
            else:
                parts.append(frames[chunk.frame].features[skip:].to(device, table.weight.dtype))
        return torch.cat(parts).unsqueeze(0) if parts else None

    def _missing(self, writer: PromptWriter) -> list[tuple[Chunk, int]]:
        """Chunks that the cache lacks, wholly or but for their first tokens, with the number of these."""
        end = writer.num_tokens
        missing: list[tuple[Chunk, int]] = []
        for chunk in reversed(writer.chunks):
            if end <= self.num_tokens:
                break
            end -= len(chunk.ids)
            missing.append((chunk, max(0, self.num_tokens - end)))
        return missing[::-1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is held, for saving: (1, heads, tokens, width) per layer, and the last hidden state."""
        tensors = {} if self.last_hidden is None else {"last_hidden": self.last_hidden}
        for number, layer in enumerate(self.kv.layers):
            if layer.is_initialized:
                tensors[f"cache.{number}.keys"], tensors[f"cache.{number}.values"] = layer.keys, layer.values
        return tensors

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The reverse of `tensors`, each layer on its own device."""
        for number, layer in enumerate(self._model.model.language_model.layers):
            if f"cache.{number}.keys" in tensors:
                place = input_device(layer)
                keys, values = (tensors[f"cache.{number}.{part}"].to(place) for part in ("keys", "values"))
                self.kv.update(keys, values, number)
        if "last_hidden" in tensors:
            self.last_hidden = tensors["last_hidden"].to(self.device)


def _common(one: Sequence[Chunk], other: Sequence[Chunk]) -> list[Chunk]:
    """Chunks that both begin with."""
    return [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
