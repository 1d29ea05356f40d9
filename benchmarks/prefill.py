"""What do long prompts and training steps cost: our model against transformers' own, at the width of the 2B?

    python benchmarks/prefill.py

Random weights in bfloat16, with the first `--layers` of 28 layers (on the CPU 2: read ratios). A prefill of ours
keeps the logits of the last position; of transformers' model it is measured as a plain call computes it (logits
of every position) and as its `generate` calls it (of the last one). A training step is forward and backward,
3 % of the labels supervised. Every measurement is a process of its own; sides take turns (A B C, C B A).
Time is what the call takes, memory its highest point above what model and input occupy.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import common
import models

SIDES = {"prefill": ("ours", "native", "native_last"), "train": ("ours", "native")}
SUPERVISED_SHARE = 0.03


def main() -> None:
    parser = common.common_parser(__doc__ or "", rounds=2)
    parser.add_argument("--device", default="cpu", help="a torch device (default cpu)")
    parser.add_argument("--layers", type=int, help="layers of 28 (default 2 on cpu, 28 elsewhere)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help="lengths of prompts")
    parser.add_argument("--train-tokens", type=int, default=8192, help="length of the training row (0: none)")
    options = parser.parse_args()
    if options.worker:
        common.answer(work(json.loads(options.worker)))
        return
    environment = common.environment()
    layers = options.layers or (2 if options.device == "cpu" else 28)
    setting = {"device": options.device, "layers": 2 if options.toy else layers, "toy": options.toy}
    lengths = [("prefill", 48 if options.toy else tokens) for tokens in options.tokens[: 1 if options.toy else None]]
    if options.train_tokens:
        lengths.append(("train", 64 if options.toy else options.train_tokens))
    print(f"{setting['layers']} of 28 layers, device {options.device}")
    rounds = 1 if options.toy else options.rounds
    cases = {f"{task}, {tokens} tokens": run_case(task, tokens, setting, rounds) for task, tokens in lengths}
    print()
    show(cases)
    record = {
        "question": (__doc__ or "").splitlines()[0],
        "command": common.command_line(__file__),
        **environment,
        "setting": {**setting, **(models.TOY_TEXT if options.toy else models.QWEN_2B), "dtype": "bfloat16"},
        "cases": cases,
    }
    common.write_json("prefill_toy" if options.toy else "prefill", record, folder=options.output)


def run_case(task: str, tokens: int, setting: dict[str, Any], rounds: int) -> dict[str, Any]:
    print(f"{task}, {tokens} tokens", file=sys.stderr)
    answers: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES[task]}
    for number in range(rounds):
        for side in SIDES[task][:: 1 if number % 2 == 0 else -1]:
            answers[side].append(common.run_fresh(__file__, {**setting, "task": task, "tokens": tokens, "side": side}))
    figures = ("wall_seconds", "cpu_seconds", "peak_mib")
    sides = {
        side: {figure: common.middle([answer[figure] for answer in several]) for figure in figures}
        for side, several in answers.items()
    }
    ratios = {
        f"ours / {peer}": {
            figure: sides["ours"][figure]["median"] / max(sides[peer][figure]["median"], 1e-9) for figure in figures
        }
        for peer in SIDES[task][1:]
    }
    values = {side: several[0]["value"] for side, several in answers.items()}
    return {"sides": sides, "ratios": ratios, "values": values}


def show(cases: dict[str, Any]) -> None:
    """Prints the figures, then the ratios."""
    common.print_table(
        ["case", "side", "wall s (min-max)", "CPU s (min-max)", "peak MiB", "loss or logit"],
        [
            [
                name,
                side,
                common.spread(figures["wall_seconds"]),
                common.spread(figures["cpu_seconds"]),
                f"{figures['peak_mib']['median']:.0f}",
                f"{case['values'][side]:.5f}",
            ]
            for name, case in cases.items()
            for side, figures in case["sides"].items()
        ],
    )
    print()
    common.print_table(
        ["case", "ratio", "wall", "CPU", "peak memory"],
        [
            [name, pair, *(f"{ratio[figure]:.2f}" for figure in ("wall_seconds", "cpu_seconds", "peak_mib"))]
            for name, case in cases.items()
            for pair, ratio in case["ratios"].items()
        ],
    )


# ---------------------------------------------------------------------------------------------- workers


def work(spec: dict[str, Any]) -> dict[str, float]:
    """One process: one call of one side; `value` is what both sides must agree on."""
    import torch

    text = dict(models.TOY_TEXT if spec["toy"] else models.QWEN_2B)
    text["num_hidden_layers"] = spec["layers"]
    family = "ours" if spec["side"] == "ours" else "native"
    model = models.build_model(family, text, models.TOY_VISION, device=spec["device"], dtype=torch.bfloat16)
    # The sides draw their weights in different orders.
    generator = torch.Generator(device=spec["device"]).manual_seed(2)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "vision_model" not in name and parameter.ndim > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
    call = {"prefill": prefill_call, "train": train_call}[spec["task"]](model, spec, text["vocab_size"])
    if spec["task"] == "prefill":
        with torch.inference_mode():
            prefill_call(model, {**spec, "tokens": 16}, text["vocab_size"])()  # lazy imports
            return measured(call, spec["device"])
    train_call(model, {**spec, "tokens": 64}, text["vocab_size"])()
    model.zero_grad(set_to_none=False)  # gradients belong to the model, not to the step
    return measured(call, spec["device"])


def measured(call: Any, device: str) -> dict[str, float]:
    """Cost of one call; on a card, time of the second and memory of the first."""
    value = 0.0

    def keep() -> None:
        nonlocal value
        value = call()

    if device == "cpu":
        cost = common.measure(keep)
        return {
            "wall_seconds": cost.wall_seconds[0],
            "cpu_seconds": cost.cpu_seconds[0],
            "peak_mib": cost.peak_mib,
            "value": value,
        }
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    keep()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    # A card's first call of a size also chooses its kernels and fetches memory from the driver.
    start, cpu_start = time.perf_counter(), common.cpu_seconds()
    keep()
    torch.cuda.synchronize()
    return {
        "wall_seconds": time.perf_counter() - start,
        "cpu_seconds": common.cpu_seconds() - cpu_start,
        "peak_mib": peak / 2**20,
        "value": value,
    }


def prefill_call(model: Any, spec: dict[str, Any], vocabulary: int) -> Any:
    """A call that returns the highest logit of the last position."""
    ids = token_ids(spec, vocabulary)
    options = {} if spec["side"] == "native" else {"logits_to_keep": 1}
    return lambda: float(model(input_ids=ids, use_cache=True, **options).logits[0, -1].max())


def train_call(model: Any, spec: dict[str, Any], vocabulary: int) -> Any:
    """A step that returns its loss."""
    import torch

    ids = token_ids(spec, vocabulary)
    labels = ids.clone()
    labels[:, : int(ids.shape[1] * (1 - SUPERVISED_SHARE))] = -100
    model.train()
    if spec.get("checkpointing"):
        model.gradient_checkpointing_enable()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_model" not in name and "projector" not in name)

    def step() -> float:
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    assert torch.is_grad_enabled()
    return step


def token_ids(spec: dict[str, Any], vocabulary: int) -> Any:
    """Random text of one row, without placeholders."""
    import torch

    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, vocabulary - 8, (1, spec["tokens"]), generator=generator).to(spec["device"])


if __name__ == "__main__":
    main()
