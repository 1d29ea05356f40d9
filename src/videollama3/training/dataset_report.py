"""What a training set will cost: figures per sample and per packed row, tables, and a picture of distributions.

Samples and the rows that they come from enter; text and a PIL image leave. Reading them is left to
`training_dataset.py`, bytes to `step_memory.py`, the command line to `data_command.py`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .packing import Lengths
from .step_memory import HeldMemory, StepMemory
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


def lengths_of(costs: Sequence[SampleCost]) -> Lengths:
    """What packing reads, int64 (samples, 3): tokens, patches, visual tokens before pruning."""
    return np.array([(cost.tokens, cost.patches, cost.visual_tokens) for cost in costs], dtype=np.int64)


def cost_table(costs: Sequence[SampleCost], memory: StepMemory) -> str:
    """The figures of all samples as text.

    Args:
        costs: at least one.
        memory: of a step of the model that will be trained.
    """
    kinds = collections.Counter(cost.kind for cost in costs)
    lines = [f"{len(costs)} samples: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())]
    lines.append(_table_head("per sample"))
    rows: list[tuple[str, Callable[[SampleCost], float]]] = [
        ("tokens", lambda cost: cost.tokens),
        ("supervised tokens", lambda cost: cost.supervised),
        ("frames and images", lambda cost: cost.frames),
        ("patches", lambda cost: cost.patches),
        ("visual tokens", lambda cost: cost.visual_tokens),
        ("kept visual tokens", lambda cost: cost.kept_tokens),
        ("pixels, MiB", lambda cost: cost.pixel_bytes / _MIB),
        ("layer inputs, MiB", lambda cost: memory.layer_inputs(cost.tokens, cost.patches) / _MIB),
        ("layer at work, MiB", lambda cost: memory.layer_at_work(cost.tokens, cost.patches) / _MIB),
        ("logits, MiB", lambda cost: memory.logits(cost.supervised) / _MIB),
        ("a step of it alone, MiB", lambda cost: _step_bytes([cost], memory) / _MIB),
    ]
    for name, figure in rows:
        lines.append(_table_row(name, [figure(cost) for cost in costs]))
    video = sum(cost.video_tokens for cost in costs)
    pruned = sum(cost.visual_tokens - cost.kept_tokens for cost in costs)
    if video:
        lines.append(f"pruned: {pruned} of {video} tokens of videos, {pruned / video:.1%}")
    lines.append(
        "MiB are estimates for gradient checkpointing, beside weights, gradients and the optimizer's moments "
        "(docs/finetuning.md)."
    )
    return "\n".join(lines)


def rows_table(
    packs: Sequence[Sequence[int]], costs: Sequence[SampleCost], memory: StepMemory, held: HeldMemory | None
) -> str:
    """The figures of packed rows as text, each of which is a step of one process.

    Args:
        packs: numbers of the samples of each row.
        costs: of the samples.
        memory: of a step.
        held: between steps; None where it is not known.
    """
    rows = [[costs[i] for i in pack] for pack in packs]
    steps = [_step_bytes(row, memory) for row in rows]
    lines = [_table_head("per packed row"), _table_row("samples", [len(row) for row in rows])]
    for name, field in (
        ("tokens", "tokens"),
        ("supervised tokens", "supervised"),
        ("patches", "patches"),
        ("visual tokens", "visual_tokens"),
    ):
        lines.append(_table_row(name, [sum(getattr(cost, field) for cost in row) for row in rows]))
    lines.append(_table_row("a step, MiB", [step / _MIB for step in steps]))
    if held is not None:
        parts = ((name, getattr(held, name) / _MIB) for name in ("weights", "gradients", "moments"))
        lines.append("held all the time, MiB: " + ", ".join(f"{name} {size:.0f}" for name, size in parts))
        lines.append(f"together with the largest step: about {(held.whole + max(steps)) / _MIB:.0f} MiB a process")
    return "\n".join(lines)


def _step_bytes(costs: Iterable[SampleCost], memory: StepMemory) -> int:
    """Of a step on samples in one row."""
    costs = list(costs)
    tokens, patches = sum(cost.tokens for cost in costs), sum(cost.patches for cost in costs)
    whole = memory.whole(tokens, patches, sum(cost.supervised for cost in costs))
    return whole + sum(cost.pixel_bytes for cost in costs)


def _table_head(title: str) -> str:
    return f"{title:<26}{'min':>10}{'median':>10}{'p95':>10}{'max':>10}{'sum':>14}"


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


def cost_picture(costs: Sequence[SampleCost], memory: StepMemory) -> Image.Image:
    """Distributions over the samples: tokens, supervised tokens, frames, visual tokens, pruned share, memory.

    Args:
        costs: at least one.
        memory: of a step of the model that will be trained.

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
        ("a step of one sample, MiB", [_step_bytes([cost], memory) / _MIB for cost in costs]),
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
