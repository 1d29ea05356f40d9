"""Token ids of several rows -> one batch: truncation that spares visual tokens, and padding.

Ids and assistant masks of each row enter, equally long rows (lists or tensors) leave; writing the rows is left
to `prompt_tokens.py`. Options are those of transformers' tokenizers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from .prompt_tokens import TokenizedPrompt


def truncate_row(
    prompt: TokenizedPrompt, *, row: int, limit: int | None, placeholders: Collection[int], side: str = "right"
) -> TokenizedPrompt:
    """Cuts a row to `limit` tokens.

    Args:
        prompt: the row.
        row: its number, for errors.
        limit: tokens that stay; None for all.
        placeholders: ids that stand for visual tokens.
        side: where it is cut, left or right.

    Raises:
        ValueError: naming the row, when the cut would take visual tokens away.
    """
    if limit is None or len(prompt.input_ids) <= limit:
        return prompt
    begin = len(prompt.input_ids) - limit if side == "left" else 0
    rest = prompt.input_ids[:begin] + prompt.input_ids[begin + limit :]
    if any(token in placeholders for token in rest):
        raise ValueError(
            f"Expected row {row} to fit max_length={limit} without cutting visual tokens, got "
            f"{len(prompt.input_ids)} tokens: raise max_length, or lower max_frames or max_visual_tokens."
        )
    return prompt.cut(begin, begin + limit)


def batch_rows(
    prompts: Sequence[TokenizedPrompt],
    *,
    pad_token_id: int | None,
    padding_side: str,
    kinds: dict[int, int],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Pads rows as asked and names them.

    Args:
        prompts: one per row.
        pad_token_id: what `input_ids` are padded with.
        padding_side: left or right.
        kinds: token id to 1 (image) or 2 (video), for `mm_token_type_ids`.
        options: `padding`, `max_length`, `pad_to_multiple_of`, `return_tensors`, `return_attention_mask`,
            `return_assistant_tokens_mask`, `return_mm_token_type_ids`.

    Returns:
        `input_ids`, `attention_mask` and what else was asked for: lists of rows, or int64 (rows, sequence).

    Raises:
        ValueError: for tensors of rows of unequal lengths.
    """
    rows: dict[str, list[list[int]]] = {"input_ids": [prompt.input_ids for prompt in prompts]}
    if options.get("return_attention_mask") is not False:
        rows["attention_mask"] = [[1] * len(prompt.input_ids) for prompt in prompts]
    if options.get("return_assistant_tokens_mask"):
        rows["assistant_masks"] = [prompt.assistant_mask for prompt in prompts]
    if options.get("return_mm_token_type_ids"):
        rows["mm_token_type_ids"] = [[kinds.get(token, 0) for token in prompt.input_ids] for prompt in prompts]
    lengths = [len(prompt.input_ids) for prompt in prompts]
    target = _padded_length(lengths, options)
    if target is not None:
        if pad_token_id is None:
            raise ValueError("Expected a tokenizer with a pad token to pad a batch, got none.")
        for name, values in rows.items():
            fill = pad_token_id if name == "input_ids" else 0
            rows[name] = [_pad(value, target, fill, padding_side) for value in values]
    elif options.get("return_tensors") == "pt" and len(set(lengths)) > 1:
        raise ValueError(f"Expected rows of one length for return_tensors='pt', got {lengths}: pass padding=True.")
    if options.get("return_tensors") != "pt":
        return dict(rows)
    return {name: torch.tensor(values, dtype=torch.int64) for name, values in rows.items()}


def _pad(values: list[int], length: int, fill: int, side: str) -> list[int]:
    padding = [fill] * (length - len(values))
    return padding + values if side == "left" else values + padding


def _padded_length(lengths: Sequence[int], options: dict[str, Any]) -> int | None:
    padding = options.get("padding", False)
    if padding in (False, "do_not_pad"):
        return None
    longest = max(lengths)
    if padding == "max_length":
        limit = options.get("max_length")
        if limit is None:
            raise ValueError("Expected max_length together with padding='max_length', got none.")
        longest = max(longest, limit)
    elif padding not in (True, "longest"):
        raise ValueError(f"Expected padding True, 'longest', 'max_length' or False, got {padding!r}.")
    multiple = options.get("pad_to_multiple_of") or 1
    return -(-longest // multiple) * multiple
