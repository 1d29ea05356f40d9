"""Everything that needs a card, in one command of less than 8 minutes.

    python benchmarks/gpu.py

`--toy` runs it on the CPU at toy size. Where flash-attn is installed, `flash_attention_2` is one more side.

Sections, each a process of its own with a time limit, so that one that fails leaves the others, as one side of a
section does:

- `equality`: the tests of tests/modeling that run on the device: every backend, forward and backward;
- `flex`: those of `flex_attention`, which compiles for each shape;
- `matmul`: the highest bf16 rate of plain matrix products, the ceiling that the others are divided by;
- `encoder`: so400m in bf16, 8, 32 and 180 frames of 24 x 42 patches and many small images, ours by default, ours on
  sdpa, and transformers' own on sdpa: time, share of the ceiling, peak memory, largest difference;
- `compiled`: 9 of the 27 layers with and without `torch.compile`, 32 frames and the small images, and what compiling
  takes;
- `profile`: where the encoder's time goes, by kernel, and the rates of its linear layers and of sdpa's backends alone;
- `prefill`: the 7B with 16k tokens, ours and transformers' own on sdpa, logits of the last position;
- `request`: 180 frames at 16k visual tokens beside the 7B, in no more memory than a 24 GB card has: peak memory, time
  from file to first token, tokens per second after it, with a growing and with a static cache;
- `train`: a step of the 2B at 8k tokens of which 3 % are supervised, ours and transformers' own;
- `demonstrator`: the trained checkpoint of the package: its answers in bfloat16 on the card and in float32 on the CPU,
  and those of a streaming session on the card.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import models

FLASH = "flash_attention_2"
# MiB that programs can use of a card sold as 24 GB (24,564) once its context and a desktop have theirs.
CARD_MIB = 23552
# Seconds; together 8 minutes.
LIMITS = {
    "equality": 60,
    "flex": 40,
    "matmul": 15,
    "encoder": 75,
    "compiled": 50,
    "profile": 30,
    "prefill": 40,
    "request": 60,
    "train": 75,
    "demonstrator": 35,
}
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
    # A session of its own: what a section started ends with it, and does not keep the card from the next.
    worker = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = worker.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.communicate()
        return {"failed": f"no result within {limit} s"}
    if worker.returncode != 0:
        return {"failed": errors[-2000:]}
    values: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return values


def add_shares(sections: dict[str, Any], ceiling: float) -> None:
    """Rates of encoder and prefill as shares of the card's measured matrix products."""
    sides = [side for case in sections.get("encoder", {}).get("cases", {}).values() for side in case.values()]
    sides += sections.get("prefill", {}).get("sides", {}).values()
    sides += [side for case in sections.get("compiled", {}).get("cases", {}).values() for side in case.values()]
    for side in sides:
        if "tflops" in side:
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


