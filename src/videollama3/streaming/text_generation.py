"""`generate` as an iterator of text.

A model, a prompt, its cache and options enter; pieces of text leave while they are generated, and the ids at the end.
What the prompt says is left to `session.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from .grouped_attention import grouped_attention
from .placement import input_device

# Of an answer whose length nobody limits (`generate` alone would stop after 20).
_ANSWER_TOKENS = 512
_LENGTHS = ("max_new_tokens", "max_length")
_NO_ANSWER_OPTIONS = ("num_beams", "num_return_sequences", "streamer", "past_key_values", "input_ids", "inputs_embeds")


def check_generation(generation: Mapping[str, Any]) -> None:
    """Raises ValueError for options of `generate` that one answer from a session's cache cannot have."""
    refused = [name for name in _NO_ANSWER_OPTIONS if name in generation and generation[name] != 1]
    if refused:
        raise ValueError(
            f"Expected options of generate for one answer from this session's cache, got {', '.join(refused)}."
        )


def with_length(generation: Mapping[str, Any], model: Any, *, max_cache_tokens: int) -> dict[str, Any]:
    """Options of `generate` that limit the length of the answer.

    Args:
        generation: the options given.
        model: whose generation config may say it.
        max_cache_tokens: an answer that nobody limits has at most a quarter of them.
    """
    given = {name: value for name, value in generation.items() if value is not None or name not in _LENGTHS}
    if any(name in given for name in _LENGTHS):
        return given
    own = (given.get("generation_config") or model.generation_config).max_new_tokens
    return {**given, "max_new_tokens": own or min(_ANSWER_TOKENS, max(1, max_cache_tokens // 4))}


def room_for(generation: Mapping[str, Any], num_prompt_tokens: int) -> int:
    """Tokens that an answer with a limited length may have."""
    if "max_new_tokens" in generation:
        return int(generation["max_new_tokens"])
    return max(0, int(generation["max_length"]) - num_prompt_tokens)


class _Stop(StoppingCriteria):
    """Stops when nobody reads any more."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device, dtype=torch.bool)


def generate_text(
    model: Any, tokenizer: Any, ids: Sequence[int], *, cache: Any, generation: dict[str, Any]
) -> Generator[str, None, list[int]]:
    """Generates one answer in a thread of its own.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        ids: the whole prompt.
        cache: holds the beginning of the prompt, and is extended.
        generation: options of `generate`.

    Yields:
        Pieces of text.

    Returns:
        The new ids, the one that ends the answer included.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = _Stop()
    outcome: dict[str, Any] = {}

    def run() -> None:
        prompt = torch.tensor([list(ids)], device=input_device(model.get_input_embeddings()))
        criteria = StoppingCriteriaList([*generation.get("stopping_criteria", ()), stop])
        try:
            with grouped_attention(model):
                outcome["ids"] = model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    past_key_values=cache,
                    streamer=streamer,
                    **{**generation, "stopping_criteria": criteria},
                )
        except BaseException as error:  # raised again by the thread that reads
            outcome["error"] = error
            streamer.end()

    thread = threading.Thread(target=run, name="videollama3-generate", daemon=True)
    thread.start()
    try:
        for piece in streamer:
            if piece:
                yield piece
    finally:
        stop.event.set()
        thread.join()
    if "error" in outcome:
        raise outcome["error"]
    answer: list[int] = outcome["ids"][0, len(ids) :].tolist()
    return answer
