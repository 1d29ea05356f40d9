"""Attention over packed segments, on every backend that transformers knows.

Queries, keys and values of many segments enter packed along one axis, attended values leave in the same
order; which segments there are is left to `packed_segments.py`, projections to the encoder.

Dimensions: T patches of all segments, H heads, D head width, S segments of one length, L that length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .packed_segments import PackedSegments
from .torch_varlen import TORCH_VARLEN

# Eager attention writes its scores; segments are taken in blocks so that they stay below this.
_MAX_EAGER_SCORE_BYTES = 512 * 2**20
# Up to this length torch's CPU kernel takes less time for attention and its gradient in float32 than in half
# precision, whose gradient is slow: 4.9 against 24.1 ms at 64 (16 segments of 5 heads), 6.3 against 9.0 at 150, 22.0
# against 18.8 at 400 (14 heads), on a processor with bfloat16 matrix products.
_MAX_FLOAT32_LENGTH = 256


def is_faster_in_float32(query: torch.Tensor) -> bool:
    """Whether `sdpa` with a gradient is better computed in float32: in training in half precision on the CPU.

    Args:
        query: (S, H, L, D).
    """
    return (
        query.device.type == "cpu"
        and query.shape[-2] <= _MAX_FLOAT32_LENGTH
        and query.requires_grad
        and not torch.compiler.is_compiling()
        and (query.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu"))
    )


def attend_in_float32(
    attend: Callable[..., torch.Tensor], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """`attend(query, key, value)` in float32 on the CPU, its result in the dtype that it would have had."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    with torch.autocast("cpu", enabled=False):
        return attend(query.float(), key.float(), value.float()).to(dtype)


def eager_segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention of segments of one length, softmax in float32.

    Args:
        module: the attention module; only `module.training` is read.
        query: (S, H, L, D).
        key: (S, H, L, D).
        value: (S, H, L, D).
        attention_mask: added to the scores, broadcast to (S, H, L, L); None for full attention.
        scaling: factor on the scores.
        dropout: probability on the weights.
        kwargs: ignored, there for the common signature.

    Returns:
        Attended values (S, L, H, D) and weights (S, H, L, L).
    """
    scores = torch.matmul(query, key.transpose(-2, -1)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def attend_packed(
    attend: Callable[..., Any],
    module: nn.Module,
    query_THD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    *,
    segments: PackedSegments,
    implementation: str,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Full attention inside each segment, none across segments.

    Args:
        attend: the attention function for `implementation`.
        module: the attention module, handed to `attend`.
        query_THD: (T, H, D), packed as `segments` says.
        key_THD: (T, H, D).
        value_THD: (T, H, D).
        segments: the layout of the T patches.
        implementation: a name of transformers' attention interface, or "torch_varlen".
        scaling: factor on the scores.
        dropout: probability on the attention weights.

    Returns:
        (T, H, D), in the order of `query_THD`.
    """
    if "flash" in implementation or implementation == TORCH_VARLEN:
        # One kernel call over all segments, batch of one: (1, H, T, D).
        output, _ = attend(
            module,
            query_THD.transpose(0, 1).unsqueeze(0),
            key_THD.transpose(0, 1).unsqueeze(0),
            value_THD.transpose(0, 1).unsqueeze(0),
            attention_mask=None,
            scaling=scaling,
            dropout=dropout,
            is_causal=False,
            cu_seq_lens_q=segments.cu_seqlens,
            cu_seq_lens_k=segments.cu_seqlens,
            max_length_q=segments.max_seqlen,
            max_length_k=segments.max_seqlen,
        )
        return output.reshape(query_THD.shape)
    outputs = []
    start = 0
    call = functools.partial(_attended, attend, module, scaling=scaling, dropout=dropout)
    if implementation == "eager":
        call = functools.partial(_attended_in_blocks, call)
    for num_segments, length in segments.groups:
        for count in _segments_per_call(num_segments, length, query_THD.shape[1], implementation):
            rows = slice(start, start + count * length)
            query, key, value = (
                tensor[rows].view(count, length, *tensor.shape[1:]).transpose(1, 2)
                for tensor in (query_THD, key_THD, value_THD)
            )
            in_float32 = implementation == "sdpa" and is_faster_in_float32(query)
            output = attend_in_float32(call, query, key, value) if in_float32 else call(query, key, value)
            outputs.append(output.reshape(count * length, *query_THD.shape[1:]))
            start += count * length
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attended(
    attend: Callable[..., Any], module: nn.Module, *states: torch.Tensor, scaling: float, dropout: float
) -> torch.Tensor:
    output: torch.Tensor = attend(
        module, *states, attention_mask=None, scaling=scaling, dropout=dropout, is_causal=False
    )[0]
    return output


def _attended_in_blocks(
    call: Callable[..., torch.Tensor], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Queries of one long segment in blocks, so that its scores stay below the limit too."""
    length = query.shape[2]
    rows = max(1, _MAX_EAGER_SCORE_BYTES // (4 * query.shape[0] * query.shape[1] * length))
    if rows >= length or torch.compiler.is_compiling():
        return call(query, key, value)
    return torch.cat([call(part, key, value) for part in query.split(rows, dim=2)], dim=1)


def _segments_per_call(num_segments: int, length: int, num_heads: int, implementation: str) -> list[int]:
    # A compiled graph serves every number of segments only where that number is not looked at.
    if implementation != "eager" or torch.compiler.is_compiling():
        return [num_segments]
    block = max(1, _MAX_EAGER_SCORE_BYTES // (4 * num_heads * length * length))
    return [min(block, num_segments - first) for first in range(0, num_segments, block)]
