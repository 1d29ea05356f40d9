"""What a training step holds in memory, from sizes alone.

A configuration, settings of a run, and counts of tokens, patches and trained tokens enter; bytes leave. What samples
hold is counted by `dataset_report.py`.

With gradient checkpointing a step keeps the input of every layer until the way back, and works on one layer at a time:

    inputs of the language model's layers   4 bytes x tokens x width x layers (the residual stream is float32)
    inputs of the encoder's layers          2 bytes x patches x width x layers, 4 in fp32; none where it is frozen
    one layer at work                       bytes a token (patch) as in `_BYTES_AT_WORK`, or
    logits                                  12 bytes x trained tokens x vocabulary, of at most 2048 tokens at once

The bytes at work are what `torch.profiler` counted on the CPU for several widths; `tests/training/test_step_memory.py`
holds the whole estimate against it. Kernels of a card hold less or more by what attention keeps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..modeling.supervised_loss import POSITIONS_PER_CHUNK
from ..modeling.vision_encoder_videollama3 import MAX_ACTIVATION_BYTES_PER_CHUNK

# Of the layer whose activations are recomputed, with their gradients: times the MLP's width, times the layer's width.
_BYTES_AT_WORK = {
    ("language", True): (12, 34),
    ("language", False): (24, 38),
    ("encoder", True): (6, 28),
    ("encoder", False): (12, 34),
}
# Numbers of a patch: 14 x 14 pixels of three colours.
_PATCH_VALUES = 588
_BYTES_A_LOGIT = 12


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Widths and depths that decide the memory of a training step.

    Attributes:
        hidden_size: of the language model.
        intermediate_size: of its MLP.
        num_layers: of the language model.
        vision_hidden_size: of the encoder.
        vision_intermediate_size: of its MLP.
        vision_num_layers: of the encoder.
        vocab_size: of the language model.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    vision_hidden_size: int
    vision_intermediate_size: int
    vision_num_layers: int
    vocab_size: int

    @classmethod
    def of(cls, config: Any) -> ModelSize:
        """From a `VideoLlama3Config`."""
        text, vision = config.text_config, config.vision_config
        return cls(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            vision_hidden_size=vision.hidden_size,
            vision_intermediate_size=vision.intermediate_size,
            vision_num_layers=vision.num_hidden_layers,
            vocab_size=text.vocab_size,
        )


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of a step beside weights, gradients and the optimizer's moments, with gradient checkpointing.

    Attributes:
        size: of the model.
        bf16: whether layers compute in bfloat16 (on float32 weights) or in float32.
        encoder_learns: whether the encoder has a learning rate; a frozen one keeps nothing.
    """

    size: ModelSize
    bf16: bool = True
    encoder_learns: bool = True

    def layer_inputs(self, tokens: int, patches: int) -> int:
        """What the way back needs of all layers."""
        return self._language_inputs(tokens) + self._encoder_inputs(patches)

    def layer_at_work(self, tokens: int, patches: int) -> int:
        """What the larger of a language layer and an encoder layer holds while it works."""
        return max(self._language_at_work(tokens), self._encoder_at_work(patches))

    def logits(self, supervised: int) -> int:
        """Logits of trained tokens with their gradients, a chunk at a time."""
        return _BYTES_A_LOGIT * min(supervised, POSITIONS_PER_CHUNK) * self.size.vocab_size

    def whole(self, tokens: int, patches: int, supervised: int) -> int:
        """The most at any moment: the language model's inputs are gone when the encoder's way back begins."""
        language = self._language_inputs(tokens) + max(self._language_at_work(tokens), self.logits(supervised))
        return self._encoder_inputs(patches) + max(language, self._encoder_at_work(patches))

    def _language_inputs(self, tokens: int) -> int:
        return 4 * tokens * self.size.hidden_size * self.size.num_layers

    def _encoder_inputs(self, patches: int) -> int:
        if not self.encoder_learns:
            return 0
        return (2 if self.bf16 else 4) * patches * self.size.vision_hidden_size * self.size.vision_num_layers

    def _language_at_work(self, tokens: int) -> int:
        inner, width = _BYTES_AT_WORK["language", self.bf16]
        return tokens * (inner * self.size.intermediate_size + width * self.size.hidden_size)

    def _encoder_at_work(self, patches: int) -> int:
        inner, width = _BYTES_AT_WORK["encoder", self.bf16]
        pixels = 2 * _PATCH_VALUES if self.bf16 else 0
        size = inner * self.size.vision_intermediate_size + width * self.size.vision_hidden_size + pixels
        # Frozen, it has no gradients and runs in chunks.
        return patches * size if self.encoder_learns else min(patches * size // 2, MAX_ACTIVATION_BYTES_PER_CHUNK)


@dataclasses.dataclass(frozen=True)
class HeldMemory:
    """Bytes that a process holds from the first step to the last, unless they are sharded.

    Attributes:
        weights: float32, trained and frozen.
        gradients: of the trained ones.
        moments: two of each trained weight, as AdamW has them.
    """

    weights: int
    gradients: int
    moments: int

    @classmethod
    def of(cls, model: Any) -> HeldMemory:
        """Of a model, which may be on the device "meta", whose trained parameters require gradients."""
        trained = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
        return cls(4 * sum(weights.numel() for weights in model.parameters()), 4 * trained, 8 * trained)

    @property
    def whole(self) -> int:
        """Of all three."""
        return self.weights + self.gradients + self.moments
