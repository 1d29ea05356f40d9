"""What does a growing video cost per tick and per question: a session against asking offline from scratch?

    python benchmarks/streaming.py

Random weights at the widths of the 2B (so400m encoder, Qwen2.5 1.5B) with `--layers` layers each (on the CPU 1: read
ratios), float32, small pictures in which a quarter of each changes per tick. A session is shown ticks one at a time;
when it holds 10, 60, 180 and 600 of them it is asked two questions of one token each. Offline, ours and transformers'
own class get the same tensors of all frames so far and answer from scratch. Preparing pixels and text counts on
neither side of a question; of a tick it does. Sides run in one process each, in turns, the first one another in each
round. Costs are CPU seconds of all threads beside wall time; ratios are of CPU seconds, which other work on the
machine disturbs least (on a GPU of wall time, where waiting for it is what counts).

Where a tick's time goes is measured by hooks: pictures (resizing, patches, pruning and all that is in none of the
following), vision encoder, projector, attention and cache of the language model, and the rest of its layers.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import common
import models

SIDES = ("session", "ours", "native")
TICKS = (10, 60, 180, 600)
TOY_TICKS = (2, 5)
QUESTIONS = ("What happens in the video?", "And what is it that moved last?")
COSTS = ("tick", "first_question", "second_question")
PARTS = ("pictures", "encoder", "projector", "attention", "cache", "other layers")
# Per-tick costs are medians over the last so many ticks before a mark.
WINDOW = 10


def main() -> None:
    parser = common.common_parser(__doc__ or "", rounds=1)
    parser.add_argument("--layers", type=int, default=1, help="layers of 27 and 28 (default 1)")
    parser.add_argument("--height", type=int, default=112, help="of the pictures, in pixels (default 112)")
    parser.add_argument("--width", type=int, default=140, help="of the pictures, in pixels (default 140)")
    parser.add_argument("--device", default="cpu", help="a torch device (default cpu)")
    parser.add_argument("--ticks", type=int, nargs="+", default=list(TICKS), help="when questions are asked")
    options = parser.parse_args()
    if options.worker:
        common.answer(work(json.loads(options.worker)))
        return
    environment = common.environment()
    setting = {
        "toy": options.toy,
        "layers": 2 if options.toy else options.layers,
        "height": options.height,
        "width": options.width,
        "device": options.device,
        "ticks": list(TOY_TICKS) if options.toy else options.ticks,
    }
    rounds = 1 if options.toy else options.rounds
    runs = [
        {side: common.run_fresh(__file__, {**setting, "side": side}) for side in turned(SIDES, number)}
        for number in range(rounds)
    ]
    cases = {str(ticks): summary(str(ticks), runs) for ticks in setting["ticks"]}
    show(cases, "cpu_ms" if setting["device"] == "cpu" else "wall_ms")
    record = {
        "question": (__doc__ or "").splitlines()[0],
        "command": common.command_line(__file__),
        **environment,
        "setting": {**setting, "dtype": "float32", "questions": QUESTIONS, "window": WINDOW},
        "cases": cases,
    }
    common.write_json("streaming_toy" if options.toy else "streaming", record, folder=options.output)


def turned(sides: Sequence[str], number: int) -> tuple[str, ...]:
    """Another side first in each round."""
    first = number % len(sides)
    return (*sides[first:], *sides[:first])


def summary(ticks: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, and ratios."""
    session = {name: middle([run["session"][ticks][name] for run in runs]) for name in COSTS}
    offline = {side: middle([run[side][ticks]["question"] for run in runs]) for side in ("ours", "native")}
    logits = {side: runs[0][side][ticks]["logits"] for side in SIDES}
    parts = [run["session"][ticks]["tick_parts_ms"] for run in runs]
    counts = {"wall_ms": "wall", "cpu_ms": "cpu"}
    return {
        "prompt_tokens": runs[0]["session"][ticks]["prompt_tokens"],
        "kept_tokens_per_tick": runs[0]["session"][ticks]["kept_tokens_per_tick"],
        "cache_mib": runs[0]["session"][ticks]["cache_mib"],
        "session": session,
        "tick_parts_ms": {name: statistics.median(part[name] for part in parts) for name in parts[0]},
        "offline_question": offline,
        "offline / second question": {
            side: {name: cost[unit] / session["second_question"][unit] for unit, name in counts.items()}
            for side, cost in offline.items()
        },
        "largest logit difference from offline": {
            side: max(abs(a - b) for a, b in zip(logits["session"], logits[side], strict=True))
            for side in ("ours", "native")
        },
    }


