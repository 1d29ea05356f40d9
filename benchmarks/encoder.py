"""What does encoding patches cost: our vision encoder against transformers' own, same weights, same input?

    python benchmarks/encoder.py

Both have the size of the released encoder (SigLIP so400m) with the first `--layers` of its 27 layers, fresh
weights shared between them, and attention `sdpa`. The third side, `products`, is the bound: the matrix products of
the same layers alone (linear layers, and the two products of attention inside each segment), without norms,
rotation, softmax, activation or residuals. Calls take turns in one process (A B C C B A); the highest memory is taken
from a process per model, above what it and its input occupy. Outputs are compared in the same type, and in
bfloat16 also each with our float32 output.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

import common

WIDTHS = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "patch_size": 14}
TOY_WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "patch_size": 14}
# (frames, rows, columns) of each item in patches, and its merge size.
INPUTS: dict[str, list[tuple[tuple[int, int, int], int]]] = {
    "8 frames of 24 x 42, merge 2": [((8, 24, 42), 2)],
    "32 frames of 24 x 42, merge 2": [((32, 24, 42), 2)],
    "180 frames of 24 x 42, merge 2": [((180, 24, 42), 2)],
    # 36 sizes, none twice: what a batch of thumbnails or crops looks like, 3960 patches.
    "36 small images, merge 1": [((1, rows, columns), 1) for rows in range(5, 17, 2) for columns in range(6, 17, 2)],
}
TOY_INPUTS: dict[str, list[tuple[tuple[int, int, int], int]]] = {
    "2 frames and 2 images": [((2, 4, 6), 2), ((1, 3, 5), 1), ((1, 2, 3), 1)],
}
MODELS = ("ours", "native")
SIDES = (*MODELS, "products")
DTYPES = ("float32", "bfloat16")
# On a CPU the longest clip is measured in the type that it is used in, on one layer: minutes instead of hours.
CPU_LAYERS = {"180 frames of 24 x 42, merge 2": 1}
CPU_DTYPES = {"180 frames of 24 x 42, merge 2": ("bfloat16",)}


def main() -> None:
    parser = common.common_parser(__doc__ or "", rounds=3)
    parser.add_argument("--device", default="cpu", help="a torch device (default cpu)")
    parser.add_argument(
        "--layers", type=int, help="encoder layers of 27 (default on cpu 2, 1 for 180 frames; 27 elsewhere)"
    )
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of both (default sdpa)")
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return
    environment = common.environment()
    on_cpu = options.device == "cpu"
    layers = options.layers or (2 if on_cpu else 27)
    setting = {
        "device": options.device,
        "layers": 2 if options.toy else layers,
        "attention": options.attention,
        "toy": options.toy,
    }
    print(f"{setting['layers']} of 27 layers, device {options.device}, attention {options.attention}")
    rounds = 1 if options.toy else options.rounds
    cases = {}
    for name in inputs_of(setting):
        own = (
            {**setting, "layers": CPU_LAYERS[name]}
            if on_cpu and not options.layers and name in CPU_LAYERS
            else setting
        )
        for dtype in CPU_DTYPES.get(name, DTYPES) if on_cpu else DTYPES:
            cases[f"{name}, {dtype}, {own['layers']} layer(s)"] = run_case(name, dtype, own, rounds)
    print()
    show(cases)
    record = {
        "question": (__doc__ or "").splitlines()[0],
        "command": common.command_line(__file__),
        **environment,
        "setting": {**setting, **(TOY_WIDTHS if options.toy else WIDTHS)},
        "cases": cases,
    }
    common.write_json("encoder_toy" if options.toy else "encoder", record, folder=options.output)


def inputs_of(setting: dict[str, Any]) -> dict[str, list[tuple[tuple[int, int, int], int]]]:
    return TOY_INPUTS if setting["toy"] else INPUTS


def run_case(name: str, dtype: str, setting: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Times both sides in one process, then takes the memory of each in its own."""
    print(f"{name}, {dtype}", file=sys.stderr)
    spec = {**setting, "input": name, "dtype": dtype, "rounds": rounds}
    compared = common.run_fresh(__file__, {**spec, "task": "compare"})
    memory: dict[str, list[float]] = {side: [] for side in MODELS}
    for _ in range(rounds):
        for side, peaks in memory.items():
            peaks.append(common.run_fresh(__file__, {**spec, "task": "memory", "side": side})["peak_mib"])
    sides = {
        side: {
            "wall_seconds": common.middle(compared["wall_seconds"][side]),
            "cpu_seconds": common.middle(compared["cpu_seconds"][side]),
            **({"peak_mib": common.middle(memory[side])} if side in memory else {}),
        }
        for side in SIDES
    }
    ratios = {
        f"ours / {other}": {
            figure: common.ratio(values, sides[other][figure])
            for figure, values in sides["ours"].items()
            if figure in sides[other]
        }
        for other in ("native", "products")
    }
    return {
        "sides": sides,
        "ratios": ratios,
        **{key: compared[key] for key in ("patches", "torch_threads", "differences")},
    }


