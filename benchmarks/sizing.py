"""How many GPUs for a million one-minute clips a day? Arithmetic from stated inputs; nothing is measured here.

    python benchmarks/sizing.py

Sizes of the models, of a clip and of its request are computed. What a card does per second is assumed until somebody
has measured it: give `--encoder-us`, `--prefill-us` and `--step-ms` from a card, and the figures that rest on them
follow. What is printed stands in `docs/serving.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import textwrap
from typing import Any

import models

SECONDS_PER_DAY = 86_400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the arithmetic starts from; the metadata of each says where its value comes from.

    Attributes are described in `help`, with their units.
    """

    clips: int = dataclasses.field(default=1_000_000, metadata={"help": "clips a day", "source": "question"})
    seconds: int = dataclasses.field(default=60, metadata={"help": "seconds of a clip", "source": "question"})
    height: int = dataclasses.field(default=720, metadata={"help": "height of a frame, pixels", "source": "assumed"})
    width: int = dataclasses.field(default=1280, metadata={"help": "width of a frame, pixels", "source": "assumed"})
    kept: float = dataclasses.field(
        default=0.5, metadata={"help": "share of visual tokens left after pruning", "source": "assumed"}
    )
    answer: int = dataclasses.field(default=64, metadata={"help": "tokens of an answer", "source": "assumed"})
    read_seconds: float = dataclasses.field(
        default=3.67,
        metadata={
            "help": "CPU seconds to read, sample and cut up a clip",
            "source": "measured on an Intel Xeon, 60 s of 1280 x 720 to uint8: `benchmarks/video_input.py`",
        },
    )
    memory_gb: float = dataclasses.field(
        default=80.0, metadata={"help": "memory of a card, decimal GB", "source": "assumed: an H100's data sheet"}
    )
    tflops: float = dataclasses.field(
        default=989.0, metadata={"help": "bfloat16 TFLOP/s of a card", "source": "assumed: an H100's data sheet"}
    )
    terabytes: float = dataclasses.field(
        default=3.35, metadata={"help": "TB/s of a card's memory", "source": "assumed: an H100's data sheet"}
    )
    arithmetic: float = dataclasses.field(
        default=0.4, metadata={"help": "share of the TFLOP/s that is reached", "source": "assumed"}
    )
    bandwidth: float = dataclasses.field(
        default=0.6, metadata={"help": "share of the TB/s that is reached", "source": "assumed"}
    )
    usable: float = dataclasses.field(
        default=0.9, metadata={"help": "share of the memory for weights and requests", "source": "assumed"}
    )
    batch: int = dataclasses.field(
        default=64, metadata={"help": "requests answered at once, at most", "source": "assumed"}
    )
    load: float = dataclasses.field(
        default=0.7, metadata={"help": "share of the day that a card works", "source": "assumed"}
    )
    encoder_us: float | None = dataclasses.field(
        default=None, metadata={"help": "microseconds of the encoder per patch", "source": "measured by the reader"}
    )
    prefill_us: float | None = dataclasses.field(
        default=None, metadata={"help": "microseconds of the prefill per token", "source": "measured by the reader"}
    )
    step_ms: float | None = dataclasses.field(
        default=None,
        metadata={"help": "milliseconds of one token for a whole batch", "source": "measured by the reader"},
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizing:
    """Figures of one model.

    Attributes:
        weights: bytes.
        cache_per_token: bytes.
        patches: of a clip.
        visual: visual tokens of a clip before pruning.
        tokens: of a request: kept visual tokens, text, answer.
        cache: bytes of a request that is being answered.
        prefill_peak: bytes beside weights and cache while one request is read.
        held: requests that fit on a card.
        batch: requests answered at once.
        encoder: seconds of the encoder per clip.
        prefill: seconds of reading the prompt per clip.
        decode: seconds of writing the answer per clip, its share of a batch.
        cards: for all clips.
        cores: CPU cores that read all clips.
    """

    weights: int
    cache_per_token: int
    patches: int
    visual: int
    tokens: int
    cache: int
    prefill_peak: int
    held: int
    batch: int
    encoder: float
    prefill: float
    decode: float
    cards: int
    cores: int

    @property
    def clip_seconds(self) -> float:
        """Seconds of a card per clip."""
        return self.encoder + self.prefill + self.decode


def size(inputs: Inputs, text: dict[str, int], *, tied: bool) -> Sizing:
    """The figures of one model.

    Args:
        inputs: see `Inputs`.
        text: sizes of the language model, as in `models.py`.
        tied: whether its head is its embedding.

    Raises:
        ValueError: when not even one request fits on a card.
    """
    from videollama3.conversion.model_card_memory import (
        BYTES_PER_VALUE,
        PATCH_SIZE,
        PATCH_WIDTH,
        TEXT_TOKENS,
        TEXT_TOKENS_PER_FRAME,
        sizes_of,
    )
    from videollama3.processing.visual_budget import ItemSize, target_sizes

    model: Any = sizes_of({"vision_config": models.SO400M, "text_config": text, "tie_word_embeddings": tied})
    frames = min(inputs.seconds, 180)
    ((height, width),) = target_sizes([ItemSize(frames, inputs.height, inputs.width, 2)])
    grid = (height // PATCH_SIZE, width // PATCH_SIZE)
    patches = frames * grid[0] * grid[1]
    visual = patches // 4
    prompt = math.ceil(visual * inputs.kept) + TEXT_TOKENS + frames * TEXT_TOKENS_PER_FRAME
    tokens = prompt + inputs.answer
    weights = model.num_parameters() * BYTES_PER_VALUE
    key_width = text["hidden_size"] // text["num_attention_heads"] * text["num_key_value_heads"]
    cache_per_token = text["num_hidden_layers"] * 2 * key_width * BYTES_PER_VALUE
    cache = tokens * cache_per_token
    # One request is read at a time: its pixels (uint8), beside them a chunk of the encoder or the prefill.
    wide = (5 * text["hidden_size"] + 3 * text["intermediate_size"]) * BYTES_PER_VALUE * prompt
    prefill_peak = patches * PATCH_WIDTH + max(model.chunk_bytes(patches), wide)
    room = inputs.memory_gb * 1e9 * inputs.usable - weights - prefill_peak
    held = int(room // cache)
    if held < 1:
        raise ValueError(
            f"Expected a card that holds the weights ({weights / 1e9:.1f} GB) and one request "
            f"({(cache + prefill_peak) / 1e9:.1f} GB) in {inputs.memory_gb * inputs.usable:.1f} usable GB."
        )
    batch = min(held, inputs.batch)
    flops = inputs.tflops * 1e12 * inputs.arithmetic
    # A token reads the layers and the head; of an embedding that is not the head only a row.
    read = weights - (model.num_vision_parameters() + (0 if tied else text["vocab_size"] * text["hidden_size"])) * 2
    step = max(
        (read + batch * cache) / (inputs.terabytes * 1e12 * inputs.bandwidth),
        # Two operations for every parameter, which has two bytes.
        batch * read / flops,
    )
    encoder = models.vision_flops(models.SO400M, [(frames, *grid)]) / flops
    prefill = models.text_flops(text, prompt) / flops
    if inputs.encoder_us is not None:
        encoder = inputs.encoder_us * 1e-6 * patches
    if inputs.prefill_us is not None:
        prefill = inputs.prefill_us * 1e-6 * prompt
    if inputs.step_ms is not None:
        step = inputs.step_ms * 1e-3
    decode = step * inputs.answer / batch
    per_second = inputs.clips / SECONDS_PER_DAY
    return Sizing(
        weights=weights,
        cache_per_token=cache_per_token,
        patches=patches,
        visual=visual,
        tokens=tokens,
        cache=cache,
        prefill_peak=prefill_peak,
        held=held,
        batch=batch,
        encoder=encoder,
        prefill=prefill,
        decode=decode,
        cards=math.ceil(per_second * (encoder + prefill + decode) / inputs.load),
        cores=math.ceil(per_second * inputs.read_seconds / inputs.load),
    )


def report(inputs: Inputs) -> str:
    """The paragraph, the figures and the inputs, in Markdown."""
    sizings = both(inputs)
    rows = [
        ("weights, bfloat16", lambda s: f"{s.weights / 1e9:.1f} GB"),
        ("cache of a token", lambda s: f"{s.cache_per_token:,} bytes"),
        ("tokens of a request, with text and answer", lambda s: f"{s.tokens:,}"),
        ("memory of a request while it is answered", lambda s: f"{s.cache / 1e9:.2f} GB"),
        ("memory of the one that is being read, beside it", lambda s: f"{s.prefill_peak / 1e9:.2f} GB"),
        ("requests that fit on a card", lambda s: f"{s.held}"),
        ("encoder, per clip", lambda s: f"{s.encoder * 1e3:.0f} ms"),
        ("prefill, per clip", lambda s: f"{s.prefill * 1e3:.0f} ms"),
        ("answer, per clip in a batch", lambda s: f"{s.decode * 1e3:.0f} ms ({s.batch} at once)"),
        ("clips per second of a card", lambda s: f"{1 / s.clip_seconds:.1f}"),
        (f"cards for {inputs.clips:,} clips a day", lambda s: f"{s.cards}"),
        ("CPU cores that read them", lambda s: f"{s.cores}"),
    ]
    lines = [paragraph(inputs), "", "| | 2B | 7B |", "| --- | --- | --- |"]
    lines += [f"| {name} | {' | '.join(show(sizing) for sizing in sizings.values())} |" for name, show in rows]
    lines += ["", "| input | value | source |", "| --- | --- | --- |"]
    lines += [
        f"| {field.metadata['help']} | {getattr(inputs, field.name):,} | {source(inputs, field)} |"
        for field in dataclasses.fields(inputs)
        if getattr(inputs, field.name) is not None
    ]
    return "\n".join(lines)


def both(inputs: Inputs) -> dict[str, Sizing]:
    """Figures of the two released sizes."""
    return {"2B": size(inputs, models.QWEN_2B, tied=True), "7B": size(inputs, models.QWEN_7B, tied=False)}


def paragraph(inputs: Inputs) -> str:
    """The answer in words, its lines at most 119 characters long."""
    small, large = both(inputs).values()
    small_whole, large_whole = both(dataclasses.replace(inputs, kept=1.0)).values()
    text = (
        f"A 7B in bfloat16 takes {large.weights / 1e9:.1f} GB for its weights and {large.cache_per_token:,} bytes of "
        f"cache a token. A clip of {inputs.seconds} seconds at {inputs.width} x {inputs.height} is {large.patches:,} "
        f"patches and {large.visual:,} visual tokens; if {100 * inputs.kept:.0f} % of them stay, a request has "
        f"{large.tokens:,} tokens and {large.cache / 1e9:.2f} GB of cache, and a card of {inputs.memory_gb:.0f} GB "
        f"holds {large.held} of them (2B: {small.held}). {_pace(inputs)} a card spends {large.encoder * 1e3:.0f} ms "
        f"on a clip's encoder, {large.prefill * 1e3:.0f} on its prefill and {large.decode * 1e3:.0f} on its answer: "
        f"{1 / large.clip_seconds:.1f} clips a second (2B: {1 / small.clip_seconds:.1f}). {inputs.clips:,} clips a "
        f"day are {inputs.clips / SECONDS_PER_DAY:.1f} a second: {large.cards} cards for the 7B or {small.cards} for "
        f"the 2B at a load of {100 * inputs.load:.0f} %, and {large.cores} CPU cores that read the files. Pruning "
        f"spares prefill and cache, not the encoder: with nothing pruned it would be {large_whole.cards} cards or "
        f"{small_whole.cards}."
    )
    return textwrap.fill(text, width=119, break_on_hyphens=False)


def _pace(inputs: Inputs) -> str:
    if None not in (inputs.encoder_us, inputs.prefill_us, inputs.step_ms):
        return "By the costs that were given"
    return (
        f"At {100 * inputs.arithmetic:.0f} % of its arithmetic and {100 * inputs.bandwidth:.0f} % of its bandwidth, "
        "assumed and not measured,"
    )


def source(inputs: Inputs, field: dataclasses.Field[Any]) -> str:
    """Where a value comes from: what was said of the default, or whoever gave another."""
    given = getattr(inputs, field.name) != field.default
    return "given on the command line" if given else str(field.metadata["source"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Inputs):
        kind = int if isinstance(field.default, int) else float
        default = "computed from the inputs above" if field.default is None else f"{field.default:,}"
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            default=field.default,
            metavar=kind.__name__.upper(),
            help=f"{field.metadata['help']} (default {default})".replace("%", "%%"),
        )
    print(report(Inputs(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
