"""`generate` as an iterator of text.

A model, a prompt and its cache enter; pieces of text leave while they are generated, and the ids at the end. What the
prompt says is left to `session.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


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
        prompt = torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)
        criteria = StoppingCriteriaList([*generation.get("stopping_criteria", ()), stop])
        try:
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
