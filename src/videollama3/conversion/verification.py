"""Compares a converted checkpoint with its source on a generated picture and clip.

Two folders enter, the largest difference of their outputs leaves, or an error. The native side is run by the class
inside transformers, everything else by ours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.models.video_llama_3 import modeling_video_llama_3 as native

from ..modeling.modeling_videollama3 import VideoLlama3ForCausalLM
from ..modeling.vision_encoder_videollama3 import VideoLlama3VisionModel
from ..processing.image_processing_videollama3 import VideoLlama3ImageProcessor
from ..processing.video_processing_videollama3 import VideoLlama3VideoProcessor
from .adapter import Adapter, processor_folder
from .processor_files import load_processor
from .source_checkpoint import read_checkpoint

# Same weights, same inputs, float32: what remains is the order of sums. Tiny twins differ by up to 4e-6 of the largest
# logit between our class and transformers', and by nothing between our own folders; a lost bias moves them by 1e-2.
TOLERANCE = 1e-4


def compare_logits(
    source: str, target: str, *, to: str, whole: bool, dtype: torch.dtype | None, adapter: Adapter | None
) -> float:
    """Runs both sides in float32 on the CPU, one after the other.

    Args:
        source: folder of the source, or of the adapter's base.
        target: folder of the result.
        to: layout of the result.
        whole: whether it is a whole model, not the encoder alone.
        dtype: what weights were converted to; the source's are rounded to it first. None where they were not.
        adapter: what was merged; the reference is then merged by peft.

    Returns:
        The largest absolute difference over the largest absolute output, of logits or of the encoder's features.

    Raises:
        ValueError: for a difference above `TOLERANCE`, or where the processors of both sides differ.
    """
    inputs = _inputs(processor_folder(source, adapter), whole)
    if whole:
        _compare_inputs(inputs, _inputs(target, whole))
    expected = _run(_source_model(source, whole, dtype, adapter), inputs)
    got = _run(_target_model(target, to, whole), inputs)
    difference = float((got - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(
            f"Expected equal outputs of {source!r} and its conversion, up to {TOLERANCE:g} of the largest, got a "
            f"difference of {difference:.2e}: nothing was written."
        )
    return difference


def _inputs(folder: str, whole: bool) -> dict[str, torch.Tensor]:
    """A picture of 9 x 6 patches and a clip of 3 frames, as the folder's own processor prepares them."""
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (126, 84, 3), dtype=np.uint8)
    clip = random.integers(0, 256, (3, 84, 112, 3), dtype=np.uint8)
    processor = load_processor(folder) if whole else None
    if processor is not None:
        content = [
            {"type": "image", "image": picture},
            {"type": "video", "video": clip, "timestamps": [0.0, 1.0, 2.0]},
            {"type": "text", "text": "What is this?"},
        ]
        conversation = [{"role": "user", "content": content}]
        return dict(processor(conversation=conversation, add_generation_prompt=True, return_tensors="pt"))
    image = dict(VideoLlama3ImageProcessor()(picture))
    if not whole:
        return {
            "pixel_values": image["pixel_values"],
            "grid_thw": image["image_grid_thw"],
            "merge_sizes": image["image_merge_sizes"],
        }
    return {**image, **dict(VideoLlama3VideoProcessor()([clip]))}


def _compare_inputs(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> None:
    different = [name for name in {**expected, **got} if not _same(expected.get(name), got.get(name))]
    if different:
        raise ValueError(
            f"Expected the processors of both sides to prepare equal inputs, got different {', '.join(different)}."
        )


def _same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    return first is not None and second is not None and torch.equal(first, second)


def _source_model(folder: str, whole: bool, dtype: torch.dtype | None, adapter: Adapter | None) -> Any:
    model_class = VideoLlama3ForCausalLM if whole else VideoLlama3VisionModel
    model = model_class.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise ValueError("Expected peft for verifying a merged adapter, it is not installed.") from error
        model = PeftModel.from_pretrained(model, adapter.folder).merge_and_unload()
        if dtype is None:
            # Merged weights are stored as those of the base are.
            stored = read_checkpoint(folder).tensors
            for name, weight in model.named_parameters():
                if name in stored:
                    weight.data = weight.data.to(stored[name].dtype).float()
    if dtype is not None:
        # Weights only: `model.to` would also round rotary frequencies.
        for weight in model.parameters():
            weight.data = weight.data.to(dtype).float()
    return model


def _target_model(folder: str, to: str, whole: bool) -> Any:
    ours = VideoLlama3ForCausalLM if whole else VideoLlama3VisionModel
    theirs = native.VideoLlama3ForConditionalGeneration if whole else native.VideoLlama3VisionModel
    return (theirs if to == "native" else ours).from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def _run(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    inputs = dict(inputs)
    if "input_ids" not in inputs and hasattr(model.config, "text_config"):
        inputs.update(_ids(model.config, inputs))
    output = model(**inputs)
    result: torch.Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return result


def _ids(config: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Placeholders among a few ids, for a folder without a tokenizer."""
    merges = inputs["image_merge_sizes"]
    image_tokens = int((inputs["image_grid_thw"].prod(dim=1) // merges**2).sum())
    video_tokens = int(inputs["video_compression_mask"].sum())
    ids = torch.tensor(
        [[1, 2, *[config.image_token_id] * image_tokens, 3, *[config.video_token_id] * video_tokens, 4, 5]]
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
