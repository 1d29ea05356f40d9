"""What a checkpoint and a request occupy in bfloat16, computed from the sizes of the layers.

Sizes of a model enter, parameter counts and bytes leave, by the derivation of `docs/memory.md`; measuring on a
device is left to `benchmarks/`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..processing.visual_budget import ItemSize, target_sizes

PATCH_SIZE = 14
PATCH_WIDTH = 3 * PATCH_SIZE**2
# Tokens of the prompt beside the visual ones, as in docs/memory.md: system message, question and answer, and the
# time before each frame (`,Time 179.0s:`, one token per character at most).
TEXT_TOKENS = 220
TEXT_TOKENS_PER_FRAME = 13
# Activations of the encoder stay below this without gradients.
MAX_CHUNK_BYTES = 512 * 2**20
BYTES_PER_VALUE = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionSizes:
    """Sizes of a vision encoder.

    Attributes:
        vision_hidden: width.
        vision_intermediate: width of the MLP.
        vision_layers: number of layers.
    """

    vision_hidden: int
    vision_intermediate: int
    vision_layers: int

    def num_vision_parameters(self) -> int:
        """Parameters of the encoder: patch embedding, layers, last norm."""
        width, wide = self.vision_hidden, self.vision_intermediate
        layer = 4 * (width * width + width) + 2 * width * wide + wide + width + 4 * width
        return self.vision_layers * layer + PATCH_WIDTH * width + width + 2 * width

    def chunk_bytes(self, num_patches: int) -> int:
        """Activations of the largest chunk of a request of `num_patches` patches."""
        width = self.vision_hidden
        attention = 7 * width * BYTES_PER_VALUE + 2 * width * 4
        mlp = (2 * width + 2 * self.vision_intermediate) * BYTES_PER_VALUE
        per_patch = max(attention, mlp)
        return per_patch * min(num_patches, MAX_CHUNK_BYTES // per_patch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSizes(VisionSizes):
    """Sizes of a whole model.

    Attributes:
        text_hidden: width of the language model.
        text_intermediate: width of its MLP.
        text_layers: number of its layers.
        text_heads: query heads.
        text_kv_heads: key and value heads.
        vocabulary: rows of the embedding.
        tied: whether `lm_head` is the embedding.
    """

    text_hidden: int
    text_intermediate: int
    text_layers: int
    text_heads: int
    text_kv_heads: int
    vocabulary: int
    tied: bool

    def num_parameters(self) -> int:
        """Parameters of encoder, projector and language model."""
        width = self.text_hidden
        key_value = width // self.text_heads * self.text_kv_heads
        attention = 2 * width * width + width + 2 * (width * key_value + key_value)
        layer = attention + 3 * width * self.text_intermediate + 2 * width
        text = self.text_layers * layer + width + (1 if self.tied else 2) * self.vocabulary * width
        projector = self.vision_hidden * width + width + width * width + width
        return self.num_vision_parameters() + projector + text

    def request_bytes(self, *, num_frames: int, num_patches: int, num_visual_tokens: int) -> int:
        """Memory beside the weights at the highest point of a request without pruned tokens."""
        width = self.text_hidden
        num_tokens = num_visual_tokens + TEXT_TOKENS + num_frames * TEXT_TOKENS_PER_FRAME
        pixels = num_patches * PATCH_WIDTH * 4
        visual = 2 * num_visual_tokens * self.vision_hidden * BYTES_PER_VALUE
        projected = 3 * num_visual_tokens * width * BYTES_PER_VALUE
        cache = self.text_layers * 2 * width // self.text_heads * self.text_kv_heads * BYTES_PER_VALUE * num_tokens
        prefill = (2 * width + 3 * self.text_intermediate) * BYTES_PER_VALUE * num_tokens
        logits = self.vocabulary * 4
        return pixels + visual + max(self.chunk_bytes(num_patches), projected + cache + prefill + logits)


def sizes_of(config: dict[str, Any]) -> ModelSizes | VisionSizes:
    """Sizes from a `config.json` of any of the three layouts.

    Raises:
        ValueError: naming the field that is missing.
    """
    vision = config.get("vision_config") or config.get("vision_encoder_config")
    text = config.get("text_config") or config
    try:
        if not isinstance(vision, dict):
            return _vision_sizes(config)
        return ModelSizes(
            **dataclasses.asdict(_vision_sizes(vision)),
            text_hidden=text["hidden_size"],
            text_intermediate=text["intermediate_size"],
            text_layers=text["num_hidden_layers"],
            text_heads=text["num_attention_heads"],
            text_kv_heads=text["num_key_value_heads"],
            vocabulary=text["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        )
    except KeyError as error:
        raise ValueError(
            f"Expected a config.json of a VideoLLaMA3 or of its vision encoder, got one without {error}."
        ) from error


def _vision_sizes(config: dict[str, Any]) -> VisionSizes:
    return VisionSizes(
        vision_hidden=config["hidden_size"],
        vision_intermediate=config["intermediate_size"],
        vision_layers=config["num_hidden_layers"],
    )


def budget_rows(
    sizes: ModelSizes | VisionSizes, examples: list[dict[str, Any]], *, max_tokens: int
) -> list[tuple[str, ...]]:
    """One row per example: what, frames, visual tokens of a frame, of all, GB of the request, GB with weights.

    Args:
        sizes: of the model.
        examples: `what`, `frames`, `height` and `width` in pixels, `merge`.
        max_tokens: visual tokens of a request.
    """
    return [_budget_row(sizes, example, max_tokens) for example in examples]


def _budget_row(sizes: ModelSizes | VisionSizes, example: dict[str, Any], max_tokens: int) -> tuple[str, ...]:
    frames, merge = example["frames"], example["merge"]
    item = ItemSize(frames, example["height"], example["width"], merge)
    ((height, width),) = target_sizes([item], max_tokens=max_tokens)
    patches = frames * (height // PATCH_SIZE) * (width // PATCH_SIZE)
    tokens = patches // merge**2
    if isinstance(sizes, ModelSizes):
        weights = sizes.num_parameters() * BYTES_PER_VALUE
        request = sizes.request_bytes(num_frames=frames, num_patches=patches, num_visual_tokens=tokens)
    else:
        weights = sizes.num_vision_parameters() * BYTES_PER_VALUE
        output = tokens * sizes.vision_hidden * BYTES_PER_VALUE
        request = patches * PATCH_WIDTH * 4 + 2 * output + sizes.chunk_bytes(patches)
    counts = (f"{frames}", f"{tokens // frames:,}", f"{tokens:,}")
    return (example["what"], *counts, gigabytes(request), gigabytes(weights + request))


def gigabytes(num_bytes: int) -> str:
    """Decimal GB with two digits, rounded up, so that no figure promises too little."""
    return f"{math.ceil(num_bytes / 1e7) / 100:.2f}"
