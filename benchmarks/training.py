"""What does training on mixed lengths cost: packed rows, padded batches, and transformers' own class padded?

    python benchmarks/training.py

One update (forward, backward, clipping, AdamW) over the same samples with the same weights, gradient checkpointing
and all modules trained, as in the recipes; tiny models in float32, 0.5B widths (2 LLM layers of 24, 1 of 12 of a
SigLIP-base encoder: read ratios) in bfloat16 on float32 weights. `packed`: rows without padding as
`PackedBatchSampler` plans them; `padded`: our model, batches in random order of as many samples as a packed row has
on average, so that all sides make equally many passes; `native`: the same batches through `video_llama_3`. Losses
and gradient norms must agree. Every measurement is a process of its own; sides take turns (A B C, C B A), at 0.5B
width `native` in the first round only.

The mix, in sixteenths: 6 text-only, 5 one picture, 4 short clips, 1 long clip (`KINDS`); lengths grow with the
scale, at 16 a row has the 16384 tokens of the recipes. Pixels are the same everywhere. "step MiB" is the highest
resident memory above weights, gradients and moments, "whole" with these. `floor` is what an update costs that has
nothing to do: as many passes over one short text each. "pairs" are those of tokens in one row, first of the rows as
they are, which is what a mask of all pairs scores, then of the samples alone, which is what packed rows score here.

What is counted at the end is the forward pass in matrix products and attention within samples, for models in full
depth and long rows: neither hardware nor memory traffic.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
import statistics
import sys
from typing import Any

import common
import models

SIDES = ("packed", "padded", "native")
FIGURES = ("wall_seconds", "cpu_seconds", "peak_mib", "whole_mib")
ROW_TOKENS = 1024  # of a packed row, at scale 1
HEADER_TOKENS = 7  # "Time 12.0s:" and a comma, before every frame of a video
SUPERVISED = 24  # at most so many tokens of a text or answer are trained, at scale 1
FULL_SCALE = 16
MERGE = 2
SIGLIP_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
QWEN_05B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "num_hidden_layers": 24,
    "vocab_size": 151936,
}
FULL_DEPTH = {
    "0.5B, SigLIP-base encoder": (QWEN_05B, SIGLIP_BASE),
    "0.5B, so400m encoder": (QWEN_05B, models.SO400M),
    "2B": (models.QWEN_2B, models.SO400M),
    "7B": (models.QWEN_7B, models.SO400M),
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """Samples of one kind; ranges at scale 1, drawn log-uniformly.

    Attributes:
        name: of the kind.
        share: sixteenths of the mix.
        text: tokens of question and answer.
        frames: of a video, growing with the root of the scale; (1, 1) for a picture, (0, 0) for none.
        frame_tokens: visual tokens of a picture; of a frame of a video, growing with the root.
        kept: share of the visual tokens of later frames that pruning keeps.
    """

    name: str
    share: int
    text: tuple[int, int]
    frames: tuple[int, int] = (0, 0)
    frame_tokens: tuple[int, int] = (0, 0)
    kept: tuple[float, float] = (1.0, 1.0)


KINDS = (
    Kind("text", 6, (16, 128)),
    Kind("picture", 5, (8, 48), (1, 1), (16, 128)),
    Kind("short clip", 4, (8, 48), (4, 8), (12, 24), (0.6, 0.95)),
    Kind("long clip", 1, (16, 48), (24, 36), (20, 24), (0.5, 0.8)),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its data.

    Attributes:
        text: sizes of the language model.
        vision: sizes of the encoder.
        scale: of the samples' lengths.
        samples: of the update, a multiple of 16.
        repeats: of the update in each process; the first is not timed where there are several (kernels for new
            shapes are compiled in it), memory is always the first's.
        bfloat16: whether to compute in it.
        once: sides that are measured in the first round only.
    """

    text: dict[str, int]
    vision: dict[str, int]
    scale: float
    samples: int
    repeats: int
    bfloat16: bool = False
    once: tuple[str, ...] = ()


def cases(options: Any) -> dict[str, Case]:
    """Tiny models with many long samples, and real widths in few layers with few short ones."""
    if options.toy:
        return {"tiny": Case(models.TOY_TEXT, models.TOY_VISION, 0.5, 16, 2)}
    base = {**SIGLIP_BASE, "num_hidden_layers": 1}
    text = {**QWEN_05B, "num_hidden_layers": 2}
    return {
        "tiny": Case(models.TOY_TEXT, models.TOY_VISION, options.tiny_scale, 64, 2),
        "0.5B width": Case(text, base, options.scale, 16, 1, bfloat16=True, once=("native",)),
    }


