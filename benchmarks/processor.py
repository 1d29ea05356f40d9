"""How much do files -> tensors cost: our processors against transformers' own for VideoLLaMA3?

    python benchmarks/processor.py

Both get the same files and the settings of the released checkpoints (fps 1, at most 180 frames, 16384 visual
tokens, mean and std 0.5). The peer decodes with torchcodec where it can be imported, else with PyAV. Without
torchvision its video processor cannot be built: then only its decoding (PyAV) and its image processor for
Pillow are measured, and the output says so. Every figure comes from processes of their own that have warmed
up on other, small media; sides take turns.

The sides do not choose the same frames of a video (the peer takes the first of each second, ours follows the
training rule), so tensors of videos agree in shape, not in values. The clip of which 8 frames are taken stands
for long videos at their cap: 15 seconds from frame to frame, as 180 frames of 45 minutes.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common

SMALL_SIZES = ((224, 224), (320, 240), (199, 301), (400, 300), (256, 384), (350, 350), (480, 270), (123, 177))
CASES: dict[str, dict[str, Any]] = {
    "video 12 s 640x360": {"kind": "video", "seconds": 12, "width": 640, "height": 360},
    "video 60 s 1280x720": {"kind": "video", "seconds": 60, "width": 1280, "height": 720},
    "video 120 s 640x360, 8 frames": {"kind": "video", "seconds": 120, "width": 640, "height": 360, "max_frames": 8},
    "image 1023x517": {"kind": "images", "sizes": [(1023, 517)], "inner": 10},
    "8 small images": {"kind": "images", "sizes": SMALL_SIZES, "inner": 10},
}
TOY_CASES: dict[str, dict[str, Any]] = {
    "video 5 s 96x64": {"kind": "video", "seconds": 5, "width": 96, "height": 64},
    "2 small images": {"kind": "images", "sizes": SMALL_SIZES[:2], "inner": 1},
}
WARM_UP = {"video": {"seconds": 2, "width": 96, "height": 64}, "images": {"sizes": [(90, 60), (60, 90)]}}
SIDES = {
    "ours": "ours",
    "ours_uint8": "ours, uint8",
    "native": "native",
    "native_pil": "native, Pillow",
    "ours_decoding": "ours, decoding only",
    "native_decoding": "native, decoding only",
}
# What may be compared with what.
PAIRS = (
    ("ours", "native"),
    ("ours_uint8", "native"),
    ("ours", "native_pil"),
    ("ours_decoding", "native_decoding"),
)
MIN_TOKENS, MAX_TOKENS, MAX_FRAMES = 16, 16384, 180
HALF = [0.5, 0.5, 0.5]


def main() -> None:
    parser = common.common_parser(__doc__ or "", rounds=5)
    parser.add_argument("--repeats", type=int, default=3, help="timed calls per process (default 3)")
    parser.add_argument("--decoder", choices=("torchcodec", "pyav"), help="the peer's (default: fastest there)")
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return
    environment = common.environment()
    peer = common.run_fresh(__file__, {"probe": True})
    decoder = options.decoder or ("torchcodec" if peer["torchcodec"] is None else "pyav")
    notes = say_what_is_missing(peer, decoder)
    rounds, repeats = (1, 1) if options.toy else (options.rounds, options.repeats)
    cases = {
        name: run_case(name, case, sides_of(case, peer), decoder=decoder, rounds=rounds, repeats=repeats)
        for name, case in (TOY_CASES if options.toy else CASES).items()
    }
    print()
    show(cases)
    record = {
        "question": (__doc__ or "").splitlines()[0],
        "command": common.command_line(__file__),
        **environment,
        "peer": {"decoder": decoder, "notes": notes},
        "cases": cases,
    }
    common.write_json("processor_toy" if options.toy else "processor", record, folder=options.output)


def say_what_is_missing(peer: dict[str, Any], decoder: str) -> list[str]:
    """Prints and returns what of the peer is left out."""
    notes = []
    if peer["torchvision"] is not None:
        notes.append(
            f"torchvision cannot be imported ({peer['torchvision']}), so transformers' video processor cannot be "
            "built: of the peer only decoding with PyAV and its image processor for Pillow are measured."
        )
    elif decoder == "pyav":
        notes.append(f"The peer decodes with PyAV (torchcodec: {peer['torchcodec'] or 'not asked for'}).")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return notes


def sides_of(case: dict[str, Any], peer: dict[str, Any]) -> list[str]:
    """Which sides a case has with the modules that are there."""
    if peer["torchvision"] is not None:
        return ["ours", "ours_decoding", "native_decoding"] if case["kind"] == "video" else ["ours", "native_pil"]
    return ["ours", "native", "ours_uint8"] if case["kind"] == "video" else ["ours", "native", "native_pil"]


def run_case(
    name: str, case: dict[str, Any], sides: Sequence[str], *, decoder: str, rounds: int, repeats: int
) -> dict[str, Any]:
    """Measures one case on all sides, in turns."""
    paths = [str(path) for path in make_media(case)]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(rounds):
        print(f"\r{name}: round {number + 1} of {rounds}   ", end="", file=sys.stderr, flush=True)
        # A B, B A, ...: neither always follows the other.
        for side in sides[:: 1 if number % 2 == 0 else -1]:
            spec = {
                "side": side,
                "kind": case["kind"],
                "paths": paths,
                "decoder": decoder,
                "repeats": repeats,
                "inner": case.get("inner", 1),
                "max_frames": case.get("max_frames", MAX_FRAMES),
            }
            runs[side].append(common.run_fresh(__file__, spec))
    print(file=sys.stderr)
    measured = {side: summarize(side_runs) for side, side_runs in runs.items()}
    ratios = {
        f"{SIDES[side]} / {SIDES[peer]}": {
            figure: common.ratio(measured[side][figure], measured[peer][figure])
            for figure in ("wall_seconds", "cpu_seconds", "peak_mib")
        }
        for side, peer in PAIRS
        if side in measured and peer in measured
    }
    return {"sides": measured, "ratios": ratios}


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all calls of all rounds."""
    return {
        "wall_seconds": common.middle([value for run in runs for value in run["wall_seconds"]]),
        "cpu_seconds": common.middle([value for run in runs for value in run["cpu_seconds"]]),
        "peak_mib": common.middle([run["peak_mib"] for run in runs]),
        "shape": runs[0]["shape"],
        "torch_threads": runs[0]["torch_threads"],
    }


