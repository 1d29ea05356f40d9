"""Linear layers that run on oneDNN on the CPU, where that is faster than what `nn.Linear` calls.

Rows enter, mapped rows leave; parameters, their names and training are those of `nn.Linear`. In float32 torch
calls MKL, which on processors of other makers uses half of the vector width (measured on an AMD EPYC: 107
against 240 GFLOP/s per core); in bfloat16 both are oneDNN, and what is won is the activation on the way out.
"""

from __future__ import annotations

import torch
from torch import nn

# Torch's own compiler emits this operator; it is absent where torch is built without oneDNN.
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Below this many rows a product takes no longer than preparing it.
_MIN_ROWS = 64


class OneDnnLinear(nn.Linear):
    """`nn.Linear`, with another matrix product for inference in float32 on the CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(rows, in) -> (rows, out)."""
        if self.weight.dtype == torch.float32 and _takes(self, input):
            return _product(self, input, "none", "")
        return super().forward(input)


def linear_then_gelu_tanh(linear: nn.Module, input: torch.Tensor) -> torch.Tensor | None:
    """`gelu(linear(input), approximate="tanh")` in one pass, for inference in bfloat16 on the CPU.

    Not in float32, where the approximation inside oneDNN is off by 7e-6 instead of 1.5e-6.

    Args:
        linear: the layer; anything but a plain `OneDnnLinear` (an adapter, a quantised layer, one with hooks)
            has to be called itself.
        input: (rows, in).

    Returns:
        (rows, out); None when there is nothing to gain or the layer has to be called.
    """
    if type(linear) is not OneDnnLinear or linear._forward_hooks or linear._forward_pre_hooks:
        return None
    if "forward" in linear.__dict__ or linear.weight.dtype != torch.bfloat16 or not _takes(linear, input):
        return None
    return _product(linear, input, "gelu", "tanh")


def _takes(linear: nn.Linear, input: torch.Tensor) -> bool:
    return (
        _HAS_ONEDNN
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and input.device.type == "cpu"
        and input.ndim == 2
        and input.shape[0] >= _MIN_ROWS
        and input.dtype == linear.weight.dtype
        # Neither quantised nor distributed: those are subclasses.
        and type(linear.weight) is nn.Parameter
        and type(input) is torch.Tensor
        and not torch.is_autocast_enabled("cpu")
        and (input.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _product(linear: nn.Linear, input: torch.Tensor, activation: str, variant: str) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        input, linear.weight, linear.bias, activation, [], variant
    )
    return product
