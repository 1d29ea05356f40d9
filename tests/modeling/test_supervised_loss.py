"""The loss: next token, supervised positions only, in chunks."""

import re

import pytest
import torch
from torch import nn

from videollama3.modeling import supervised_loss as module
from videollama3.modeling.supervised_loss import supervised_loss

from .allocations import peak_bytes

BATCH, SEQUENCE, WIDTH, VOCABULARY = 2, 7, 5, 11


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=generator))
    hidden = torch.randn(BATCH, SEQUENCE, WIDTH, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    labels[0, :3] = -100
    labels[1, 2] = labels[1, 5:] = -100
    return head, hidden, labels


def _full(head, hidden, labels, reduction="mean"):
    """Cross entropy with the logits of every position."""
    return nn.functional.cross_entropy(
        head(hidden)[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1), reduction=reduction
    )


@pytest.mark.parametrize("positions_per_chunk", [1, 3, 2048])
def test_loss_and_gradients_equal_full_cross_entropy(parts, monkeypatch, positions_per_chunk):
    monkeypatch.setattr(module, "POSITIONS_PER_CHUNK", positions_per_chunk)
    head, hidden, labels = parts
    full = _full(head, hidden, labels)
    expected = torch.autograd.grad(full, (hidden, head.weight))
    loss = supervised_loss(hidden, labels, head)
    gradients = torch.autograd.grad(loss, (hidden, head.weight))
    # Measured worst case 0 on 2.0; labels off by one position are off by 1.4, unsupervised ones counted by 0.8.
    torch.testing.assert_close(loss, full, atol=2e-6, rtol=0)
    for got, want in zip(gradients, expected, strict=True):
        # Measured worst case 3e-8 on 0.26; a chunk missing in the backward pass leaves rows of zeros.
        torch.testing.assert_close(got, want, atol=2e-6, rtol=0)


def test_unsupervised_positions_never_reach_the_head(parts):
    head, hidden, labels = parts
    rows = []
    head.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[0]))
    supervised_loss(hidden, labels, head)
    # Supervised labels: 4 of the first row; 4 of the second, less its first, which no position predicts.
    assert rows == [7]


@pytest.mark.parametrize("divisor", [20, torch.tensor(20)])
def test_num_items_in_batch_divides_the_sum(parts, divisor):
    head, hidden, labels = parts
    loss = supervised_loss(hidden, labels, head, num_items_in_batch=divisor)
    # Measured worst case 0 on 0.7; dividing by the 7 positions here instead of 20 is off by 1.3.
    torch.testing.assert_close(loss, _full(head, hidden, labels, "sum") / 20, atol=2e-6, rtol=0)


@pytest.mark.parametrize("divisor", [0, torch.tensor(0)])
def test_nothing_supervised_in_a_whole_update(parts, divisor):
    """transformers' Trainer counts the labels of all rows of an update, and divides by none."""
    head, hidden, labels = parts
    loss = supervised_loss(hidden, torch.full_like(labels, -100), head, num_items_in_batch=divisor)
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, hidden)[0].any()


def test_nothing_supervised_gives_a_connected_zero(parts):
    head, hidden, labels = parts
    loss = supervised_loss(hidden, torch.full_like(labels, -100), head)
    assert loss.item() == 0.0
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.abs().sum() == 0


def test_half_precision_is_summed_in_float32(parts):
    head, hidden, labels = parts
    loss = supervised_loss(hidden.bfloat16(), labels, head.bfloat16())
    assert loss.dtype == torch.float32
    # bfloat16 logits keep 8 bits: measured difference 0.0034 of 2.0; labels off by one position are off by 1.4.
    torch.testing.assert_close(loss, _full(head.float(), hidden, labels), atol=0.05, rtol=0)


def test_labels_of_another_shape_are_named(parts):
    head, hidden, labels = parts
    message = "Expected labels of shape (2, 7), one per input id, got (2, 6)."
    with pytest.raises(ValueError, match=re.escape(message)):
        supervised_loss(hidden, labels[:, 1:], head)


def test_memory_grows_with_supervised_positions_only():
    positions, vocabulary, width, supervised = 4096, 2048, 8, 123
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False)
    hidden = torch.randn(1, positions, width, generator=generator).requires_grad_()
    labels = torch.full((1, positions), -100)
    labels[:, -supervised:] = torch.randint(0, vocabulary, (1, supervised), generator=generator)
    peak = peak_bytes(lambda: supervised_loss(hidden, labels, head).backward())
    # One float32 copy of all logits is 33.6 MB. Measured 3.0 MB: three of the supervised ones' and the gradients.
    assert peak < 6e6
