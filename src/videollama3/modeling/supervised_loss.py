"""Next-token loss at supervised positions only, so that logits of unsupervised ones never exist.

Hidden states and labels enter, a scalar loss leaves; shifting and chunking happen here, building labels is
left to training code.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

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
            Trainer passes it under gradient accumulation.

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
    for part, target in zip(hidden.split(POSITIONS_PER_CHUNK), targets.split(POSITIONS_PER_CHUNK), strict=True):
        # Also on no position at all: processes that share the head's parameters wait for one another.
        total = total + checkpoint(_sum_of_losses, part, target, lm_head, use_reentrant=False)
    if num_items_in_batch is None:
        divisor: torch.Tensor | int = max(targets.numel(), 1)
    elif isinstance(num_items_in_batch, torch.Tensor):
        divisor = num_items_in_batch.to(total.device)
    else:
        divisor = num_items_in_batch
    return total / divisor


def _sum_of_losses(hidden: torch.Tensor, targets: torch.Tensor, lm_head: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(lm_head(hidden).float(), targets, reduction="sum")
