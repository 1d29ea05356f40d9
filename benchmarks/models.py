"""Models of the released sizes with random weights, ours and transformers' own, for the benchmarks that need both.

A size and a device enter, a model in inference mode leaves; what is measured on it is left to the scripts.
"""

from __future__ import annotations

import importlib
from typing import Any

SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}
QWEN_2B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "num_hidden_layers": 28,
    "vocab_size": 151936,
}
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "vocab_size": 152064,
}
TOY_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
TOY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 151936 // 64,
}
PATCH_VALUES = 588


def vision_flops(vision: dict[str, int], grids: list[tuple[int, int, int]]) -> float:
    """Floating point operations of one forward pass: matrix products and attention, two per multiply-add."""
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    total = 0.0
    for frames, rows, columns in grids:
        patches, segment = frames * rows * columns, rows * columns
        per_layer = patches * (4 * width**2 + 2 * width * inner) + 2 * patches * segment * width
        total += 2 * (vision["num_hidden_layers"] * per_layer + patches * PATCH_VALUES * width)
    return total


def text_flops(text: dict[str, int], tokens: int) -> float:
    """Of a causal prefill, logits of one position."""
    width, inner = text["hidden_size"], text["intermediate_size"]
    key_width = width // text["num_attention_heads"] * text["num_key_value_heads"]
    per_layer = tokens * (2 * width**2 + 2 * width * key_width + 3 * width * inner) + tokens**2 * width
    return 2.0 * (text["num_hidden_layers"] * per_layer + width * text["vocab_size"])


def build_encoder(side: str, vision: dict[str, int], *, device: str, dtype: Any, attention: str | None = None) -> Any:
    """`ours` or `native`; without `attention` the default of each."""
    import torch

    options = {} if attention is None else {"attn_implementation": attention}
    with torch.device(device):
        torch.manual_seed(0)
        if side == "ours":
            import videollama3

            config = videollama3.VideoLlama3VisionConfig(patch_size=14, **vision, **options)
            model: Any = videollama3.VideoLlama3VisionModel(config)
        else:
            configuration, modeling = _native()
            config = configuration.VideoLlama3VisionConfig(patch_size=14, **vision, **options)
            model = modeling.VideoLlama3VisionModel(config)
    return model.to(dtype).eval()


def build_model(
    side: str, text: dict[str, int], vision: dict[str, int], *, device: str, dtype: Any, attention: str | None = None
) -> Any:
    """The whole model, weights created in `dtype` on `device`; without `attention` the default of each side."""
    import torch

    options = {} if attention is None else {"attn_implementation": attention}

    ids = {"image_token_id": text["vocab_size"] - 2, "video_token_id": text["vocab_size"] - 1}
    # No end of text: every answer has the length that is asked for.
    text = {**text, "max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None}
    if side == "ours":
        import videollama3

        config: Any = videollama3.VideoLlama3Config(text_config=text, vision_config=vision, **ids)
        kind: Any = videollama3.VideoLlama3ForCausalLM
    else:
        configuration, modeling = _native()
        config = configuration.VideoLlama3Config(
            text_config={**text, "model_type": "qwen2"}, vision_config=vision, tie_word_embeddings=False, **ids
        )
        kind = modeling.VideoLlama3ForConditionalGeneration
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        torch.manual_seed(0)
        model = kind._from_config(config, **options)
    torch.set_default_dtype(default)
    return model.eval()


def patches(grids: list[tuple[int, int, int]], merge: int, *, device: str) -> tuple[Any, Any, Any]:
    """Random normalised patches, their grids and merge sizes."""
    import torch

    generator = torch.Generator().manual_seed(1)
    count = sum(frames * rows * columns for frames, rows, columns in grids)
    pixels = torch.rand((count, PATCH_VALUES), generator=generator) * 2 - 1
    merges = torch.full((len(grids),), merge)
    return pixels.to(device), torch.tensor(grids).to(device), merges.to(device)


def _native() -> tuple[Any, Any]:
    base = "transformers.models.video_llama_3"
    return (
        importlib.import_module(f"{base}.configuration_video_llama_3"),
        importlib.import_module(f"{base}.modeling_video_llama_3"),
    )