def tried(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What one side gives, or why it does not: out of memory, no kernel, no compiler."""
    try:
        return measure()
    except (RuntimeError, ImportError) as error:
        return {"failed": f"{type(error).__name__}: {error}"[-1000:]}


def has_flash(spec: dict[str, Any]) -> bool:
    """Whether flash-attn is there and can run."""
    return spec["device"] == "cuda" and common.has_module("flash_attn")


def equality(spec: dict[str, Any]) -> dict[str, Any]:
    """Runs the tests that compare backends."""
    root = Path(__file__).resolve().parent.parent
    # Those that compare backends on the device; of the others only one of test_device_map.py leaves the CPU.
    files = [f"tests/modeling/{name}.py" for name in ("test_backends", "test_torch_varlen")]
    chosen = ["-k", "flex_attention"] if spec["section"] == "flex" else ["-m", "not slow"]
    if spec["section"] == "flex" and spec["toy"]:
        # Minutes on the CPU.
        chosen.append("--collect-only")
    quiet = ["--tb=no", "-q", "-rfEs", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *chosen, *quiet, *files]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return {"passed": done.returncode == 0, "summary": done.stdout.strip().splitlines()[-24:]}


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
    if has_flash(spec):
        sides[f"ours_{FLASH}"] = models.build_encoder("ours", vision, attention=FLASH, **options)
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
            native = tried(lambda inputs=inputs: {"tokens": sides["native_sdpa"](*inputs).last_hidden_state.float()})
            measured = {}
            for side, model in sides.items():
                call = functools.partial(model, *inputs)
                measured[side] = tried(functools.partial(_encoder_side, call, native.get("tokens"), flops, spec))
            results[name] = measured
            # Frames differ in all bits: what looking for repeated ones costs.
            sides["ours"].config.reuse_identical_frames = False
            call = functools.partial(sides["ours"], *inputs)
            without = tried(functools.partial(cost_of, call, spec["device"], spec["rounds"]))
            sides["ours"].config.reuse_identical_frames = True
            measured["ours"]["seconds_without_reuse"] = without.get("seconds")
    states = torch.zeros(1, vision["hidden_size"], device=spec["device"], dtype=torch.bfloat16)
    return {"attention": sides["ours"]._attention(states).implementation, "cases": results}


def _encoder_side(call: Callable[[], Any], expected: Any, flops: float, spec: dict[str, Any]) -> dict[str, Any]:
    """Cost of an encoder's pass, its rate, and how far its tokens are from those expected, None without these."""
    tokens = call().last_hidden_state.float()
    difference = None if expected is None else (tokens - expected).abs().max().item()
    del tokens
    cost = cost_of(call, spec["device"], spec["rounds"])
    return {**cost, "tflops": round(flops / cost["seconds"] / 1e12, 4), "difference": difference}


def compiled(spec: dict[str, Any]) -> dict[str, Any]:
    """A third of the encoder's layers, as they are and compiled for all lengths in one graph."""
    import torch

    vision = models.TOY_VISION if spec["toy"] else {**models.SO400M, "num_hidden_layers": 9}
    options = {"device": spec["device"], "dtype": torch.bfloat16}
    plain, graph = (models.build_encoder("ours", vision, **options) for _ in range(2))
    graph.load_state_dict(plain.state_dict())
    # Without a card there need be no compiler.
    graph.encoder.compile(fullgraph=True, dynamic=True, backend="eager" if spec["toy"] else "inductor")
    cases = {"toy clip": [(2, 4, 6)], "toy images": [(1, 2, 4), (1, 4, 6), (1, 2, 4)]}
    if not spec["toy"]:
        cases = {"32 frames": CLIPS["32 frames"], f"{len(SMALL_IMAGES)} small images": SMALL_IMAGES}
    results: dict[str, Any] = {}
    with torch.inference_mode():
        for name, grids in cases.items():
            inputs = models.patches(grids, 2, device=spec["device"])
            flops = models.vision_flops(vision, grids)
            expected = tried(lambda inputs=inputs: {"tokens": plain(*inputs).last_hidden_state.float()}).get("tokens")
            results[name] = {}
            for side, model in {"ours": plain, "ours_compiled": graph}.items():
                call, start = functools.partial(model, *inputs), time.perf_counter()
                first = tried(lambda call=call: {"tokens": len(call().last_hidden_state)})
                seconds = time.perf_counter() - start
                measure = functools.partial(_encoder_side, call, expected, flops, spec)
                results[name][side] = first if "failed" in first else {**tried(measure), "seconds_of_first": seconds}
    return {"layers": vision["num_hidden_layers"], "cases": results}


def profile(spec: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of the encoder by kernel (one pass of 58 frames), and what its parts reach alone."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    vision, device = (models.TOY_VISION if spec["toy"] else models.SO400M), spec["device"]
    frames, rows, columns = (2, 4, 6) if spec["toy"] else (58, 24, 42)
    model = models.build_encoder("ours", vision, device=device, dtype=torch.bfloat16)
    model.config.reuse_identical_frames = False
    inputs = models.patches([(frames, rows, columns)], 2, device=device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    kind = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    with torch.inference_mode():
        seconds = cost_of(lambda: model(*inputs), device, spec["rounds"])["seconds"]
        with torch.profiler.profile(activities=activities) as profiler:
            model(*inputs)
        events = [event for event in profiler.key_averages() if getattr(event, kind) > 0]
        if device == "cuda":
            events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        events.sort(key=lambda event: -getattr(event, kind))
        linear = {}
        width, inner, heads = vision["hidden_size"], vision["intermediate_size"], vision["num_attention_heads"]
        segment, options = rows * columns, {"device": device, "dtype": torch.bfloat16}
        states = torch.randn(frames * segment // 3, width, **options)
        for out in (width, 3 * width, inner):
            layer = torch.nn.Linear(width, out, **options)
            cost = cost_of(lambda layer=layer: layer(states), device, 4 * spec["rounds"])["seconds"]
            linear[f"{len(states)} x {width} x {out}"] = round(2 * len(states) * width * out / cost / 1e12, 4)
        attention = {}
        query, key, value = torch.randn(3, frames // 2, heads, segment, width // heads, **options)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if device == "cuda" else ():
            with sdpa_kernel(backend):
                attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, query, key, value)
                cost = tried(lambda attend=attend: cost_of(attend, device, 20))
            flops = 4 * len(query) * segment**2 * width
            attention[backend.name] = round(flops / cost["seconds"] / 1e12, 1) if "seconds" in cost else cost
    return {
        "frames": frames,
        "seconds": seconds,
        "ms_by_kernel": {event.key[:120]: round(getattr(event, kind) / 1000, 2) for event in events[:16]},
        "tflops_of_linear_layers": linear,
        "tflops_of_attention": attention,
    }


def prefill(spec: dict[str, Any]) -> dict[str, Any]:
    """Text of 16k tokens through the 7B, logits of the last position, transformers' own on sdpa."""
    import torch

    text = models.TOY_TEXT if spec["toy"] else models.QWEN_7B
    tokens = 64 if spec["toy"] else 16384
    ids = torch.randint(0, text["vocab_size"] - 8, (1, tokens), device=spec["device"])
    built = {"ours": ("ours", None), "native": ("native", None)}
    if has_flash(spec):
        built[f"ours_{FLASH}"] = ("ours", FLASH)
    sides = {}
    for side, (family, attention) in built.items():
        options = {"device": spec["device"], "dtype": torch.bfloat16, "attention": attention}

        def measure(family: str = family, options: dict[str, Any] = options) -> dict[str, Any]:
            model = models.build_model(family, text, models.TOY_VISION, **options)
            call = functools.partial(model, input_ids=ids, use_cache=True, logits_to_keep=1)
            with torch.inference_mode():
                cost = cost_of(call, spec["device"], min(spec["rounds"], 3))
            return {**cost, "tflops": round(models.text_flops(text, tokens) / cost["seconds"] / 1e12, 4)}

        sides[side] = tried(measure)
        if spec["device"] == "cuda":
            torch.cuda.empty_cache()
    return {"tokens": tokens, "sides": sides}


def request(spec: dict[str, Any]) -> dict[str, Any]:
    """A clip of 180 seconds through processor and model, to the first token and beyond."""
    import torch

    from videollama3.random_checkpoint import build_random

    if spec["device"] == "cuda":
        whole = torch.cuda.get_device_properties(0).total_memory / 2**20
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_MIB / whole))
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
        cuda = spec["device"] == "cuda"
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
        reserved = torch.cuda.max_memory_reserved() / 2**20 if cuda else 0.0
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
        "allowed_mib": CARD_MIB,
        "peak_mib": round(peak, 1),
        "peak_reserved_mib": round(reserved, 1),
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
    # Those that a smaller card can hold come first.
    for checkpointing, side in itertools.product((True, False), ("ours", "native")):
        setting = {
            "task": "train",
            "side": side,
            "checkpointing": checkpointing,
            "device": spec["device"],
            "toy": spec["toy"],
            "layers": 2 if spec["toy"] else 28,
            "tokens": 64 if spec["toy"] else 8192,
        }
        name = f"{side}_checkpointed" if checkpointing else side
        sides[name] = tried(functools.partial(common.run_fresh, prefill_script.__file__, setting))
    return {"sides": sides}


def demonstrator(spec: dict[str, Any]) -> dict[str, Any]:
    """Answers of the package's checkpoint: bfloat16 on the card, float32 on the CPU, and a session's on the card."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import videollama3

    root = Path(__file__).resolve().parent.parent
    sys.path.insert(0, str(root))
    from demonstrator.evaluate import answer, make_questions
    from demonstrator.questions import is_right

    folder = str(videollama3.demonstrator_path())
    processor = AutoProcessor.from_pretrained(folder)
    settings = {"card": (spec["device"], torch.bfloat16), "cpu": ("cpu", torch.float32)}
    said: dict[str, list[str]] = {}
    of_session: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as media:
        few = spec["toy"]
        questions = make_questions(Path(media), num_pictures=2 if few else 8, num_clips=2 if few else 12)
        for name, (device, dtype) in settings.items():
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device).eval()
            said[name] = [one.text for one in answer(model, processor, questions)]
            if name == "card":
                of_session = _session_answers(model, processor, questions, said[name])
    right = {
        name: sum(is_right(question.turn, text) for question, text in zip(questions, texts, strict=True))
        for name, texts in said.items()
    }
    return {
        "questions": len(questions),
        "right": right,
        "same_text": sum(one == other for one, other in zip(said["card"], said["cpu"], strict=True)),
        **of_session,
    }


def _session_answers(model: Any, processor: Any, questions: list[Any], expected: list[str]) -> dict[str, Any]:
    """Of the first questions on clips, how many a session of the same frames answers in the same words."""
    from videollama3.streaming import StreamingSession

    clips = [(q, text) for q, text in zip(questions, expected, strict=True) if q.media == "video"][:40]
    same = 0
    for question, text in clips:
        with StreamingSession(model, processor, system_prompt=question.add_system_prompt) as session:
            session.show_video(question.path)
            same += "".join(session.ask(question.turn.question, max_new_tokens=96)).strip() == text
    return {"session_questions": len(clips), "session_same_text": same}


SECTIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "equality": equality,
    "flex": equality,
    "matmul": matmul,
    "encoder": encoder,
    "compiled": compiled,
    "profile": profile,
    "prefill": prefill,
    "request": request,
    "train": train,
    "demonstrator": demonstrator,
}


if __name__ == "__main__":
    main()