def show(cases: dict[str, Any]) -> None:
    """Prints the figures, then ratios and differences."""
    rows = [
        [
            name,
            side,
            common.spread(values["wall_seconds"]),
            common.spread(values["cpu_seconds"]),
            common.spread(values["peak_mib"], digits=0) if "peak_mib" in values else "-",
        ]
        for name, case in cases.items()
        for side, values in case["sides"].items()
    ]
    common.print_table(["case", "side", "wall s (min-max)", "CPU s (min-max)", "peak MiB"], rows)
    print("\nRatios of medians (of minima); below 1 ours is cheaper.")
    rows = [
        [
            name,
            label,
            *(common.show_ratio(values[figure]) for figure in ("wall_seconds", "cpu_seconds")),
            common.show_ratio(values["peak_mib"]) if "peak_mib" in values else "-",
        ]
        for name, case in cases.items()
        for label, values in case["ratios"].items()
    ]
    common.print_table(["case", "ratio", "wall", "CPU", "peak memory"], rows)
    print("\nLargest differences of outputs.")
    pairs = ("ours - native", "ours - float32", "native - float32")
    rows = [[name, *(f"{case['differences'][pair]:.2g}" for pair in pairs)] for name, case in cases.items()]
    common.print_table(["case", *pairs], rows)


# ---------------------------------------------------------------------------------------------- workers


def work(spec: dict[str, Any]) -> None:
    """One process: `compare` times both sides in turns, `memory` runs one side once."""
    import torch

    torch.manual_seed(0)
    with torch.inference_mode():
        if spec["task"] == "compare":
            common.answer(compare(spec))
        else:
            common.answer({"peak_mib": peak_mib(spec)})