def middle(costs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians of wall and CPU time."""
    return {unit: statistics.median(cost[unit] for cost in costs) for unit in ("wall_ms", "cpu_ms")}


def show(cases: dict[str, Any], unit: str) -> None:
    ratio = {"wall_ms": "wall", "cpu_ms": "cpu"}[unit]
    print(f"{'CPU' if ratio == 'cpu' else 'wall'} milliseconds")
    common.print_table(
        [
            "ticks",
            "prompt tokens",
            "tick",
            "1st question",
            "2nd question",
            "offline ours",
            "offline native",
            "ours / 2nd",
            "native / 2nd",
            "logits apart",
        ],
        [
            [
                ticks,
                case["prompt_tokens"],
                *(f"{case['session'][name][unit]:.0f}" for name in COSTS),
                *(f"{case['offline_question'][side][unit]:.0f}" for side in ("ours", "native")),
                *(f"{case['offline / second question'][side][ratio]:.1f}" for side in ("ours", "native")),
                f"{max(case['largest logit difference from offline'].values()):.1e}",
            ]
            for ticks, case in cases.items()
        ],
    )
    print("\nof a tick, by part")
    common.print_table(
        ["ticks", "cache MiB", *PARTS],
        [
            [ticks, f"{case['cache_mib']:.1f}", *(f"{case['tick_parts_ms'][name]:.1f}" for name in PARTS)]
            for ticks, case in cases.items()
        ],
    )


# ---------------------------------------------------------------------------------------------- workers


def work(spec: dict[str, Any]) -> dict[str, Any]:
    """One process: one side at all lengths."""
    import torch

    side = "native" if spec["side"] == "native" else "ours"
    processor = build_processor()
    text, vision = (models.TOY_TEXT, models.TOY_VISION) if spec["toy"] else (models.QWEN_2B, models.SO400M)
    text = {**text, "num_hidden_layers": spec["layers"], "vocab_size": max(text["vocab_size"], 2048)}
    model = models.build_model(
        side,
        text,
        {**vision, "patch_size": 14, "num_hidden_layers": spec["layers"]},
        device=spec["device"],
        dtype=torch.float32,
    )
    same_weights(model)
    model.config.image_token_id, model.config.video_token_id = processor.image_token_id, processor.video_token_id
    with torch.inference_mode():
        return (
            run_session(model, processor, spec) if spec["side"] == "session" else run_offline(model, processor, spec)
        )


def build_processor() -> Any:
    """With a tokenizer of bytes; its ids lie within every vocabulary used here."""
    from videollama3.random_checkpoint import build_random

    return build_random()[1]


def same_weights(model: Any) -> None:
    """The sides draw their weights in different orders."""
    import torch

    generator = torch.Generator(device=model.device).manual_seed(2)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02, generator=generator)


def pictures(spec: dict[str, Any]) -> Any:
    """uint8 (height, width, 3) pictures; in each a quarter differs from the one before."""
    import numpy as np

    rng = np.random.default_rng(0)
    height, width = spec["height"], spec["width"]
    picture = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    for number in range(max(spec["ticks"])):
        top, left = (number % 2) * (height // 2), (number // 2 % 2) * (width // 2)
        patch = rng.integers(0, 255, (height // 2, width // 2, 3), dtype=np.uint8)
        picture = picture.copy()
        picture[top : top + height // 2, left : left + width // 2] = patch
        yield picture


class Clock:
    """Wall and CPU time of what is done, on a GPU when it is done.

    Args:
        device: a torch device.
    """

    def __init__(self, device: str) -> None:
        self._device = device

    def now(self) -> tuple[float, float]:
        """Wall and CPU time in milliseconds."""
        import torch

        if self._device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() * 1000, time.process_time() * 1000

    def cost(self, call: Callable[[], Any]) -> dict[str, float]:
        """Of a call."""
        begun = self.now()
        call()
        wall, cpu = (after - before for before, after in zip(begun, self.now(), strict=True))
        return {"wall_ms": wall, "cpu_ms": cpu}


class TickParts:
    """Time in the parts of a model while a session is shown ticks: CPU time on a CPU, wall time on a GPU.

    Args:
        model: ours.
        clock: of its device.
        is_cpu: whether CPU time is taken.
    """

    def __init__(self, model: Any, clock: Clock, *, is_cpu: bool) -> None:
        self._clock, self._unit = clock, int(is_cpu)
        self._model = model
        self.totals = dict.fromkeys(("encoder", "projector", "attention", "cache", "language model"), 0.0)

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = self._clock.now()[self._unit]
            result = call(*args, **kwargs)
            self.totals[name] += self._clock.now()[self._unit] - begun
            return result

        return timed

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Within, the parts are timed."""
        from unittest import mock

        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        from videollama3.streaming.grouped_attention import GROUPED_SDPA, grouped_sdpa_attention
        from videollama3.streaming.growing_cache import GrowingLayer

        parts = self._model.model
        wrapped = {
            "encoder": parts.vision_model,
            "projector": parts.projector,
            "language model": parts.language_model,
        }
        with contextlib.ExitStack() as stack:
            for name, module in wrapped.items():
                stack.enter_context(mock.patch.object(module, "forward", self._timed(name, module.forward)))
            update = self._timed("cache", GrowingLayer.update)
            stack.enter_context(mock.patch.object(GrowingLayer, "update", update))
            ALL_ATTENTION_FUNCTIONS.register(GROUPED_SDPA, self._timed("attention", grouped_sdpa_attention))
            stack.callback(ALL_ATTENTION_FUNCTIONS.register, GROUPED_SDPA, grouped_sdpa_attention)
            yield

    def taken(self, tick: dict[str, float]) -> dict[str, float]:
        """Milliseconds of each part of one tick, which are then counted anew."""
        totals, self.totals = self.totals, dict.fromkeys(self.totals, 0.0)
        whole = tick["cpu_ms" if self._unit else "wall_ms"]
        language = totals.pop("language model")
        outside = whole - language - totals["encoder"] - totals["projector"]
        return {**totals, "pictures": outside, "other layers": language - totals["attention"] - totals["cache"]}


def run_session(model: Any, processor: Any, spec: dict[str, Any]) -> dict[str, Any]:
    from videollama3.streaming import StreamingSession

    session = StreamingSession(model, processor, horizon_seconds=1)
    with session.fork() as warm:
        warm.show([next(pictures(spec))], [0.0])
        list(warm.ask("?", max_new_tokens=1))
    clock = Clock(spec["device"])
    parts = TickParts(model, clock, is_cpu=spec["device"] == "cpu")
    ticks: list[dict[str, float]] = []
    parts_ms: list[dict[str, float]] = []
    result = {}
    for number, picture in enumerate(pictures(spec)):
        with parts.measured():
            ticks.append(clock.cost(lambda: session.show([picture], [float(number)])))  # noqa: B023 - called at once
        parts_ms.append(parts.taken(ticks[-1]))
        if number + 1 in spec["ticks"]:
            last = parts_ms[-WINDOW:]
            result[str(number + 1)] = {
                "tick": middle(ticks[-WINDOW:]),
                "tick_parts_ms": {name: statistics.median(part[name] for part in last) for name in PARTS},
                **ask_both(session, clock),
            }
    return result


def ask_both(session: Any, clock: Clock) -> dict[str, Any]:
    """Both questions in a fork, so that the stream goes on without them."""
    state = session.state()
    outputs: list[list[float]] = []
    with session.fork() as fork:
        first, second = (
            clock.cost(lambda: list(fork.ask(question, max_new_tokens=1, logits_processor=[Keep(outputs)])))  # noqa: B023
            for question in QUESTIONS
        )
    return {
        "first_question": first,
        "second_question": second,
        "prompt_tokens": state.num_tokens,
        "kept_tokens_per_tick": state.num_kept_tokens / state.num_frames,
        "cache_mib": state.cache_bytes / 2**20,
        "logits": outputs[0],
    }


class Keep:
    """A logits processor that changes nothing and keeps the first values."""

    def __init__(self, outputs: list[list[float]]) -> None:
        self._outputs = outputs

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Logits (1, vocabulary) as they are."""
        self._outputs.append(scores[0, :256].tolist())
        return scores


def run_offline(model: Any, processor: Any, spec: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    frames = list(pictures(spec))
    ask_offline(model, offline_inputs(processor, np.stack(frames[:2]), spec["device"]))
    clock = Clock(spec["device"])
    result = {}
    for ticks in spec["ticks"]:
        inputs = offline_inputs(processor, np.stack(frames[:ticks]), spec["device"])
        outputs: list[list[float]] = []
        cost = clock.cost(lambda: outputs.append(ask_offline(model, inputs)))  # noqa: B023 - called at once
        result[str(ticks)] = {"question": cost, "logits": outputs[0]}
    return result


def offline_inputs(processor: Any, frames: Any, device: str) -> Any:
    """The tensors of one request with the first question."""
    content = [
        {"type": "video", "video": frames, "timestamps": [float(n) for n in range(len(frames))], "max_frames": 10**6},
        {"type": "text", "text": QUESTIONS[0]},
    ]
    return processor(
        conversation=[{"role": "user", "content": content}],
        add_system_prompt=True,
        add_generation_prompt=True,
        return_tensors="pt",
        # The session's pictures keep their size, however many there are.
        max_tokens=10**6,
        min_tokens=1,
    ).to(device)


def ask_offline(model: Any, inputs: Any) -> list[float]:
    """One answer token from scratch; the first logits."""
    outputs: list[list[float]] = []
    model.generate(**inputs, max_new_tokens=1, do_sample=False, logits_processor=[Keep(outputs)])
    return outputs[0]


if __name__ == "__main__":
    main()