def main() -> None:
    parser = common.common_parser(__doc__ or "", rounds=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the lengths at 0.5B width (default 1)")
    parser.add_argument("--tiny-scale", type=float, default=2.0, help="of the lengths at tiny width (default 2)")
    options = parser.parse_args()
    if options.worker:
        common.answer(work(json.loads(options.worker)))
        return
    environment = common.environment()
    chosen = cases(options)
    results = {name: run_case(name, case, 1 if options.toy else options.rounds) for name, case in chosen.items()}
    plans = draw_mix(256 if options.toy else 4096, FULL_SCALE)
    padding = padding_shares(plans)
    counted = {name: counted_ratios(plans, text, vision) for name, (text, vision) in FULL_DEPTH.items()}
    print()
    show(results, padding, counted)
    record = {
        "question": (__doc__ or "").splitlines()[0],
        "command": common.command_line(__file__),
        **environment,
        "setting": {
            "mix": [dataclasses.asdict(kind) for kind in KINDS],
            "row_tokens_at_scale_1": ROW_TOKENS,
            "threads": os.environ.get("OMP_NUM_THREADS", "as torch chooses"),
            "attention": "sdpa",
            "gradient_checkpointing": True,
            "optimizer": "AdamW, fused",
        },
        "cases": results,
        "padding_by_samples_per_batch": padding,
        "counted_at_full_depth": counted,
    }
    common.write_json("training_toy" if options.toy else "training", record, folder=options.output)


def run_case(name: str, case: Case, rounds: int) -> dict[str, Any]:
    """Sides in turns; ratios are of pairs of one round."""
    answers: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES[:: 1 if number % 2 == 0 else -1]:
            if number and side in case.once:
                continue
            print(f"{name}, round {number + 1}: {side}", file=sys.stderr)
            answers[side].append(common.run_fresh(__file__, {**dataclasses.asdict(case), "side": side}))
    check_equal(answers, bfloat16=case.bfloat16)
    floor = common.run_fresh(__file__, {**dataclasses.asdict(case), "side": "floor"})
    values = (
        "loss",
        "gradient_norm",
        "positions",
        "tokens",
        "passes",
        "supervised",
        "patches",
        "pairs",
        "pairs_of_samples",
    )
    sides = {
        side: {
            **{figure: common.middle([one[figure] for one in several]) for figure in FIGURES},
            **{value: several[0][value] for value in values},
            "samples_per_second": case.samples / statistics.median(one["wall_seconds"] for one in several),
            "samples_per_cpu_second": case.samples / statistics.median(one["cpu_seconds"] for one in several),
        }
        for side, several in answers.items()
    }
    ratios = {
        f"packed / {peer}": {
            "samples_per_second": paired(answers[peer], answers["packed"], "wall_seconds"),
            "samples_per_cpu_second": paired(answers[peer], answers["packed"], "cpu_seconds"),
            "peak_mib": paired(answers["packed"], answers[peer], "peak_mib"),
            "whole_mib": paired(answers["packed"], answers[peer], "whole_mib"),
        }
        for peer in SIDES[1:]
    }
    return {**dataclasses.asdict(case), "sides": sides, "ratios": ratios, "floor": floor}


def paired(above: list[dict[str, float]], below: list[dict[str, float]], figure: str) -> dict[str, float]:
    """Quotients round by round, as far as both sides took part."""
    return common.middle([one[figure] / max(other[figure], 1e-9) for one, other in zip(above, below, strict=False)])


def check_equal(answers: dict[str, list[dict[str, float]]], *, bfloat16: bool) -> None:
    """Raises where sides did not compute the same.

    In bfloat16 rows of another shape round differently: measured 1e-4 apart in the loss and 3e-4 in the norm.
    """
    tolerances = {"loss": 1e-3 if bfloat16 else 1e-5, "gradient_norm": 1e-2 if bfloat16 else 1e-4, "supervised": 0}
    first = answers[SIDES[0]][0]
    for side, several in answers.items():
        for one, (value, tolerance) in itertools.product(several, tolerances.items()):
            if not math.isclose(one[value], first[value], rel_tol=tolerance):
                raise RuntimeError(f"Expected {value} of {side} as of {SIDES[0]}: {first[value]}, got {one[value]}.")


def show(results: dict[str, Any], padding: dict[str, float], counted: dict[str, Any]) -> None:
    """Prints the figures, then the ratios, then what can be counted."""
    header = ["case", "side", "tokens in", "positions", "pairs (M)", "wall s (min-max)", "CPU s (min-max)"]
    rows = []
    for name, case in results.items():
        figures = {figure: common.middle([case["floor"][figure]]) for figure in FIGURES}
        for side, values in {**case["sides"], "floor": {**case["floor"], **figures}}.items():
            rows.append(
                [
                    name,
                    side,
                    *(f"{values[key]:.0f}" for key in ("tokens", "positions")),
                    f"{values['pairs'] / 1e6:.2f} ({values['pairs_of_samples'] / 1e6:.2f})",
                    *(common.spread(values[key]) for key in ("wall_seconds", "cpu_seconds")),
                    *(f"{values[key]['median']:.0f}" for key in ("peak_mib", "whole_mib")),
                    f"{values['loss']:.4f}",
                ]
            )
    common.print_table([*header, "step MiB", "whole MiB", "loss"], rows)
    print()
    common.print_table(
        ["case", "ratio", "samples/s", "samples/CPU s", "step memory", "with weights and AdamW"],
        [
            [name, pair, *(common.spread(ratio[figure]) for figure in ratio)]
            for name, case in results.items()
            for pair, ratio in case["ratios"].items()
        ],
    )
    print("\nshare of padding in random batches at scale 16, by samples per batch:")
    print(", ".join(f"{size}: {share:.2f}" for size, share in padding.items()))
    print("\ncounted at scale 16 in full depth, operations of padded / packed, as many passes:")
    common.print_table(
        ["model", "encoder's share", "padded", "padded, grouped by length", "native"],
        [[name, *(f"{value:.2f}" for value in values.values())] for name, values in counted.items()],
    )


# ---------------------------------------------------------------------------------------------- the mix


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sample before it has values.

    Attributes:
        text: tokens of question and answer.
        supervised: of these, at the end, are trained.
        frames: visual tokens of each frame before pruning; none for text.
        grid: rows and columns of a frame, in patches.
        kept: visual tokens kept of each frame.
    """

    text: int
    supervised: int
    frames: int
    grid: tuple[int, int]
    kept: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the row after pruning."""
        headers = HEADER_TOKENS * self.frames if self.frames > 1 else 0
        return self.text + headers + sum(self.kept)

    @property
    def patches(self) -> int:
        """Patches that the encoder sees."""
        return self.frames * self.grid[0] * self.grid[1]


def draw_mix(count: int, scale: float, seed: int = 0) -> list[Plan]:
    """`count` samples (a multiple of 16) of the mix, in random order."""
    generator = random.Random(seed)
    kinds = [kind for kind in KINDS for _ in range(kind.share * count // 16)]
    generator.shuffle(kinds)
    return [draw(kind, scale, generator) for kind in kinds]


def draw(kind: Kind, scale: float, generator: random.Random) -> Plan:
    """One sample."""

    def between(bounds: tuple[float, float], factor: float = 1.0) -> int:
        low, high = (math.log(bound * factor) for bound in bounds)
        return max(2, round(math.exp(generator.uniform(low, high))))

    text = between(kind.text, scale)
    supervised = min(text // 2, max(1, round(SUPERVISED * scale)))
    if kind.frames == (0, 0):
        return Plan(text, supervised, 0, (0, 0), ())
    is_video = kind.frames != (1, 1)
    # A longer video has more frames and larger ones.
    frames = between(kind.frames, math.sqrt(scale)) if is_video else 1
    rows, columns = as_grid(between(kind.frame_tokens, math.sqrt(scale) if is_video else scale))
    per_frame = rows * columns
    share = generator.uniform(*kind.kept)
    later = [
        min(per_frame, max(1, round(per_frame * generator.uniform(share - 0.1, share + 0.1)))) for _ in range(frames)
    ]
    return Plan(text, supervised, frames, (rows * MERGE, columns * MERGE), (per_frame, *later[1:]))


def as_grid(tokens: int) -> tuple[int, int]:
    """Rows and columns of about so many tokens, wider than high."""
    rows = max(1, round(math.sqrt(tokens * 3 / 4)))
    return rows, max(1, round(tokens / rows))


def packed_rows(plans: list[Plan], scale: float) -> list[list[int]]:
    """Sample numbers of each packed row."""
    from videollama3.training.packing import PackedBatchSampler

    lengths = [[plan.tokens, plan.patches, plan.patches // MERGE**2] for plan in plans]
    return list(PackedBatchSampler(lengths, max_length=round(ROW_TOKENS * scale)))


def padded_rows(plans: list[Plan], num_batches: int, *, grouped: bool = False) -> list[list[int]]:
    """Sample numbers of each padded batch, in random order, or longest first.

    Sorting is done within 50 batches, as transformers' `group_by_length` does.
    """
    size = math.ceil(len(plans) / num_batches)
    order = list(range(len(plans)))
    random.Random(1).shuffle(order)
    if grouped:
        window = 50 * size
        windows = [order[start : start + window] for start in range(0, len(order), window)]
        order = [i for part in windows for i in sorted(part, key=lambda i: -plans[i].tokens)]
    return [order[start : start + size] for start in range(0, len(order), size)]


def padding_shares(plans: list[Plan]) -> dict[str, float]:
    """Positions without a token, by the samples of a batch; the last, of batches grouped by length."""
    tokens = sum(plan.tokens for plan in plans)
    shares = {
        str(size): 1 - tokens / positions(plans, padded_rows(plans, len(plans) // size)) for size in (2, 4, 8, 16)
    }
    grouped = padded_rows(plans, len(plans) // 8, grouped=True)
    return {**shares, "8, grouped by length": 1 - tokens / positions(plans, grouped)}


def counted_ratios(plans: list[Plan], text: dict[str, int], vision: dict[str, int]) -> dict[str, float]:
    """Operations of the forward pass: matrix products, and attention within a sample or a padded one."""
    num_passes = len(packed_rows(plans, FULL_SCALE))
    supervised = sum(plan.supervised for plan in plans)
    head = 2.0 * text["hidden_size"] * text["vocab_size"]
    encoder = models.vision_flops(vision, [(plan.frames, *plan.grid) for plan in plans])
    batches, by_length = (padded_rows(plans, num_passes, grouped=grouped) for grouped in (False, True))

    def layers(length: int) -> float:
        return models.text_flops(text, length) - head  # which is counted for one position

    def padded(several: list[list[int]], num_logits: int) -> float:
        return encoder + num_logits * head + sum(len(batch) * layers(longest(plans, batch)) for batch in several)

    packed = encoder + supervised * head + sum(layers(plan.tokens) for plan in plans)
    return {
        "encoder_share_of_packed": encoder / packed,
        "padded": padded(batches, supervised) / packed,
        "padded_grouped_by_length": padded(by_length, supervised) / packed,
        "native": padded(batches, positions(plans, batches)) / packed,
    }


def longest(plans: list[Plan], batch: list[int]) -> int:
    """Tokens of the longest sample."""
    return max(plans[i].tokens for i in batch)


def positions(plans: list[Plan], batches: list[list[int]]) -> int:
    """Positions of padded batches."""
    return sum(len(batch) * longest(plans, batch) for batch in batches)


# ---------------------------------------------------------------------------------------------- workers


def work(spec: dict[str, Any]) -> dict[str, float]:
    """One process: one update of one side."""
    from videollama3.training.collator import PackingCollator, PaddingCollator

    vocabulary = spec["text"]["vocab_size"]
    plans = draw_mix(spec["samples"], spec["scale"])
    samples = [sample(plan, number, vocabulary) for number, plan in enumerate(plans)]
    rows = packed_rows(plans, spec["scale"])
    shortest = min((i for i, plan in enumerate(plans) if not plan.frames), key=lambda i: plans[i].tokens)
    if spec["side"] == "floor":
        batches = [[shortest]] * len(rows)
    else:
        batches = rows if spec["side"] == "packed" else padded_rows(plans, len(rows))
    kind: Any = PackingCollator if spec["side"] == "packed" else PaddingCollator
    collate = kind(image_token_id=vocabulary - 2, video_token_id=vocabulary - 1, dummy_frame=False)
    model = build(spec)
    update = Update(model, bfloat16=spec["bfloat16"])
    media = next(i for i, plan in enumerate(plans) if plan.frames)
    update([collate([samples[shortest], samples[media]])])  # lazy imports, gradients and moments
    inputs = [collate([samples[i] for i in batch]) for batch in batches]
    shapes = [batch["input_ids"].shape for batch in inputs]
    seen = [plans[i] for batch in batches for i in batch]
    values: dict[str, float] = {}
    cost = common.measure(lambda: values.update(update(inputs)), repeats=spec["repeats"])
    state_mib = 16 * sum(parameter.numel() for parameter in model.parameters()) / 2**20
    return {
        **values,
        "wall_seconds": statistics.median(cost.wall_seconds[1:] or cost.wall_seconds),
        "cpu_seconds": statistics.median(cost.cpu_seconds[1:] or cost.cpu_seconds),
        "peak_mib": cost.peak_mib,
        "whole_mib": cost.peak_mib + state_mib,
        "tokens": sum(plan.tokens for plan in seen),
        "patches": sum(plan.patches for plan in seen),
        "supervised": sum(plan.supervised for plan in seen),
        "positions": sum(shape[0] * shape[1] for shape in shapes),
        "pairs": sum(shape[0] * shape[1] ** 2 for shape in shapes),
        "pairs_of_samples": sum(plan.tokens**2 for plan in seen),
        "passes": len(inputs),
    }


def sample(plan: Plan, number: int, vocabulary: int) -> dict[str, Any]:
    """A sample's tensors, as a dataset would give them; values are random."""
    import torch

    generator = torch.Generator().manual_seed(number)

    def words(count: int) -> Any:
        return torch.randint(0, vocabulary - 8, (count,), generator=generator)

    question, answer = words(plan.text - plan.supervised), words(plan.supervised)
    media: dict[str, Any] = {}
    parts = [question]
    if plan.frames:
        name = "video" if plan.frames > 1 else "image"
        pixels = torch.rand((plan.patches, models.PATCH_VALUES), generator=generator) * 2 - 1
        media["pixel_values_videos" if name == "video" else "pixel_values"] = pixels
        media[f"{name}_grid_thw"] = torch.tensor([[plan.frames, *plan.grid]])
        media[f"{name}_merge_sizes"] = torch.tensor([MERGE])
    if plan.frames > 1:
        per_frame = plan.kept[0]
        keep = torch.arange(per_frame) < torch.tensor(plan.kept)[:, None]
        media["video_compression_mask"] = keep.flatten()
        parts = [part for kept in plan.kept for part in (words(HEADER_TOKENS), torch.full((kept,), vocabulary - 1))]
        parts.append(question)
    elif plan.frames:
        parts = [torch.full((plan.kept[0],), vocabulary - 2), question]
    ids = torch.cat([*parts, answer])
    labels = torch.full_like(ids, -100)
    labels[len(ids) - len(answer) :] = answer
    return {"input_ids": ids, "labels": labels, **media}


def build(spec: dict[str, Any]) -> Any:
    """A model in training mode; all sides have the same weights."""
    import torch

    family = "native" if spec["side"] == "native" else "ours"
    vision = {**spec["vision"], "patch_size": 14}
    model = models.build_model(family, spec["text"], vision, device="cpu", dtype=torch.float32)
    # The sides draw their weights in different orders.
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model.train()


class Update:
    """Forward and backward of every batch, clipping and a step of AdamW, as a trainer does them."""

    def __init__(self, model: Any, *, bfloat16: bool) -> None:
        import torch

        self.model, self.bfloat16 = model, bfloat16
        # A rate of 0 costs the same and leaves every repeat the same.
        # Fused: the other kinds need temporaries of a parameter's size or more, on every side alike.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    def __call__(self, batches: list[dict[str, Any]]) -> dict[str, float]:
        """Loss per supervised token and gradient norm, before the step."""
        import torch

        # Gradients belong to the model, not to the step.
        self.optimizer.zero_grad(set_to_none=False)
        counts = [int((batch["labels"] != -100).sum()) for batch in batches]
        loss = 0.0
        for batch, count in zip(batches, counts, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                part = self.model(**batch, use_cache=False).loss * (count / sum(counts))
            part.backward()
            loss += float(part.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return {"loss": loss, "gradient_norm": float(norm)}


if __name__ == "__main__":
    main()
