"""torch's own kernel for packed sequences of unequal lengths, as an attention function of transformers.

Packed queries, keys and values and their bounds enter, attended values leave, without a copy, a mask or a loop
over sequences; rows without bounds go to `sdpa`. Registering it with transformers' interfaces is left to the
package's `registration.py`; the vision encoder finds it by name, also where nothing is registered.

Dimensions: T tokens of all sequences, H heads, D head width, B rows, L tokens of a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn as _varlen_attn
except ImportError:
    _varlen_attn = None

TORCH_VARLEN = "torch_varlen"
# The signature moved between torch 2.10 and 2.13: what this one takes.
_PARAMETERS = frozenset(inspect.signature(_varlen_attn).parameters) if _varlen_attn is not None else frozenset()
# The flash kernels take head widths that are multiples of this.
_HEAD_DIM_MULTIPLE = 8
_MAX_HEAD_DIM = 256


def computed_dtype(states: torch.Tensor) -> torch.dtype:
    """In which dtype attention of these states is computed: under autocast float32 becomes what it names.

    Rotary embedding gives float32 queries and keys there, as the token embeddings are float32.
    """
    device = states.device.type
    if states.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return states.dtype


def varlen_obstacle(device: torch.device, dtype: torch.dtype, *, head_dim: int, dropout: float = 0.0) -> str | None:
    """Says what keeps the kernel from running, in words for an error message; None when it runs.

    Args:
        device: of the queries.
        dtype: of the queries.
        head_dim: width of a head.
        dropout: probability on the attention weights; the kernel knows none.
    """
    if _varlen_attn is None:
        return f"torch {torch.__version__}, which has no torch.nn.attention.varlen (it came with 2.10)"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"device {device}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability(device)}"
    if not torch.backends.cuda.is_flash_attention_available():
        return "a build of torch without flash kernels"
    if head_dim > _MAX_HEAD_DIM:
        return f"head width {head_dim}"
    if dropout > 0.0:
        return f"attention dropout {dropout}"
    return None


def check_varlen(device: torch.device, dtype: torch.dtype, *, head_dim: int, dropout: float = 0.0) -> None:
    """Raises a `ValueError` where the kernel does not run; the arguments are those of `varlen_obstacle`."""
    obstacle = varlen_obstacle(device, dtype, head_dim=head_dim, dropout=dropout)
    if obstacle is not None:
        raise ValueError(
            f'Expected attn_implementation="{TORCH_VARLEN}" with torch 2.10 or newer, on CUDA of compute capability '
            f"8.0 or newer, in float16 or bfloat16, with heads of at most {_MAX_HEAD_DIM} and without attention "
            f'dropout, got {obstacle}: choose "sdpa", or move and cast the model.'
        )


def torch_varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention inside each of the sequences packed in one row; rows without bounds go to `sdpa`.

    Args:
        module: the attention module; `module.is_causal` is read when `is_causal` is None.
        query: (B, H, L, D); with bounds (1, H, T, D).
        key: (B, key heads, L, D); with bounds (1, key heads, T, D).
        value: likewise.
        attention_mask: for `sdpa`; not read when there are bounds.
        scaling: factor on the scores; None for 1 / sqrt(D).
        dropout: probability on the weights; must be 0 when there are bounds.
        is_causal: whether a token sees earlier ones of its sequence only.
        cu_seq_lens_q: int32 (sequences + 1,), where each sequence of the queries starts, and T.
        cu_seq_lens_k: likewise for the keys.
        max_length_q: longest sequence of the queries.
        max_length_k: longest sequence of the keys.
        kwargs: handed to `sdpa`; with bounds only `sliding_window` is looked at, and refused.

    Returns:
        Attended values (B, L, H, D) and None.

    Raises:
        ValueError: when there are bounds and the kernel does not run here, or a sliding window.
    """
    if cu_seq_lens_q is None or cu_seq_lens_k is None or max_length_q is None or max_length_k is None:
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attend(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            is_causal=is_causal,
            **kwargs,
        )
    if kwargs.get("sliding_window") is not None:
        raise ValueError(
            f'Expected layers of full attention for packed rows on "{TORCH_VARLEN}", got a sliding window of '
            f'{kwargs["sliding_window"]}: choose "flash_attention_2" or "sdpa".'
        )
    head_dim = query.shape[-1]
    dtype = computed_dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not torch.compiler.is_compiling():
        check_varlen(query.device, dtype, head_dim=head_dim, dropout=dropout)
    output_THD = _call_kernel(
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),
        bounds=(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k),
        scaling=head_dim**-0.5 if scaling is None else scaling,
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
    )
    return output_THD.unsqueeze(0), None


def _call_kernel(
    query_THD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    *,
    bounds: tuple[torch.Tensor, torch.Tensor, int, int],
    scaling: float,
    causal: bool,
) -> torch.Tensor:
    """One call, under any of the signatures since torch 2.10."""
    assert _varlen_attn is not None
    options: dict[str, Any] = {}
    num_heads, num_key_heads, head_dim = query_THD.shape[1], key_THD.shape[1], query_THD.shape[2]
    if num_key_heads != num_heads:
        if "enable_gqa" in _PARAMETERS:
            options["enable_gqa"] = True
        else:
            key_THD, value_THD = (
                tensor.repeat_interleave(num_heads // num_key_heads, dim=1) for tensor in (key_THD, value_THD)
            )
    if causal:
        options.update({"window_size": (-1, 0)} if "window_size" in _PARAMETERS else {"is_causal": True})
    padding = -head_dim % _HEAD_DIM_MULTIPLE
    if padding:
        # Zeros change no score, and give zeros that are cut off again.
        query_THD, key_THD, value_THD = (
            nn.functional.pad(tensor, (0, padding)) for tensor in (query_THD, key_THD, value_THD)
        )
    if "scale" in _PARAMETERS:
        options["scale"] = scaling
    else:
        query_THD = query_THD * (scaling * query_THD.shape[-1] ** 0.5)
    output: torch.Tensor = _varlen_attn(query_THD, key_THD, value_THD, *bounds, **options)
    return output[..., :head_dim]
