"""What does a video cost from file to tensors: ours, transformers' processor, and decoding everything?

    python benchmarks/video_input.py

Clips are generated (H.264, moving content): 12 s at 640x360, 60 s and 10 min at 1280x720 with keyframes every
250 frames, 1 h at 640x360 with a keyframe every 2 s, and a screen recording with one every 4 s. Every side gives
`pixel_values_videos` with the settings of the released checkpoints (fps 1, at most 180 frames, 16384 visual
tokens). Sides:

- ours, and ours with `pixel_dtype="uint8"`;
- transformers: its own video processor, decoding with torchcodec where that can be imported, else with PyAV;
- everything: PyAV decodes all frames on all processors and keeps those of the rule, ours makes tensors of them;
- ffmpeg: where the binary is there, the authors' filter (`fps=1:round=down`), all frames piped, ours as above;
- floor: the decoding that the wanted frames need, alone: no conversion, no resizing, one thread.

A second table says where our CPU seconds go, one step after the other in one thread: demuxing all packets for their
times, decoding (the floor), converting wanted frames to RGB, Pillow's resize, and cutting, pruning and normalising.

Each figure is of a process of its own that has warmed up on another clip; sides take turns. Memory is the
highest resident memory above that of the process before the call.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import common
import processor

import media

RATE = [25, 1]
# repeat: a minute is encoded once, and its packets repeated. In the first clip of an hour the frames that transformers
# takes, the first of every 20th second, are all keyframes; at 29.97 frames per second, as in most files, few are.
CASES: dict[str, dict[str, Any]] = {
    "12 s 640x360": {"seconds": 12, "width": 640, "height": 360, "gop": 250},
    "60 s 1280x720": {"seconds": 60, "width": 1280, "height": 720, "gop": 250},
    "10 min 1280x720, GOP 250": {"seconds": 60, "repeat": 10, "width": 1280, "height": 720, "gop": 250},
    "1 h 640x360, GOP 50": {"seconds": 60, "repeat": 60, "width": 640, "height": 360, "gop": 50},
    "1 h 640x360 at 29.97, GOP 60": {
        "seconds": 60,
        "repeat": 60,
        "width": 640,
        "height": 360,
        "gop": 60,
        "rate": [30000, 1001],
    },
    "2 min screen 1280x720, GOP 100": {
        "seconds": 60,
        "repeat": 2,
        "width": 1280,
        "height": 720,
        "gop": 100,
        "screen": 1,
    },
}
QUICK_REPEATS = {10: 3, 60: 10}
TOY_CASES: dict[str, dict[str, Any]] = {
    "4 s 96x64": {"seconds": 2, "repeat": 2, "width": 96, "height": 64, "gop": 25},
}
WARM_UP = {"seconds": 2, "width": 128, "height": 96, "gop": 25}
SIDES = {
    "ours": "ours",
    "ours_uint8": "ours, uint8",
    "native": "transformers",
    "everything": "everything",
    "ffmpeg": "ffmpeg",
    "floor": "floor",
}
PAIRS = (
    ("ours", "native"),
    ("ours_uint8", "native"),
    ("ours", "everything"),
    ("ours", "ffmpeg"),
    ("ours", "floor"),
)
FIGURES = ("wall_seconds", "cpu_seconds", "peak_mib")
STEPS = ("demux", "decode", "to RGB", "resize", "patches")


def main() -> None:
    parser = common.common_parser(__doc__ or "", rounds=5)
    parser.add_argument("--quick", action="store_true", help="shorter long clips, two rounds")
    parser.add_argument("--cache", type=Path, help="folder that keeps the generated clips (default: none are kept)")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="cases whose name contains one of these"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="sides to measure")
    parser.add_argument("--decoder", choices=("torchcodec", "pyav"), help="the peer's (default: fastest there)")
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return
    cases = {
        name: case
        for name, case in (TOY_CASES if options.toy else CASES).items()
        if any(t in name for t in options.only)
    }
    if options.quick:
        cases = {
            name: {**case, "repeat": QUICK_REPEATS.get(case.get("repeat", 1), case.get("repeat", 1))}
            for name, case in cases.items()
        }
    rounds = 1 if options.toy else min(options.rounds, 2) if options.quick else options.rounds
    environment = common.environment()
    peer = common.run_fresh(processor.__file__, {"probe": True})
    decoder = options.decoder or ("torchcodec" if peer["torchcodec"] is None else "pyav")
    notes = missing(peer, decoder)
    absent = {"native"} if peer["torchvision"] is not None else set()
    absent |= set() if shutil.which("ffmpeg") else {"ffmpeg"}
    sides = [side for side in options.sides if side not in absent]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        warm_up = str(make_clip(folder, WARM_UP))
        measured: dict[str, dict[str, Any]] = {}
        record = {
            "question": (__doc__ or "").splitlines()[0],
            "command": common.command_line(__file__),
            **environment,
            "peer": {"decoder": decoder, "notes": notes},
            "cases": measured,
        }
        suffix = "_toy" if options.toy else "_quick" if options.quick else ""
        for name, case in cases.items():
            measured[name] = run_case(name, case, sides, folder, warm_up, decoder, rounds)
            # After each: five rounds of the whole take an hour.
            common.write_json(f"video_input{suffix}", record, folder=options.output)
    show(measured)


def missing(peer: dict[str, Any], decoder: str) -> list[str]:
    """Prints and returns what cannot be measured here."""
    notes = []
    if peer["torchvision"] is not None:
        notes.append(
            f"transformers' video processor needs torchvision, which cannot be imported: {peer['torchvision']}."
        )
    elif decoder == "pyav":
        notes.append(f"transformers' side decodes with PyAV (torchcodec: {peer['torchcodec'] or 'not asked for'}).")
    if not shutil.which("ffmpeg"):
        notes.append("There is no ffmpeg binary: the authors' way is not measured.")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return notes


def run_case(
    name: str, case: dict[str, Any], sides: Sequence[str], folder: Path, warm_up: str, decoder: str, rounds: int
) -> dict[str, Any]:
    """Measures one clip on all sides, in turns."""
    print(f"{name}: encoding", file=sys.stderr)
    path = str(make_clip(folder, case))
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(rounds):
        # A B, B A, ...: neither always follows the other.
        for side in sides[:: 1 if number % 2 == 0 else -1]:
            print(f"{name}: round {number + 1} of {rounds}, {side}", file=sys.stderr)
            spec = {
                "side": side,
                "path": path,
                "warm_up": warm_up,
                "decoder": decoder,
                "kind": "video",
                "max_frames": 180,
            }
            runs[side].append(common.run_fresh(__file__, spec))
    measured = {
        side: {
            **{figure: common.middle([run[figure] for run in side_runs]) for figure in FIGURES},
            "output_mib": side_runs[0]["output_mib"],
        }
        for side, side_runs in runs.items()
    }
    ratios = {
        f"{SIDES[side]} / {SIDES[other]}": {
            figure: common.ratio(measured[side][figure], measured[other][figure]) for figure in FIGURES
        }
        for side, other in PAIRS
        if side in measured and other in measured
    }
    steps = [common.run_fresh(__file__, {"side": "steps", "path": path, "max_frames": 180}) for _ in range(rounds)]
    profile = {step: common.middle([run[step] for run in steps]) for step in STEPS}
    return {"clip": case, "sides": measured, "ratios": ratios, "cpu_seconds_of_steps": profile}


def show(cases: dict[str, dict[str, Any]]) -> None:
    """Prints two tables: figures, and ratios."""
    rows = [
        [
            name,
            SIDES[side],
            *(common.spread(values[figure]) for figure in FIGURES[:2]),
            common.spread(values["peak_mib"], digits=0),
            f"{values['output_mib']:.0f}",
        ]
        for name, case in cases.items()
        for side, values in case["sides"].items()
    ]
    common.print_table(["clip", "side", "wall s (min-max)", "CPU s (min-max)", "peak MiB", "output MiB"], rows)
    print("\nRatios of medians (of minima); below 1 ours is cheaper.")
    rows = [
        [name, label, *(common.show_ratio(values[figure]) for figure in FIGURES)]
        for name, case in cases.items()
        for label, values in case["ratios"].items()
    ]
    common.print_table(["clip", "ratio", "wall", "CPU", "peak memory"], rows)
    print("\nCPU seconds of our steps, medians.")
    rows = [
        [name, *(f"{case['cpu_seconds_of_steps'][step]['median']:.2f}" for step in STEPS)]
        for name, case in cases.items()
    ]
    common.print_table(["clip", *STEPS], rows)


# ---------------------------------------------------------------------------------------------- clips


def make_clip(folder: Path, case: dict[str, Any]) -> Path:
    """A clip of `seconds` of moving content, its packets repeated `repeat` times."""
    repeat = case.get("repeat", 1)
    kind = "screen" if case.get("screen") else "scene"
    name = f"{kind}_{case['seconds']}s_{case['width']}x{case['height']}_gop{case['gop']}_{float(rate_of(case)):.0f}"
    path = folder / f"{name}_x{repeat}.mp4"
    if path.exists():
        return path
    if repeat == 1:
        encode(path, case)
    else:
        concatenate(make_clip(folder, {**case, "repeat": 1}), path, repeat, num_frames(case) / rate_of(case))
    return path


def rate_of(case: dict[str, Any]) -> Fraction:
    return Fraction(*case.get("rate", RATE))


def num_frames(case: dict[str, Any]) -> int:
    return int(case["seconds"] * rate_of(case))


def encode(path: Path, case: dict[str, Any]) -> None:
    import av
    import numpy as np

    width, height = case["width"], case["height"]
    options = {"preset": "veryfast", "crf": "23", "g": str(case["gop"])}
    paint = painter(width, height, screen=bool(case.get("screen")))
    part = path.with_suffix(".part.mp4")
    with av.open(str(part), "w") as container:
        stream = container.add_stream("libx264", rate=rate_of(case), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # PyAV's default, threads by slice, would cut each picture into slices, as files from elsewhere are not.
        stream.codec_context.thread_type = "FRAME"
        for number in range(num_frames(case)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(paint(number)), format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate_of(case)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    part.replace(path)


def painter(width: int, height: int, *, screen: bool) -> Callable[[int], Any]:
    """Pictures by number: a scrolling texture with noise and a moving square, or pages of text and a pointer."""
    import numpy as np

    rng = np.random.default_rng(width)
    if screen:
        pages = [np.where(rng.random((height // 4, width // 2, 1)) < 0.2, 30, 245) for _ in range(4)]
        pages = [np.repeat(np.repeat(page, 4, 0), 2, 1).repeat(3, 2).astype(np.uint8) for page in pages]

        def page_with_pointer(number: int) -> Any:
            picture = pages[number // 150 % len(pages)].copy()
            top, left = (number * 2) % (height - 12), (number * 3) % (width - 12)
            picture[top : top + 12, left : left + 12] = (200, 30, 30)
            return picture

        return page_with_pointer
    texture = media._texture(2 * width, height, seed=width)
    noise = rng.integers(0, 8, (8, height, width, 1), dtype=np.uint8)
    side = height // 4

    def scene(number: int) -> Any:
        offset = abs((number * 2) % (2 * width) - width)
        picture = np.minimum(texture[:, offset : offset + width], 247) + noise[number % len(noise)]
        top, left = (number * 3) % (height - side), (number * 5) % (width - side)
        picture[top : top + side, left : left + side] = (number * 7) % 256
        return picture

    return scene


def concatenate(source: Path, target: Path, repeat: int, seconds: Fraction) -> None:
    """Writes the packets of a file several times over, one after the other."""
    import av

    part = target.with_suffix(".part.mp4")
    with av.open(str(part), "w") as output:
        stream = None
        for number in range(repeat):
            with av.open(str(source)) as container:
                video = container.streams.video[0]
                stream = stream or output.add_stream_from_template(video)
                shift = round(number * seconds / video.time_base)
                for packet in container.demux(video):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.stream = stream
                        output.mux(packet)
    part.replace(target)


# ---------------------------------------------------------------------------------------------- workers


def work(spec: dict[str, Any]) -> None:
    """One process of one side: sets up, warms up, measures, answers."""
    # On every side: transformers itself imports torchvision where it is installed.
    processor.import_torchvision()
    if spec["side"] == "steps":
        common.answer(time_steps(spec["path"], spec["max_frames"]))
        return
    call = SETUPS[spec["side"]](spec)
    call(spec["warm_up"])
    size = [0.0]
    children = resource.getrusage(resource.RUSAGE_CHILDREN)

    def run() -> Any:
        result = call(spec["path"])
        size[0] = result.nbytes / 2**20 if result is not None else 0.0
        return result

    cost = common.measure(run)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    child_cpu = after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
    common.answer(
        {
            "wall_seconds": cost.wall_seconds[0],
            "cpu_seconds": cost.cpu_seconds[0] + child_cpu,
            "peak_mib": cost.peak_mib,
            "output_mib": size[0],
        }
    )


def set_up_ours(spec: dict[str, Any]) -> Callable[[str], Any]:
    call = processor.set_up_ours(spec, "uint8" if spec["side"] == "ours_uint8" else "float32")
    return lambda path: call([path])


def set_up_native(spec: dict[str, Any]) -> Callable[[str], Any]:
    call = processor.set_up_native(spec)
    return lambda path: call([path])


def to_tensors(frames: list[Any], timestamps: Sequence[float]) -> Any:
    """Tensors of frames that are already chosen, by our processor."""
    import numpy as np

    import videollama3

    videos = videollama3.VideoLlama3VideoProcessor(min_tokens=processor.MIN_TOKENS, max_tokens=processor.MAX_TOKENS)
    return videos([np.stack(frames)], timestamps=[list(timestamps)])["pixel_values_videos"]


def set_up_everything(spec: dict[str, Any]) -> Callable[[str], Any]:
    import av

    from videollama3.processing.video_reading import plan_video

    def call(path: str) -> Any:
        sampled = plan_video(path, name=path, fps=1, max_frames=spec["max_frames"]).sampled
        chosen = sampled.indices.tolist()
        wanted = set(chosen)
        with av.open(path) as container:
            container.streams.video[0].thread_type = "AUTO"
            decoded = {
                i: frame.to_ndarray(format="rgb24") for i, frame in enumerate(container.decode(video=0)) if i in wanted
            }
        return to_tensors([decoded[i] for i in chosen], sampled.timestamps.tolist())

    return call


def set_up_ffmpeg(spec: dict[str, Any]) -> Callable[[str], Any]:
    import av
    import numpy as np

    def call(path: str) -> Any:
        with av.open(path) as container:
            codec = container.streams.video[0].codec_context
            shape = (codec.height, codec.width, 3)
        command = [
            "ffmpeg",
            "-v",
            "error",
            "-i",
            path,
            "-vf",
            "fps=1:round=down",
            "-pix_fmt",
            "rgb24",
            "-f",
            "rawvideo",
            "-",
        ]
        raw = subprocess.run(command, capture_output=True, check=True).stdout
        frames = np.frombuffer(raw, np.uint8).reshape(-1, *shape)
        chosen = np.linspace(0, len(frames) - 1, min(len(frames), spec["max_frames"])).astype(int)
        return to_tensors(list(frames[chosen]), chosen.tolist())

    return call


def set_up_floor(spec: dict[str, Any]) -> Callable[[str], None]:
    from videollama3.processing.frame_decoding import decode_spans, plan_spans
    from videollama3.processing.video_file import Deadline, open_video
    from videollama3.processing.video_reading import plan_video

    plans: dict[str, Any] = {}

    def call(path: str) -> None:
        plan = plans[path]
        spans = plan_spans(plan.packets, sorted(set(plan.times.pts[plan.sampled.indices].tolist())))
        with open_video(path, name=path, limits=plan.limits) as (container, stream):
            for _ in decode_spans(container, stream, plan.packets, spans, deadline=Deadline(3600, path)):
                pass

    for path in (spec["warm_up"], spec["path"]):
        plans[path] = plan_video(path, name=path, fps=1, max_frames=spec["max_frames"])
    return call


def time_steps(path: str, max_frames: int) -> dict[str, float]:
    """CPU seconds of each step of our reading, each run alone."""
    import numpy as np

    import videollama3
    from videollama3.processing.patches import resize_picture
    from videollama3.processing.video_reading import plan_video, read_frames

    marks = [common.cpu_seconds()]

    def lap() -> float:
        marks.append(common.cpu_seconds())
        return marks[-1] - marks[-2]

    plan = plan_video(path, name=path, fps=1, max_frames=max_frames)
    seconds = {"demux": lap()}
    floor = set_up_floor({"warm_up": path, "path": path, "max_frames": max_frames})
    lap()
    floor(path)
    seconds["decode"] = lap()
    frames = list(read_frames(plan))
    seconds["to RGB"] = max(0.0, lap() - seconds["decode"])
    videos = videollama3.VideoLlama3VideoProcessor(min_tokens=processor.MIN_TOKENS, max_tokens=processor.MAX_TOKENS)
    estimate = videos.estimate([path], max_frames=max_frames).items[0]
    lap()
    resized = [resize_picture(frame, estimate.height, estimate.width) for frame in frames]
    seconds["resize"] = lap()
    videos([np.stack(resized)], timestamps=[plan.sampled.timestamps.tolist()])
    seconds["patches"] = lap()
    return seconds


SETUPS: dict[str, Callable[[dict[str, Any]], Callable[[str], Any]]] = {
    "ours": set_up_ours,
    "ours_uint8": set_up_ours,
    "native": set_up_native,
    "everything": set_up_everything,
    "ffmpeg": set_up_ffmpeg,
    "floor": set_up_floor,
}


if __name__ == "__main__":
    main()
