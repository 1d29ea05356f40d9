"""What a training set will cost: figures per sample, a table, and a picture of their distributions.

Samples and the rows that they come from enter; text and a PIL image leave. Reading them is left to
`training_dataset.py`, the command line to `data_command.py`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .supervised_samples import IGNORED

_PANEL_WIDTH, _PANEL_HEIGHT, _MARGIN, _BINS = 460, 260, 40, 32
_BAR, _INK = (70, 110, 180), (40, 40, 40)
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class SampleCost:
    """Figures of one sample.

    Attributes:
        kind: of its row.
        tokens: of the sequence, after pruning.
        supervised: tokens that are learnt.
        frames: pictures, images included.
        patches: that the vision encoder sees.
        visual_tokens: before pruning.
        kept_tokens: visual tokens after pruning.
        video_tokens: visual tokens of videos before pruning; images are never pruned.
        pixel_bytes: of the pixel tensors.
    """

    kind: str
    tokens: int
    supervised: int
    frames: int
    patches: int
    visual_tokens: int
    kept_tokens: int
    video_tokens: int
    pixel_bytes: int

    @property
    def pruned_share(self) -> float:
        """Share of the videos' tokens that pruning takes away."""
        return (self.visual_tokens - self.kept_tokens) / self.video_tokens if self.video_tokens else 0.0


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """What of a model decides the memory of a training step.

    Attributes:
        hidden_size: of the language model.
        num_layers: of the language model.
        vision_hidden_size: of the encoder.
        vision_num_layers: of the encoder.
        vocab_size: of the language model.
    """

    hidden_size: int
    num_layers: int
    vision_hidden_size: int
    vision_num_layers: int
    vocab_size: int

    @classmethod
    def of(cls, config: Any) -> ModelSize:
        """From a `VideoLlama3Config`."""
        text, vision = config.text_config, config.vision_config
        return cls(
            text.hidden_size, text.num_hidden_layers, vision.hidden_size, vision.num_hidden_layers, text.vocab_size
        )

    def checkpoint_bytes(self, cost: SampleCost) -> int:
        """Inputs of all layers, which gradient checkpointing keeps for the way back, in bf16."""
        language = cost.tokens * self.hidden_size * self.num_layers
        vision = cost.patches * self.vision_hidden_size * self.vision_num_layers
        return 2 * (language + vision)

    def logits_bytes(self, cost: SampleCost) -> int:
        """Logits where there are labels, and their gradient, in float32."""
        return 2 * 4 * cost.supervised * self.vocab_size


