"""A tiny VideoLLaMA3 with random weights, for demonstrations and tests of everything around the model.

A seed enters, a model and a processor leave; its answers mean nothing. Trained checkpoints are read by the
classes of `modeling/` and `processing/`.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerFast

from .modeling.configuration_videollama3 import VideoLlama3Config
from .modeling.modeling_videollama3 import VideoLlama3ForCausalLM
from .processing.image_processing_videollama3 import VideoLlama3ImageProcessor
from .processing.processing_videollama3 import VideoLlama3Processor
from .processing.video_processing_videollama3 import VideoLlama3VideoProcessor

# The special tokens of Qwen2.5 and of the official VideoLLaMA3 tokenizers.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<image>",
    "<|stream_start|>",
    "<|stream_end|>",
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    return fast


def build_random(
    *, seed: int = 0, hidden_size: int = 64, num_hidden_layers: int = 2, max_tokens: int = 2048
) -> tuple[VideoLlama3ForCausalLM, VideoLlama3Processor]:
    """Builds a random model and its processor.

    Args:
        seed: of the weights.
        hidden_size: width of encoder and language model; a multiple of 16.
        num_hidden_layers: of each.
        max_tokens: visual tokens of a request.

    Returns:
        The model in evaluation mode, float32 on the CPU, and the processor.
    """
    tokenizer = byte_tokenizer()
    vocabulary = tokenizer.get_vocab()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoLlama3ForCausalLM(
            VideoLlama3Config(
                text_config={
                    "vocab_size": len(tokenizer),
                    "hidden_size": hidden_size,
                    "intermediate_size": 2 * hidden_size,
                    "num_hidden_layers": num_hidden_layers,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "max_position_embeddings": 32768,
                    "bos_token_id": None,
                    "eos_token_id": vocabulary["<|im_end|>"],
                },
                vision_config={
                    "hidden_size": hidden_size,
                    "intermediate_size": 2 * hidden_size,
                    "num_hidden_layers": num_hidden_layers,
                    "num_attention_heads": 4,
                },
                image_token_id=vocabulary["<|image_pad|>"],
                video_token_id=vocabulary["<|video_pad|>"],
            )
        )
    model.generation_config = GenerationConfig(
        eos_token_id=vocabulary["<|im_end|>"], pad_token_id=vocabulary["<|endoftext|>"], do_sample=False
    )
    processor = VideoLlama3Processor(
        VideoLlama3ImageProcessor(max_tokens=max_tokens), tokenizer, VideoLlama3VideoProcessor(max_tokens=max_tokens)
    )
    return model.eval(), processor
