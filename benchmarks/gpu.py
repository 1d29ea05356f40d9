"""Everything that needs a card, in one command of less than 8 minutes.

    python benchmarks/gpu.py

NOT YET RUN ON A CARD: written and tested at toy size on the CPU only (`--toy`); its figures are still to come.

Sections, each a process of its own with a time limit, so that one that fails leaves the others:

- `equality`: the tests of tests/modeling, which on CUDA compare every backend forward and backward;
- `matmul`: the highest bf16 rate of plain matrix products, the ceiling that the others are divided by;
- `encoder`: so400m in bf16, 8, 32 and 180 frames of 24 x 42 patches and many small images, ours by default, ours on
  sdpa and transformers' own on sdpa: time, share of the ceiling, peak memory, largest difference;
- `prefill`: the 7B with 16k tokens, ours and transformers' own on sdpa, logits of the last position;
- `request`: 180 frames at 16k visual tokens beside the 7B: peak memory, time from file to first token, tokens per
  second after it, with a growing and with a static cache;
- `train`: a step of the 2B at 8k tokens of which 3 % are supervised, ours and transformers' own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import models

# Seconds; together below 8 minutes.
LIMITS = {"equality": 90, "matmul": 30, "encoder": 110, "prefill": 70, "request": 110, "train": 60}
CLIPS = {"8 frames": [(8, 24, 42)], "32 frames": [(32, 24, 42)], "180 frames": [(180, 24, 42)]}
SMALL_IMAGES = [(1, rows, columns) for rows in range(4, 28, 2) for columns in range(6, 46, 4)]


def main() -> None:
    parser = common.common_parser(__doc__ or "", rounds=5)
    parser.add_argument("--sections", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    options = parser.parse_args()
    if options.worker:
        spec = json.loads(options.worker)
        common.answer(SECTIONS[spec["section"]](spec))
        return
    device = "cpu" if options.toy else "cuda"
    record: dict[str, Any] = {
        "question": (__doc__ or "").splitlines()[0],
        "command": common.command_line(__file__),
        **common.environment(),
    }
    sections: dict[str, Any] = {}
    for name in options.sections:
        spec = {"section": name, "device": device, "toy": options.toy, "rounds": 1 if options.toy else options.rounds}
        start = time.perf_counter()
        sections[name] = run_section(spec)
        sections[name]["section_seconds"] = round(time.perf_counter() - start, 1)
        print(f"\n{name}\n{json.dumps(sections[name], indent=1)}")
    ceiling = sections.get("matmul", {}).get("tflops")
    if ceiling:
        add_shares(sections, ceiling)
    record["sections"] = sections
    common.write_json("gpu_toy" if options.toy else "gpu", record, folder=options.output)


def run_section(spec: dict[str, Any]) -> dict[str, Any]:
    """What a section hands back, or why it did not."""
    command = [sys.executable, __file__, "--worker", json.dumps(spec)]
    limit = LIMITS[spec["section"]] * (4 if spec["toy"] else 1)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"no result within {limit} s"}
    if done.returncode != 0:
        return {"failed": done.stderr[-2000:]}
    values: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return values


def add_shares(sections: dict[str, Any], ceiling: float) -> None:
    """Rates of encoder and prefill as shares of the card's measured matrix products."""
    sides = [side for case in sections.get("encoder", {}).get("cases", {}).values() for side in case.values()]
    sides += sections.get("prefill", {}).get("sides", {}).values()
    for side in sides:
        side["share_of_matmul"] = round(side["tflops"] / ceiling, 3)


# ---------------------------------------------------------------------------------------------- workers


def cost_of(call: Callable[[], Any], device: str, rounds: int) -> dict[str, float]:
    """Median seconds of `rounds` calls after one to warm up, and the highest memory of a call above what was there."""
    import torch

    call()
    base = 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = (torch.cuda.max_memory_allocated() - base) / 2**20 if device == "cuda" else 0.0
    return {"seconds": common.middle(seconds)["median"], "peak_mib": round(peak, 1)}


