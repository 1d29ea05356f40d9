"""What does a growing video cost per tick and per question: a session against asking offline from scratch?

    python benchmarks/streaming.py

Random weights at the widths of the 2B (so400m encoder, Qwen2.5 1.5B) with `--layers` layers each (on the CPU 1: read
ratios), float32, small pictures in which a quarter of each changes per tick. A session is shown ticks one at a time;
when it holds 10, 60, 180 and 600 of them it is asked two questions of one token each. Offline, ours and transformers'
own class get the same tensors of all frames so far and answer from scratch. Preparing pixels and text counts on
neither side of a question; of a tick it does. Sides run in one process each, one after the other.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import common
import models

SIDES = ("session", "ours", "native")
TICKS = (10, 60, 180, 600)
TOY_TICKS = (2, 5)
QUESTIONS = ("What happens in the video?", "And what is it that moved last?")
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
    runs = [{side: common.run_fresh(__file__, {**setting, "side": side}) for side in SIDES} for _ in range(rounds)]
    cases = {str(ticks): summary(str(ticks), runs) for ticks in setting["ticks"]}
    show(cases)
    record = {
        "question": (__doc__ or "").splitlines()[0],
        "command": common.command_line(__file__),
        **environment,
        "setting": {**setting, "dtype": "float32", "questions": QUESTIONS, "window": WINDOW},
        "cases": cases,
    }
    common.write_json("streaming_toy" if options.toy else "streaming", record, folder=options.output)


def summary(ticks: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, and ratios."""
    names = ("tick_ms", "first_question_ms", "second_question_ms")
    session = {name: statistics.median(run["session"][ticks][name] for run in runs) for name in names}
    offline = {side: statistics.median(run[side][ticks]["question_ms"] for run in runs) for side in ("ours", "native")}
    logits = {side: runs[0][side][ticks]["logits"] for side in SIDES}
    return {
        "prompt_tokens": runs[0]["session"][ticks]["prompt_tokens"],
        "kept_tokens_per_tick": runs[0]["session"][ticks]["kept_tokens_per_tick"],
        "session": session,
        "offline_question_ms": offline,
        "offline / second question": {side: cost / session["second_question_ms"] for side, cost in offline.items()},
        "largest logit difference from offline": {
            side: max(abs(a - b) for a, b in zip(logits["session"], logits[side], strict=True))
            for side in ("ours", "native")
        },
    }


def show(cases: dict[str, Any]) -> None:
    common.print_table(
        [
            "ticks",
            "prompt tokens",
            "ms per tick",
            "1st question ms",
            "2nd question ms",
            "offline ours ms",
            "offline native ms",
            "ours / 2nd",
            "native / 2nd",
            "logits apart",
        ],
        [
            [
                ticks,
                case["prompt_tokens"],
                *(f"{case['session'][name]:.0f}" for name in case["session"]),
                *(f"{case['offline_question_ms'][side]:.0f}" for side in ("ours", "native")),
                *(f"{case['offline / second question'][side]:.1f}" for side in ("ours", "native")),
                f"{max(case['largest logit difference from offline'].values()):.1e}",
            ]
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


def run_session(model: Any, processor: Any, spec: dict[str, Any]) -> dict[str, Any]:
    from videollama3.streaming import StreamingSession

    session = StreamingSession(model, processor, horizon_seconds=1)
    with session.fork() as warm:
        warm.show([next(pictures(spec))], [0.0])
        list(warm.ask("?", max_new_tokens=1))
    ticks_ms: list[float] = []
    result = {}
    for number, picture in enumerate(pictures(spec)):
        begun = time.perf_counter()
        session.show([picture], [float(number)])
        ticks_ms.append((time.perf_counter() - begun) * 1000)
        if number + 1 in spec["ticks"]:
            result[str(number + 1)] = ask_both(session, ticks_ms)
    return result


def ask_both(session: Any, ticks_ms: list[float]) -> dict[str, Any]:
    """Both questions in a fork, so that the stream goes on without them."""
    state = session.state()
    costs, outputs = [], []
    with session.fork() as fork:
        for question in QUESTIONS:
            begun = time.perf_counter()
            list(fork.ask(question, max_new_tokens=1, logits_processor=[Keep(outputs)]))
            costs.append((time.perf_counter() - begun) * 1000)
    return {
        "tick_ms": statistics.median(ticks_ms[-WINDOW:]),
        "first_question_ms": costs[0],
        "second_question_ms": costs[1],
        "prompt_tokens": state.num_tokens,
        "kept_tokens_per_tick": state.num_kept_tokens / state.num_frames,
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
    result = {}
    for ticks in spec["ticks"]:
        inputs = offline_inputs(processor, np.stack(frames[:ticks]), spec["device"])
        begun = time.perf_counter()
        logits = ask_offline(model, inputs)
        result[str(ticks)] = {"question_ms": (time.perf_counter() - begun) * 1000, "logits": logits}
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
