"""Where a module wants what enters it, also where accelerate keeps its weights on another device or on disk."""

from __future__ import annotations

import contextlib

import torch
from torch import nn


def input_device(module: nn.Module) -> torch.device:
    """The device that a module computes on; its offloaded weights lie on "meta" until it is called."""
    for part in module.modules():
        place = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if place is not None:
            return torch.device(place)
    return next(module.parameters()).device


def with_weights(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside it a module's own offloaded weights are where it computes."""
    if not hasattr(module, "_hf_hook"):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    aligned: contextlib.AbstractContextManager[None] = align_module_device(module)
    return aligned
