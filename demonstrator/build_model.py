"""The demonstrator before training: a small VideoLLaMA3 with random weights, its tokenizer and its own frame budget.

A seed enters, a checkpoint folder leaves that `videollama3 train` starts from; training is left to the recipes.

    python -m demonstrator.build_model FOLDER
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from videollama3.modeling.configuration_videollama3 import VideoLlama3Config
from videollama3.modeling.modeling_videollama3 import VideoLlama3ForCausalLM
from videollama3.processing.image_processing_videollama3 import VideoLlama3ImageProcessor
from videollama3.processing.processing_videollama3 import VideoLlama3Processor
from videollama3.processing.video_processing_videollama3 import VideoLlama3VideoProcessor

from .make_tokenizer import make_tokenizer
from .scenes import TICK_SECONDS

# A picture of any size becomes about so many visual tokens, 28 x 28 pixels each: the limits are the same, so the
# authors' rule shrinks a larger picture to fewer and then rounds up to at least this.
TOKENS_PER_PICTURE = 16
FRAMES_PER_SECOND = 1 / TICK_SECONDS
MAX_FRAMES = 64
# Near 1 / sqrt(width). Chosen after short runs in which 0.02, the value of wide models, learnt more slowly.
INITIALIZER_RANGE = 0.06
# How the vision encoder begins (`start_with_waves`, `start_with_neighbours`). From noise, as large models do, it tells
# no shapes apart before some ten thousand pictures (docs/demonstrator.md).
WAVE_GAIN = 2.0
# Of the backgrounds, in normalised values.
DARK = -0.76
NEIGHBOUR_STRENGTH = 8.0
ROPE_THETA = 10000.0


def build_model(vocabulary: dict[str, int], *, seed: int = 0, **sizes: Any) -> VideoLlama3ForCausalLM:
    """A model with random weights.

    Args:
        vocabulary: of the tokenizer.
        seed: of the weights.
        sizes: `hidden_size`, `layers`, `heads`, `vision_hidden_size`, `vision_layers`, `vision_heads`,
            `initializer_range` other than the shipped ones.
    """
    width, vision_width = sizes.get("hidden_size", 256), sizes.get("vision_hidden_size", 160)
    heads = sizes.get("heads", 8)
    config = VideoLlama3Config(
        text_config={
            "vocab_size": len(vocabulary),
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": sizes.get("layers", 6),
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "initializer_range": sizes.get("initializer_range", INITIALIZER_RANGE),
            "bos_token_id": None,
            "eos_token_id": vocabulary["<|im_end|>"],
        },
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": 4 * vision_width,
            "num_hidden_layers": sizes.get("vision_layers", 4),
            "num_attention_heads": sizes.get("vision_heads", 5),
            "initializer_range": sizes.get("initializer_range", INITIALIZER_RANGE),
        },
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoLlama3ForCausalLM(config)
        start_with_waves(model.model.vision_model.embeddings.patch_embedding)
        for layer in model.model.vision_model.encoder.layers:
            start_with_neighbours(layer.self_attn)
    model.generation_config = GenerationConfig(
        eos_token_id=vocabulary["<|im_end|>"], pad_token_id=vocabulary["<|endoftext|>"], do_sample=False
    )
    return model


@torch.no_grad()
def start_with_waves(embedding: torch.nn.Conv2d) -> None:
    """Lets the patch embedding begin as the slowest waves of a patch instead of as noise.

    The rows are two-dimensional cosines (the DCT of JPEG) of brightness and of two colour differences, slow ones
    first, mixed by a random rotation; the bias makes a dark patch small, so that what differs from the background
    stands out.

    Args:
        embedding: weight (width, 3, patch, patch); the width is at most 3 * patch**2.
    """
    width, _, patch, _ = embedding.weight.shape
    steps = torch.arange(patch, dtype=torch.float64)
    waves = torch.cos(math.pi * (steps[None, :] + 0.5) * steps[:, None] / patch) * math.sqrt(2 / patch)
    waves[0] /= math.sqrt(2)
    channels = torch.tensor([[1, 1, 1], [1, 0, -1], [-1, 2, -1]], dtype=torch.float64)
    channels = torch.nn.functional.normalize(channels, dim=1)
    speeds = torch.hypot(steps[:, None], steps[None, :])
    # Colour varies less across a picture than brightness does.
    cost = torch.stack([speeds, 0.5 + 1.6 * speeds, 0.5 + 1.6 * speeds]).flatten()
    basis = torch.einsum("ci,ux,vy->cuvixy", channels, waves, waves).flatten(0, 2)
    slowest = basis[cost.argsort(stable=True)[:width]]
    rotation, _ = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))
    weight = torch.einsum("wk,kixy->wixy", rotation, slowest) * WAVE_GAIN / math.sqrt(patch)
    embedding.weight.copy_(weight)
    embedding.bias.copy_(-DARK * weight.sum(dim=(1, 2, 3)))


@torch.no_grad()
def start_with_neighbours(attention: torch.nn.Module) -> None:
    """Lets four heads begin by looking one patch to the right, left, below and above, as a convolution does.

    Rotary positions turn queries and keys; constant ones, that is biases, whose angles differ by one step attend to
    the patch one step away, whatever is there. Only the two fastest frequencies of rows and of columns are used.

    Args:
        attention: a `VideoLlama3VisionAttention`.
    """
    width = attention.head_dim
    half, num_frequencies = width // 2, width // 4
    frequencies = ROPE_THETA ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
    fast = (torch.arange(num_frequencies) < 2).to(torch.float64)
    # So that a step beside the neighbour costs `NEIGHBOUR_STRENGTH` in the score.
    scale = math.sqrt(NEIGHBOUR_STRENGTH / (fast * (1 - frequencies.cos())).sum().item() / attention.scaling)
    for head, steps in enumerate(((0, 1), (0, -1), (1, 0), (-1, 0))):
        angles = torch.cat([-frequencies * step for step in steps])
        rows = slice(head * width, (head + 1) * width)
        query = torch.cat([fast, fast, torch.zeros(half)])
        key = torch.cat([fast, fast]).repeat(2) * torch.cat([angles.cos(), angles.sin()])
        attention.q_proj.bias[rows] = (query * scale).float()
        attention.k_proj.bias[rows] = (key * scale).float()


def build_processor(tokenizer: Any) -> VideoLlama3Processor:
    """A processor that brings every picture down to a few tokens; images are merged 2 x 2 as in stage 4."""
    budget = {"merge_size": 2, "min_tokens": TOKENS_PER_PICTURE, "max_tokens": TOKENS_PER_PICTURE}
    return VideoLlama3Processor(
        VideoLlama3ImageProcessor(**budget),
        tokenizer,
        VideoLlama3VideoProcessor(**budget, fps=FRAMES_PER_SECOND, max_frames=MAX_FRAMES),
    )


def main() -> None:
    """Writes the checkpoint into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = make_tokenizer()
    model = build_model(tokenizer.get_vocab(), seed=options.seed)
    model.save_pretrained(options.folder)
    build_processor(tokenizer).save_pretrained(options.folder)
    print(f"wrote {options.folder}: {sum(weights.numel() for weights in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
