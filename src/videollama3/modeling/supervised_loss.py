"""Next-token loss at supervised positions only, so that logits of unsupervised ones never exist.

Hidden states and labels enter, a scalar loss leaves; shifting and chunking happen here, building labels is
left to training code.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .sharded_modules import gathers_weights

IGNORE_INDEX = -100
# Positions whose logits are alive at once: 2048 x 152k float32 logits are 1.2 GB.
POSITIONS_PER_CHUNK = 2048


def supervised_loss(
    hidden_BTC: torch.Tensor,
    labels_BT: torch.Tensor,
    lm_head: nn.Module,
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy of the next token, averaged over supervised positions.

    Position t predicts label t + 1; a label of -100 is not supervised. Logits are computed in chunks and
    recomputed in the backward pass.

    Args:
        hidden_BTC: (batch, sequence, width), last hidden states.
        labels_BT: int64 (batch, sequence), token ids or -100.
        lm_head: maps (positions, width) to (positions, vocabulary).
        num_items_in_batch: divisor instead of the number of supervised positions here, as transformers'
            Trainer passes it under gradient accumulation; 0 counts as 1.

    Returns:
        float32 scalar; zero, still connected to `hidden_BTC`, when nothing is supervised.
    """
    if labels_BT.shape != hidden_BTC.shape[:2]:
        raise ValueError(
            f"Expected labels of shape {tuple(hidden_BTC.shape[:2])}, one per input id, got {tuple(labels_BT.shape)}."
        )
    targets = labels_BT[:, 1:].to(hidden_BTC.device)
    supervised = targets != IGNORE_INDEX
    hidden = hidden_BTC[:, :-1][supervised]
    targets = targets[supervised]
    total = hidden.sum(dtype=torch.float32) * 0.0
    for i in range(_num_chunks(len(targets), lm_head, hidden.device)):
        # Also on no position at all: processes that share the head's parameters wait for one another.
        rows = slice(i * POSITIONS_PER_CHUNK, (i + 1) * POSITIONS_PER_CHUNK)
        part = checkpoint(_sum_of_losses, hidden[rows], targets[rows], lm_head, use_reentrant=False)
        total = total + part.to(total.device)
    if num_items_in_batch is None:
        divisor: torch.Tensor | int = max(targets.numel(), 1)
    elif isinstance(num_items_in_batch, torch.Tensor):
        divisor = num_items_in_batch.to(total.device).clamp(min=1)
    else:
        divisor = max(num_items_in_batch, 1)
    return total / divisor


def _num_chunks(num_positions: int, lm_head: nn.Module, device: torch.device) -> int:
    """Calls of the head; where each fetches its weights from other processes, as many as the most on any of them."""
    count = max(1, math.ceil(num_positions / POSITIONS_PER_CHUNK))
    if torch.distributed.is_available() and torch.distributed.is_initialized() and gathers_weights(lm_head):
        most = torch.tensor(count, device=device)
        mesh = getattr(next(lm_head.parameters()), "device_mesh", None)
        for group in [None] if mesh is None else mesh.get_all_groups():
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
        count = int(most)
    return count


def _sum_of_losses(hidden: torch.Tensor, targets: torch.Tensor, lm_head: nn.Module) -> torch.Tensor:
    # The head may lie on another device than the layer before it.
    logits = lm_head(hidden).float()
    return nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="sum")
