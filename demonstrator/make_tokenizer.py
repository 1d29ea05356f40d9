"""A small byte-level BPE for the language of the generated data.

Generated texts enter, a tokenizer with the special tokens of VideoLLaMA3 leaves; every other text still has tokens,
one per byte where no word is known.

    python -m demonstrator.make_tokenizer FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from videollama3.processing.prompt_tokens import SYSTEM_PROMPT
from videollama3.random_checkpoint import SPECIAL_TOKENS

from .conversations import any_talk, description, stream_conversation
from .scenes import TICK_SECONDS, random_clip, random_picture

VOCABULARY_SIZE = 600
# A frame's header ",Time 3.0s:" becomes three tokens, and its number is the one that answers "when".
_WORDS = Regex(r",Time|Time| ?\d+\.\d|s:| ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]+|\s+")


def _texts(seed: int, num_scenes: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    for i in range(num_scenes):
        scene = random_clip(rng) if i % 3 else random_picture(rng)
        for turn in (*any_talk(rng, scene), *description(rng, scene)):
            yield f"user\n{turn.question}"
            yield f"assistant\n{turn.answer}"
        for message in stream_conversation(rng, scene) or ():
            yield message.content
        yield f"stream\nTime 0.0s:,Time {i % 20 * TICK_SECONDS}s:"
        yield f"system\n{SYSTEM_PROMPT}"


def make_tokenizer(
    *, seed: int = 0, num_scenes: int = 4000, vocabulary_size: int = VOCABULARY_SIZE
) -> PreTrainedTokenizerFast:
    """Trains the tokenizer.

    Args:
        seed: of the scenes whose questions and answers it is trained on.
        num_scenes: how many of them.
        vocabulary_size: entries in all, special tokens included.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, num_scenes), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    return fast


def main() -> None:
    """Writes the tokenizer into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_tokenizer(seed=options.seed).save_pretrained(options.folder)


if __name__ == "__main__":
    main()
