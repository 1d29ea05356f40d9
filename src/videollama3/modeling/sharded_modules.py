"""Which modules fetch their weights from other processes; what follows from it is left to those who call them."""

from __future__ import annotations

from torch import nn


def gathers_weights(module: nn.Module) -> bool:
    """Whether a part of a module fetches its weights from other processes at every call (FSDP of both kinds, ZeRO-3).

    Such processes call it equally often, or they wait for each other for ever.
    """
    # By name: `fully_shard` makes a class FSDP<name of the part's class>; DeepSpeed numbers what it divides.
    if any(type(part).__name__.startswith(("FSDP", "FullyShardedDataParallel")) for part in module.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())