def compare(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    models = {side: build(side, spec) for side in MODELS}
    models["native"].load_state_dict(models["ours"].state_dict(), assign=True)
    batch = make_batch(spec)
    reference = encode(models["ours"], batch).float()
    for model in models.values():
        model.to(getattr(torch, spec["dtype"]))
    outputs = {side: encode(model, batch).float() for side, model in models.items()}  # also the warm-up
    models["products"] = build("products", spec).to(getattr(torch, spec["dtype"]))
    encode(models["products"], batch)
    wall: dict[str, list[float]] = {side: [] for side in models}
    cpu: dict[str, list[float]] = {side: [] for side in models}
    for number in range(spec["rounds"]):
        # A B, B A, ...: neither always follows the other.
        for side, model in list(models.items())[:: 1 if number % 2 == 0 else -1]:
            wall_start, cpu_start = time.perf_counter(), common.cpu_seconds()
            encode(model, batch)
            wall[side].append(time.perf_counter() - wall_start)
            cpu[side].append(common.cpu_seconds() - cpu_start)
    return {
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "patches": batch["pixel_values"].shape[0],
        "torch_threads": torch.get_num_threads(),
        "differences": {
            "ours - native": (outputs["ours"] - outputs["native"]).abs().max().item(),
            "ours - float32": (outputs["ours"] - reference).abs().max().item(),
            "native - float32": (outputs["native"] - reference).abs().max().item(),
        },
    }


def peak_mib(spec: dict[str, Any]) -> float:
    import torch

    model = build(spec["side"], spec).to(getattr(torch, spec["dtype"]))
    small = {**spec, "toy": True, "input": next(iter(TOY_INPUTS))}
    encode(model, make_batch(small))
    batch = make_batch(spec)
    if spec["device"] == "cpu":
        return common.measure(lambda: encode(model, batch)).peak_mib
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    encode(model, batch)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def build(side: str, spec: dict[str, Any]) -> Any:
    """An encoder with fresh float32 weights, in inference mode."""
    widths = {**(TOY_WIDTHS if spec["toy"] else WIDTHS), "num_hidden_layers": spec["layers"]}
    if side == "ours":
        import videollama3

        config = videollama3.VideoLlama3VisionConfig(**widths, attn_implementation=spec["attention"])
        model = videollama3.VideoLlama3VisionModel(config)
    elif side == "products":
        model = matrix_products(widths)
    else:
        configuration = importlib.import_module("transformers.models.video_llama_3.configuration_video_llama_3")
        modeling = importlib.import_module("transformers.models.video_llama_3.modeling_video_llama_3")
        config = configuration.VideoLlama3VisionConfig(**widths, attn_implementation=spec["attention"])
        model = modeling.VideoLlama3VisionModel(config)
    return model.eval().to(spec["device"])


def matrix_products(widths: dict[str, int]) -> Any:
    """A module that computes the encoder's matrix products and nothing else, each by the faster library."""
    import torch
    from torch import nn
    from transformers.modeling_outputs import BaseModelOutput

    from videollama3.modeling.onednn_linear import OneDnnLinear

    width, inner, heads = widths["hidden_size"], widths["intermediate_size"], widths["num_attention_heads"]

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = OneDnnLinear(3 * widths["patch_size"] ** 2, width)
            self.square = OneDnnLinear(width, width)
            self.up = OneDnnLinear(width, inner)
            self.down = OneDnnLinear(inner, width)

        def forward(self, pixel_values: Any, grid_thw: Any, merge_sizes: Any) -> Any:
            hidden = self.embed(pixel_values.to(self.embed.weight.dtype))
            sizes = [rows * columns for frames, rows, columns in grid_thw.tolist() for _ in range(frames)]
            out = torch.empty_like(hidden)
            for _ in range(widths["num_hidden_layers"]):
                query, key, value = self.square(hidden), self.square(hidden), self.square(hidden)
                start = 0
                for size in sizes:
                    q, k, v = (
                        states[start : start + size].view(size, heads, -1).transpose(0, 1)
                        for states in (query, key, value)
                    )
                    torch.matmul(torch.matmul(q, k.transpose(1, 2)), v)
                    start += size
                self.square(value)
                for rows in range(0, hidden.shape[0], 1024):
                    out[rows : rows + 1024] = self.down(self.up(hidden[rows : rows + 1024]))
            return BaseModelOutput(last_hidden_state=out)

    return Products()


def make_batch(spec: dict[str, Any]) -> dict[str, Any]:
    """Random normalised patches for the grids of an input."""
    import torch

    items = inputs_of(spec)[spec["input"]]
    grids = torch.tensor([grid for grid, _ in items])
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand((int(grids.prod(dim=1).sum()), 588), generator=generator) * 2 - 1
    return {
        "pixel_values": pixels.to(spec["device"]),
        "grid_thw": grids.to(spec["device"]),
        "merge_sizes": torch.tensor([merge for _, merge in items]).to(spec["device"]),
    }


def encode(model: Any, batch: dict[str, Any]) -> Any:
    """Visual tokens before the projector; both classes have one signature."""
    import torch

    tokens = model(**batch).last_hidden_state
    if tokens.device.type == "cuda":
        torch.cuda.synchronize()
    return tokens


if __name__ == "__main__":
    main()
