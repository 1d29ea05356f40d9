"""The demonstrator before training: a small VideoLLaMA3 with random weights, its tokenizer and its own frame budget.

A seed enters, a checkpoint folder leaves that `videollama3 train` starts from; training is left to the recipes.

    python -m demonstrator.build_model FOLDER
"""

from __future__ import annotations

import argparse
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
# Two looks per second: a shape that crosses the frame within a second is still seen moving.
FRAMES_PER_SECOND = 1 / TICK_SECONDS
MAX_FRAMES = 64
# Near 1 / sqrt(width). Chosen after short runs in which 0.02, the value of wide models, learnt more slowly.
INITIALIZER_RANGE = 0.06


def build_model(vocabulary: dict[str, int], *, seed: int = 0, **sizes: Any) -> VideoLlama3ForCausalLM:
    """A model with random weights.

    Args:
        vocabulary: of the tokenizer.
        seed: of the weights.
        sizes: `hidden_size`, `layers`, `heads`, `vision_hidden_size`, `vision_layers`, `vision_heads`,
            `initializer_range` other than the shipped ones.
    """
    width, vision_width = sizes.get("hidden_size", 192), sizes.get("vision_hidden_size", 160)
    heads = sizes.get("heads", 6)
    config = VideoLlama3Config(
        text_config={
            "vocab_size": len(vocabulary),
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": sizes.get("layers", 4),
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
    model.generation_config = GenerationConfig(
        eos_token_id=vocabulary["<|im_end|>"], pad_token_id=vocabulary["<|endoftext|>"], do_sample=False
    )
    return model


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
