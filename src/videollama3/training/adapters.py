"""Low-rank adapters through peft: put on, and merged into the weights they adapt.

A model and a recipe's section enter, a peft model leaves, and after training a folder of plain weights. Which
parameters learn how fast is left to `trainer.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .recipe import AdapterRecipe

# The projector is trained in full, the head decides in full precision, the encoder is small. Full names, as
# transformers compares them from the start: "projector" alone fits nothing.
NOT_QUANTIZED = ["model.vision_model", "model.projector", "lm_head"]
_LLM = r"language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
_ENCODER = r"vision_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"


# What peft's form for a model card says where nobody has filled it in.
_EMPTY_FIELD = "[More Information Needed]"


def add_adapter(model: Any, adapter: AdapterRecipe, *, train_projector: bool) -> Any:
    """Puts adapters on the linear layers of the language model, and of the encoder when asked.

    Args:
        model: a `VideoLlama3ForCausalLM`.
        adapter: its settings.
        train_projector: whether the projector is trained in full beside the adapters.

    Raises:
        ImportError: without peft.
    """
    try:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    except ImportError as error:
        raise ImportError("Expected peft for a recipe with an adapter: pip install 'videollama3[train]'.") from error
    if adapter.four_bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = _LLM if adapter.targets == "llm" else f"({_LLM}|{_ENCODER})"
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=rf".*{targets}",
        modules_to_save=["projector"] if train_projector else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def four_bit_config() -> Any:
    """How QLoRA loads frozen weights: 4-bit NormalFloat, computed in bfloat16; needs bitsandbytes and CUDA."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=NOT_QUANTIZED,
    )


def merge_adapter(base: Any, adapter: str | os.PathLike[str], *, dtype: torch.dtype) -> Any:
    """Adds a trained adapter to the weights that it was trained on.

    Args:
        base: a `VideoLlama3ForCausalLM` with those weights in float32; it is changed.
        adapter: folder of the adapter.
        dtype: of the merged weights; the sum is computed in float32.

    Returns:
        A plain `VideoLlama3ForCausalLM`.
    """
    from peft import PeftModel

    return PeftModel.from_pretrained(base, adapter).merge_and_unload().to(dtype)


def remove_empty_card(folder: Path) -> None:
    """Removes the form that peft leaves as `README.md`, unless somebody has filled it in.

    Args:
        folder: of an adapter; need not exist.
    """
    card = folder / "README.md"
    if card.is_file() and _EMPTY_FIELD in card.read_text(encoding="utf-8"):
        card.unlink()