def measure_cost(sample: dict[str, torch.Tensor], kind: str) -> SampleCost:
    """Figures of one sample of a `TrainingDataset`."""
    frames = patches = visual = video = pixel_bytes = 0
    for name, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels not in sample:
            continue
        grids = sample[f"{name}_grid_thw"]
        tokens = int((grids.prod(dim=1) // sample[f"{name}_merge_sizes"] ** 2).sum())
        frames += int(grids[:, 0].sum())
        patches += len(sample[pixels])
        visual += tokens
        video += tokens if name == "video" else 0
        pixel_bytes += sample[pixels].nbytes
    mask = sample.get("video_compression_mask")
    pruned = 0 if mask is None else int((~mask).sum())
    supervised = int((sample["labels"] != IGNORED).sum())
    return SampleCost(
        kind=kind,
        tokens=len(sample["input_ids"]),
        supervised=supervised,
        frames=frames,
        patches=patches,
        visual_tokens=visual,
        kept_tokens=visual - pruned,
        video_tokens=video,
        pixel_bytes=pixel_bytes,
    )


def cost_table(costs: Sequence[SampleCost], size: ModelSize) -> str:
    """The figures of all samples as text.

    Args:
        costs: at least one.
        size: of the model that will be trained.
    """
    kinds = collections.Counter(cost.kind for cost in costs)
    lines = [f"{len(costs)} samples: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())]
    lines.append(f"{'per sample':<26}{'min':>10}{'median':>10}{'p95':>10}{'max':>10}{'sum':>14}")
    rows: list[tuple[str, Callable[[SampleCost], float]]] = [
        ("tokens", lambda cost: cost.tokens),
        ("supervised tokens", lambda cost: cost.supervised),
        ("frames and images", lambda cost: cost.frames),
        ("patches", lambda cost: cost.patches),
        ("visual tokens", lambda cost: cost.visual_tokens),
        ("kept visual tokens", lambda cost: cost.kept_tokens),
        ("pixels, MiB", lambda cost: cost.pixel_bytes / _MIB),
        ("layer inputs, MiB", lambda cost: size.checkpoint_bytes(cost) / _MIB),
        ("logits, MiB", lambda cost: size.logits_bytes(cost) / _MIB),
    ]
    for name, figure in rows:
        lines.append(_table_row(name, [figure(cost) for cost in costs]))
    video = sum(cost.video_tokens for cost in costs)
    pruned = sum(cost.visual_tokens - cost.kept_tokens for cost in costs)
    if video:
        lines.append(f"pruned: {pruned} of {video} tokens of videos, {pruned / video:.1%}")
    lines += [
        "pixels: the tensors' own bytes; layer inputs (kept by gradient checkpointing, bf16): 2 B x (tokens x "
        f"{size.hidden_size} x {size.num_layers} layers + patches x {size.vision_hidden_size} x "
        f"{size.vision_num_layers} layers);",
        f"logits with their gradient: 2 x 4 B x supervised tokens x {size.vocab_size}. A step also holds weights, "
        "gradients, the optimizer and one layer at work.",
    ]
    return "\n".join(lines)


def _table_row(name: str, values: Sequence[float]) -> str:
    whole = all(float(value).is_integer() for value in values)
    shown = [
        min(values),
        float(np.percentile(values, 50)),
        float(np.percentile(values, 95)),
        max(values),
        float(sum(values)),
    ]
    texts = [f"{value:.0f}" if whole else f"{value:.2f}" for value in shown]
    return f"{name:<26}" + "".join(f"{text:>10}" for text in texts[:4]) + f"{texts[4]:>14}"


def cost_picture(costs: Sequence[SampleCost], size: ModelSize) -> Image.Image:
    """Distributions over the samples: tokens, supervised tokens, frames, visual tokens, pruned share, memory.

    Args:
        costs: at least one.
        size: of the model that will be trained.

    Returns:
        An RGB image of six histograms.
    """
    videos = [cost for cost in costs if cost.video_tokens]
    panels: list[tuple[str, Sequence[float]]] = [
        ("tokens", [cost.tokens for cost in costs]),
        ("supervised tokens", [cost.supervised for cost in costs]),
        ("frames and images", [cost.frames for cost in costs]),
        ("kept visual tokens", [cost.kept_tokens for cost in costs]),
        ("pruned share of videos, %", [100 * cost.pruned_share for cost in videos]),
        (
            "pixels, layer inputs and logits, MiB",
            [(cost.pixel_bytes + size.checkpoint_bytes(cost) + size.logits_bytes(cost)) / _MIB for cost in costs],
        ),
    ]
    sheet = Image.new("RGB", (2 * _PANEL_WIDTH, 3 * _PANEL_HEIGHT), "white")
    for i, (title, values) in enumerate(panels):
        sheet.paste(_histogram(title, values), (i % 2 * _PANEL_WIDTH, i // 2 * _PANEL_HEIGHT))
    return sheet


def _histogram(title: str, values: Sequence[float]) -> Image.Image:
    panel = Image.new("RGB", (_PANEL_WIDTH, _PANEL_HEIGHT), "white")
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default()
    draw.text((_MARGIN, 10), f"{title} ({len(values)} samples)", fill=_INK, font=font)
    left, right, top, bottom = _MARGIN, _PANEL_WIDTH - 20, 34, _PANEL_HEIGHT - 34
    draw.line([(left, bottom), (right, bottom)], fill=_INK)
    if not values:
        return panel
    counts, edges = np.histogram(values, bins=_BINS, range=(0, max(values) or 1))
    step = (right - left) / len(counts)
    for i, count in enumerate(counts.tolist()):
        if count:
            height = max(1, round((bottom - top) * count / counts.max()))
            box = (round(left + i * step), bottom - height, round(left + (i + 1) * step) - 2, bottom - 1)
            draw.rectangle(box, fill=_BAR)
    draw.text((left, bottom + 6), f"{edges[0]:.4g}", fill=_INK, font=font)
    draw.text((right, bottom + 6), f"{edges[-1]:.4g}", fill=_INK, font=font, anchor="ra")
    draw.text((6, top), f"{counts.max()}", fill=_INK, font=font)
    return panel