def show(cases: dict[str, Any]) -> None:
    """Prints the figures, then the ratios."""
    rows = [
        [
            name,
            SIDES[side],
            common.spread(values["wall_seconds"], digits=3),
            common.spread(values["cpu_seconds"], digits=3),
            common.spread(values["peak_mib"], digits=0),
            " x ".join(str(size) for size in values["shape"]),
        ]
        for name, case in cases.items()
        for side, values in case["sides"].items()
    ]
    common.print_table(["case", "side", "wall s (min-max)", "CPU s (min-max)", "peak MiB", "tensor"], rows)
    print("\nRatios of medians (of minima); below 1 ours is cheaper.")
    rows = [
        [name, label, *(common.show_ratio(values[figure]) for figure in ("wall_seconds", "cpu_seconds", "peak_mib"))]
        for name, case in cases.items()
        for label, values in case["ratios"].items()
    ]
    common.print_table(["case", "ratio", "wall", "CPU", "peak memory"], rows)


def make_media(case: dict[str, Any]) -> list[Path]:
    """Paths of a case's files, made where they are missing."""
    import media

    if "sizes" in case:
        return media.photos(case["sizes"])
    return [media.clip(seconds=case["seconds"], width=case["width"], height=case["height"])]


# ---------------------------------------------------------------------------------------------- workers


def work(spec: dict[str, Any]) -> None:
    """One process of one side: sets up, warms up, measures, answers."""
    if spec.get("probe"):
        common.answer({"torchvision": import_torchvision(), "torchcodec": import_torchcodec()})
        return
    # On every side: transformers itself imports torchvision where it is installed.
    import_torchvision()
    call = SETUPS[spec["side"]](spec)
    call([str(path) for path in make_media(WARM_UP[spec["kind"]])])
    shape: list[int] = []

    def run() -> Any:
        for _ in range(spec["inner"]):
            result = call(spec["paths"])
        shape[:] = result.shape
        return result

    cost = common.measure(run, repeats=spec["repeats"])
    import torch

    common.answer(
        {
            "wall_seconds": [value / spec["inner"] for value in cost.wall_seconds],
            "cpu_seconds": [value / spec["inner"] for value in cost.cpu_seconds],
            "peak_mib": cost.peak_mib,
            "shape": shape,
            "torch_threads": torch.get_num_threads(),
        }
    )


Call = Callable[[list[str]], Any]
Spec = dict[str, Any]


def set_up_ours(spec: Spec, pixel_dtype: str = "float32") -> Call:
    import videollama3

    settings: dict[str, Any] = {"min_tokens": MIN_TOKENS, "max_tokens": MAX_TOKENS, "pixel_dtype": pixel_dtype}
    if spec["kind"] == "images":
        images = videollama3.VideoLlama3ImageProcessor(**settings)
        return lambda paths: images(paths, return_tensors="pt")["pixel_values"]
    videos = videollama3.VideoLlama3VideoProcessor(**settings, fps=1, max_frames=spec["max_frames"])
    return lambda paths: videos(paths, return_tensors="pt")["pixel_values_videos"]


