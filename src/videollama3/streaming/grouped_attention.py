"""Attention of a few new tokens over a long cache, without repeating keys and values for every head.

Queries of all heads and keys and values of their groups enter, attended values leave; the numbers are those of
transformers' `sdpa`, which copies the cache once per head of a group when there is a mask. Which tokens are seen is
left to transformers' masks.

Queries of the heads that share keys are laid one after the other, as if they were further tokens of one head:

    (1, 12 heads, 20 tokens, width) with 2 key heads -> (1, 2 heads, 6 x 20 tokens, width)

Dimensions: B rows, H heads, K key heads, G = H / K heads that share keys, L new tokens, N tokens of the cache, D head
width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ..modeling.document_attention import Documents, attend_documents, kernel_shares_keys
from ..modeling.torch_varlen import TORCH_VARLEN

GROUPED_SDPA = "videollama3_grouped_sdpa"
# What attends by transformers' `sdpa` where documents are not packed.
_REPLACED = ("sdpa", TORCH_VARLEN)


def grouped_sdpa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by torch's `scaled_dot_product_attention`.

    Args:
        module: the attention module, handed to `sdpa`.
        query: (B, H, L, D).
        key: (B, K, N, D).
        value: likewise.
        attention_mask: (B or 1, 1, L, N), True or 0 where a token is seen; None where one token sees all, and for
            a prompt without a cache, which is left to `sdpa`.
        dropout: probability on the weights; with any, `sdpa` does it.
        scaling: factor on the scores; None for 1 / sqrt(D).
        kwargs: for `sdpa`.

    Returns:
        Attended values (B, L, H, D) and None.
    """
    groups = query.shape[1] // key.shape[1]
    is_simple = query.shape[2] == 1 if attention_mask is None else attention_mask.shape[1] == 1
    if groups > 1 and attention_mask is None and not is_simple and not dropout and not kernel_shares_keys(query):
        documents = Documents((query.shape[2],) * len(query))
        return attend_documents(query, key, value, documents=documents, scaling=scaling), None
    if groups == 1 or dropout or not is_simple:
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attend(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    batch, heads, length, width = query.shape
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(batch, key.shape[1], groups * length, width),
        key,
        value,
        attn_mask=None if attention_mask is None else attention_mask.repeat(1, 1, groups, 1),
        scale=scaling,
    )
    return output.reshape(batch, heads, length, width).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def grouped_attention(model: Any) -> Iterator[None]:
    """Within, the language model attends in groups where it would by `sdpa`; every other choice stays.

    Args:
        model: a `VideoLlama3ForCausalLM`.
    """
    config = model.config.text_config
    before = config._attn_implementation
    # Nested, or beside another thread's: whoever found the original puts it back, and both give the same numbers.
    if before in _REPLACED:
        config._attn_implementation = GROUPED_SDPA
    try:
        yield
    finally:
        if before in _REPLACED:
            config._attn_implementation = before


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa_attention)
AttentionMaskInterface.register(GROUPED_SDPA, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
