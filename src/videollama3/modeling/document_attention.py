"""Qwen2's attention over rows of several documents, one document at a time, without a mask of all pairs.

Where the documents of a row end enters in the place of the mask, attended states leave; anything else that stands
there is left to transformers' own attention.

Dimensions: B rows, L tokens of a row, H heads, D head width. Of a row of three documents of 3, 2 and 4 tokens, nine
by nine scores would be masked down to those that are computed here:

    a . . . . . . . .
    a a . . . . . . .
    a a a . . . . . .
    . . . b . . . . .
    . . . b b . . . .
    . . . . . c . . .
    . . . . . c c . .
    . . . . . c c c .
    . . . . . c c c c
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, apply_rotary_pos_emb

from .packed_attention import attend_in_float32, is_faster_in_float32
from .torch_varlen import TORCH_VARLEN

# Where this was tried, or is known to need no more than torch's own attention.
_DEVICES = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Documents:
    """Stands in the place of an attention mask: tokens see the earlier ones of their own document.

    Attributes:
        lengths: tokens of each document, one row after the other, together B * L.
    """

    lengths: tuple[int, ...]

    def bounds(self, device: torch.device) -> dict[str, Any]:
        """Where each begins and ends, for kernels of packed sequences: `cu_seq_lens_q` and the others of its kind."""
        ends = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        cu_seq_lens = ends.to(device, non_blocking=True)
        longest = max(self.lengths)
        return {
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def attends_by_document(language_model: Any, *, device: torch.device, **kwargs: Any) -> bool:
    """Whether the layers can be given `Documents`, and it changes nothing but cost.

    Args:
        language_model: a `Qwen2Model` that `attend_by_document` was called on.
        device: of the states.
        kwargs: of the model's forward pass; attention weights, which `sdpa` has none of, may be asked for.
    """
    config, layers = language_model.config, language_model.layers
    dropout = config.attention_dropout if language_model.training else 0.0
    asked = kwargs.get("output_attentions")
    return bool(
        config._attn_implementation == "sdpa"
        and device.type in _DEVICES
        and dropout == 0.0
        and not (getattr(config, "output_attentions", False) if asked is None else asked)
        and all(kind == "full_attention" for kind in config.layer_types)
        # Not where an adapter has put another module there.
        and all(isinstance(layer.self_attn, Qwen2DocumentAttention) for layer in layers)
        # A graph is compiled again for other lengths; a mask is only another tensor.
        and not any(_is_compiled(part) for layer in layers for part in (language_model, layer, layer.self_attn))
    )


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")


def attend_by_document(language_model: Any) -> None:
    """Lets every layer of a `Qwen2Model` understand `Documents`; parameters and their names stay as they are."""
    for layer in language_model.layers:
        # Not a new module: its weights would be drawn a second time.
        layer.self_attn.__class__ = Qwen2DocumentAttention


def attend_as_transformers(language_model: Any) -> None:
    """Takes `attend_by_document` back, for engines that look into the source of the attention's forward pass."""
    for layer in language_model.layers:
        layer.self_attn.__class__ = Qwen2Attention


class Qwen2DocumentAttention(Qwen2Attention):
    """`Qwen2Attention` that also takes `Documents` in the place of a mask.

    One document without a mask goes the same way where transformers' would hold the scores of all pairs.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, L, width) -> (B, L, width), and attention weights where the implementation gives them.

        Args:
            hidden_states: (B, L, width).
            position_embeddings: cosines and sines, (B or 1, L, D) each.
            attention_mask: `Documents`, or what transformers' attention takes; None: it sees all before it.
            past_key_values: cache, which holds nothing before tokens without a mask; None with `Documents`.
            kwargs: handed to transformers' attention.
        """
        documents = attention_mask
        has_bounds = kwargs.get("cu_seq_lens_q") is not None
        if attention_mask is None and self._would_hold_all_scores(hidden_states, has_bounds=has_bounds):
            documents = Documents((hidden_states.shape[1],) * hidden_states.shape[0])
        if not isinstance(documents, Documents):
            attended: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
            return attended
        # -1 instead of the number of heads: under tensor parallelism a rank holds a part of them.
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output = attend_documents(query, key, value, documents=documents, scaling=self.scaling)
        return self.o_proj(output.flatten(2)), None

    def _would_hold_all_scores(self, hidden_states: torch.Tensor, *, has_bounds: bool) -> bool:
        """Whether transformers' sdpa lets heads share keys where no kernel but the one that keeps all scores can."""
        # With bounds the other keeps documents apart, or says why it cannot.
        by_sdpa = ("sdpa",) if has_bounds else ("sdpa", TORCH_VARLEN)
        return (
            self.config._attn_implementation in by_sdpa
            and hidden_states.shape[1] > 1
            and self.num_key_value_groups > 1
            and not (self.training and self.attention_dropout)
            and not torch.compiler.is_compiling()
            and not kernel_shares_keys(hidden_states)
        )


def attend_documents(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, documents: Documents, scaling: float | None
) -> torch.Tensor:
    """Causal attention inside each document, none across.

    Args:
        query: (B, H, L, D).
        key: (B, key heads, L, D).
        value: (B, key heads, L, D).
        documents: of the B * L tokens.
        scaling: factor on the scores; None for 1 / sqrt(D).

    Returns:
        (B, L, H, D).
    """
    num_rows, num_heads, length, head_dim = query.shape
    groups = num_heads // key.shape[1]
    shares_keys = groups > 1 and kernel_shares_keys(query)
    if groups > 1 and not shares_keys:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    attend = functools.partial(
        nn.functional.scaled_dot_product_attention, is_causal=True, scale=scaling, enable_gqa=shares_keys
    )
    # Split, not sliced: the gradient of one split is one concatenation.
    parts = zip(*(_one_row(tensor).split(documents.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [attend_in_float32(attend, *part) if is_faster_in_float32(part[0]) else attend(*part) for part in parts]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1).view(num_rows, length, num_heads, head_dim)


def _one_row(states: torch.Tensor) -> torch.Tensor:
    """(B, H, L, D) -> (1, H, B * L, D)."""
    return states.transpose(1, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0)


def kernel_shares_keys(query: torch.Tensor) -> bool:
    """Whether heads may share keys without being expanded: in CUDA's float32 kernel they may not."""
    return query.device.type != "cuda" or query.dtype != torch.float32 or torch.is_autocast_enabled("cuda")