def set_up_ours_uint8(spec: Spec) -> Call:
    return set_up_ours(spec, pixel_dtype="uint8")


def set_up_ours_decoding(spec: Spec) -> Call:
    import numpy as np

    from videollama3.processing.video_reading import plan_video, read_frames

    def call(paths: list[str]) -> Any:
        plans = [plan_video(path, name=path, fps=1, max_frames=spec["max_frames"]) for path in paths]
        return np.stack([frame for plan in plans for frame in read_frames(plan)])

    return call


def set_up_native(spec: Spec) -> Call:
    if spec["kind"] == "images":
        return set_up_native_images("image_processing_video_llama_3", "VideoLlama3ImageProcessor")
    module = importlib.import_module("transformers.models.video_llama_3.video_processing_video_llama_3")
    # Released settings; sizes in pixels of one 2x2-merged token.
    processor = module.VideoLlama3VideoProcessor(
        size={"shortest_edge": MIN_TOKENS * 28 * 28, "longest_edge": MAX_TOKENS * 28 * 28},
        image_mean=HALF,
        image_std=HALF,
    )
    sampling = {"fps": 1, "max_frames": spec["max_frames"]}
    if spec["decoder"] == "torchcodec":
        import_torchcodec()
        return lambda paths: processor(videos=paths, do_sample_frames=True, return_tensors="pt", **sampling)[
            "pixel_values_videos"
        ]
    from transformers.video_utils import load_video

    def call(paths: list[str]) -> Any:
        loaded = [
            load_video(
                path,
                backend="pyav",
                sample_indices_fn=lambda metadata, **_: processor.sample_frames(metadata, **sampling),
            )
            for path in paths
        ]
        return processor(
            videos=[frames for frames, _ in loaded],
            video_metadata=[metadata for _, metadata in loaded],
            do_sample_frames=False,
            return_tensors="pt",
        )["pixel_values_videos"]

    return call


def set_up_native_pil(spec: Spec) -> Call:
    return set_up_native_images("image_processing_pil_video_llama_3", "VideoLlama3ImageProcessorPil")


def set_up_native_images(module_name: str, class_name: str) -> Call:
    module = importlib.import_module(f"transformers.models.video_llama_3.{module_name}")
    from transformers.image_utils import load_image

    processor = getattr(module, class_name)(
        size={"shortest_edge": MIN_TOKENS * 14 * 14, "longest_edge": MAX_TOKENS * 14 * 14},
        image_mean=HALF,
        image_std=HALF,
    )
    return lambda paths: processor([load_image(path) for path in paths], return_tensors="pt")["pixel_values"]


def set_up_native_decoding(spec: Spec) -> Call:
    import numpy as np
    from transformers.video_utils import load_video

    def indices(metadata: Any, **_: Any) -> Any:
        count = min(spec["max_frames"], int(metadata.total_num_frames / metadata.fps))
        return np.arange(0, metadata.total_num_frames, metadata.total_num_frames / count).astype(int)

    return lambda paths: np.concatenate(
        [load_video(path, backend="pyav", sample_indices_fn=indices)[0] for path in paths]
    )


SETUPS: dict[str, Callable[[Spec], Call]] = {
    "ours": set_up_ours,
    "ours_uint8": set_up_ours_uint8,
    "ours_decoding": set_up_ours_decoding,
    "native": set_up_native,
    "native_pil": set_up_native_pil,
    "native_decoding": set_up_native_decoding,
}


def import_torchvision() -> str | None:
    """Imports torchvision; returns why it cannot be, or None.

    The wheel on PyPI is built for CUDA. Beside a CPU build of torch its compiled operators are absent, and it
    imports once two of them are declared; the processors use neither.
    """
    try:
        importlib.import_module("torchvision")
        return None
    except ImportError as error:
        return str(error)
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            return str(error)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    import torch

    global _operators
    _operators = torch.library.Library("torchvision", "FRAGMENT")
    _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        importlib.import_module("torchvision")
        return None
    except (ImportError, RuntimeError) as error:
        return str(error)


def import_torchcodec() -> str | None:
    """Imports torchcodec's decoder; returns the first line of why it cannot be, or None."""
    try:
        importlib.import_module("torchcodec.decoders")
        return None
    except (ImportError, RuntimeError, OSError) as error:
        return str(error).strip().splitlines()[0]


if __name__ == "__main__":
    main()