def equality(spec: dict[str, Any]) -> dict[str, Any]:
    """Runs the tests that compare backends."""
    root = Path(__file__).resolve().parent.parent
    names = ["test_backends", "test_torch_varlen"]
    if not spec["toy"]:
        names += ["test_packed_attention", "test_packed_documents", "test_repeated_frames", "test_encoder_compile"]
    files = [f"tests/modeling/{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "not slow", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return {"passed": done.returncode == 0, "summary": done.stdout.strip().splitlines()[-12:]}


def matmul(spec: dict[str, Any]) -> dict[str, Any]:
    """Best rate over a few sizes of square products in bf16."""
    import torch

    rates = {}
    for size in [64] if spec["toy"] else [4096, 8192, 16384]:
        left, right = torch.randn(2, size, size, device=spec["device"], dtype=torch.bfloat16)
        seconds = cost_of(lambda left=left, right=right: left @ right, spec["device"], 4 * spec["rounds"])["seconds"]
        rates[str(size)] = round(2 * size**3 / seconds / 1e12, 3)
    name = "cpu" if spec["device"] == "cpu" else torch.cuda.get_device_name()
    return {"device": name, "tflops": max(rates.values()), "sizes": rates}


def encoder(spec: dict[str, Any]) -> dict[str, Any]:
    """Ours by default, ours on sdpa, transformers' own on sdpa, with the same weights."""
    import torch

    vision = models.TOY_VISION if spec["toy"] else models.SO400M
    options = {"device": spec["device"], "dtype": torch.bfloat16}
    sides = {
        "ours": models.build_encoder("ours", vision, **options),
        "ours_sdpa": models.build_encoder("ours", vision, attention="sdpa", **options),
        "native_sdpa": models.build_encoder("native", vision, attention="sdpa", **options),
    }
    for side in sides.values():
        side.load_state_dict(sides["ours"].state_dict())
    cases = {**CLIPS, f"{len(SMALL_IMAGES)} small images": SMALL_IMAGES}
    if spec["toy"]:
        cases = {"toy clip": [(2, 4, 6)], "toy images": [(1, 2, 4), (1, 4, 6), (1, 2, 4)]}
    results: dict[str, Any] = {}
    with torch.inference_mode():
        for name, grids in cases.items():
            inputs = models.patches(grids, 2, device=spec["device"])
            flops = models.vision_flops(vision, grids)
            tokens = {side: model(*inputs).last_hidden_state for side, model in sides.items()}
            results[name] = {}
            for side, model in sides.items():
                cost = cost_of(lambda model=model, inputs=inputs: model(*inputs), spec["device"], spec["rounds"])
                difference = (tokens[side].float() - tokens["native_sdpa"].float()).abs().max().item()
                results[name][side] = {
                    **cost,
                    "tflops": round(flops / cost["seconds"] / 1e12, 4),
                    "difference_from_native": difference,
                }
            # Frames differ in all bits: what looking for repeated ones costs.
            sides["ours"].config.reuse_identical_frames = False
            without = cost_of(lambda inputs=inputs: sides["ours"](*inputs), spec["device"], spec["rounds"])
            sides["ours"].config.reuse_identical_frames = True
            results[name]["ours"]["seconds_without_reuse"] = without["seconds"]
    return {"attention": sides["ours"]._attention(tokens["ours"]).implementation, "cases": results}


def prefill(spec: dict[str, Any]) -> dict[str, Any]:
    """Text of 16k tokens through the 7B, logits of the last position, transformers' own on sdpa."""
    import torch

    text = models.TOY_TEXT if spec["toy"] else models.QWEN_7B
    tokens = 64 if spec["toy"] else 16384
    ids = torch.randint(0, text["vocab_size"] - 8, (1, tokens), device=spec["device"])
    sides = {}
    for side in ("ours", "native"):
        model = models.build_model(side, text, models.TOY_VISION, device=spec["device"], dtype=torch.bfloat16)
        with torch.inference_mode():
            cost = cost_of(
                lambda model=model: model(input_ids=ids, use_cache=True, logits_to_keep=1),
                spec["device"],
                min(spec["rounds"], 3),
            )
        sides[side] = {**cost, "tflops": round(models.text_flops(text, tokens) / cost["seconds"] / 1e12, 4)}
        del model
        if spec["device"] == "cuda":
            torch.cuda.empty_cache()
    return {"tokens": tokens, "sides": sides}


def request(spec: dict[str, Any]) -> dict[str, Any]:
    """A clip of 180 seconds through processor and model, to the first token and beyond."""
    import torch

    from videollama3.random_checkpoint import build_random

    text, vision = (models.TOY_TEXT, models.TOY_VISION) if spec["toy"] else (models.QWEN_7B, models.SO400M)
    model = models.build_model("ours", text, vision, device=spec["device"], dtype=torch.bfloat16)
    _, processor = build_random(max_tokens=64 if spec["toy"] else 16384)
    vocabulary = processor.tokenizer.get_vocab()
    model.config.image_token_id = vocabulary["<|image_pad|>"]
    model.config.video_token_id = vocabulary["<|video_pad|>"]
    seconds, width, height = (3, 96, 64) if spec["toy"] else (180, 640, 360)
    new_tokens = 4 if spec["toy"] else 64
    with tempfile.TemporaryDirectory() as folder:
        clip = write_clip(Path(folder) / "clip.mp4", seconds=seconds, width=width, height=height)

        def prepare() -> Any:
            content = [{"type": "video", "path": str(clip), "fps": 1}, {"type": "text", "text": "What happens?"}]
            return processor(
                conversation=[{"role": "user", "content": content}], add_generation_prompt=True, return_tensors="pt"
            ).to(spec["device"])

        def answer(count: int, **options: Any) -> tuple[float, float]:
            """Seconds in the processor, and in the model."""
            start = time.perf_counter()
            inputs = prepare()
            prepared = time.perf_counter()
            model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, **options)
            if spec["device"] == "cuda":
                torch.cuda.synchronize()
            return prepared - start, time.perf_counter() - prepared

        answer(2)
        if spec["device"] == "cuda":
            torch.cuda.reset_peak_memory_stats()
        processor_seconds, first = answer(1)
        _, all_tokens = answer(new_tokens)
        peak = torch.cuda.max_memory_allocated() / 2**20 if spec["device"] == "cuda" else 0.0
        inputs = prepare()
        # Compiling the decoding step would take longer than this script may.
        static = {"cache_implementation": "static", "disable_compile": True}
        _, static_first = answer(1, **static)
        _, static_all = answer(new_tokens, **static)
    kept = int(inputs["video_compression_mask"].sum())
    return {
        "frames": int(inputs["video_grid_thw"][0, 0]),
        "visual_tokens": inputs["video_compression_mask"].numel(),
        "kept_tokens": kept,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "weights_mib": round(sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20, 1),
        "peak_mib": round(peak, 1),
        "processor_seconds": processor_seconds,
        "seconds_to_first_token": processor_seconds + first,
        "tokens_per_second": (new_tokens - 1) / max(all_tokens - first, 1e-9),
        "tokens_per_second_static_cache": (new_tokens - 1) / max(static_all - static_first, 1e-9),
    }


def write_clip(path: Path, *, seconds: int, width: int, height: int) -> Path:
    """A clip in which every frame differs: moving noise, two frames per second."""
    import av
    import numpy as np

    generator = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(2 * seconds):
            coarse = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(coarse.repeat(8, axis=0).repeat(8, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward of one row, both sides; needs what benchmarks/prefill.py builds."""
    import prefill as prefill_script

    sides = {}
    for side in ("ours", "native"):
        setting = {
            "task": "train",
            "side": side,
            "device": spec["device"],
            "toy": spec["toy"],
            "layers": 2 if spec["toy"] else 28,
            "tokens": 64 if spec["toy"] else 8192,
        }
        sides[side] = common.run_fresh(prefill_script.__file__, setting)
    return {"sides": sides}


SECTIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "equality": equality,
    "matmul": matmul,
    "encoder": encoder,
    "prefill": prefill,
    "request": request,
    "train": train,
}


if __name__ == "__main__":
    main()
