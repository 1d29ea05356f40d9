"""What does the reader make of damaged files: the right frames, or an error that names the video?

    python benchmarks/fuzz_files.py --count 400 --seed 1

Small clips of several codecs and containers are cut short, bit-flipped, overwritten, shortened and lengthened
at random places. Another process reads them: right are an error of the documented family that names the video,
or frames that equal those which decoding everything and choosing by the rule gives. Wrong are other frames,
other errors, a crash of the process and a hang. The exit status is 1 when anything was wrong; `--keep FOLDER`
keeps those files.

One kind is counted apart, as "unnoticed": a frame whose own data, or those of a frame that it refers to, are
damaged or lost in a way that the decoder does not report. How it comes out then depends on what was decoded before, or
even on what the reused memory held (VP8 does both), so two readings may differ. A frame whose data are whole
never falls under it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import json
import queue
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

NAME = "video 0"
NUM_FRAMES, RATE, HEIGHT, WIDTH = 70, 25, 80, 112
HANG_SECONDS = 30.0
# suffix, codec, options: short groups of pictures, so that seeking and skipping both happen.
CLIPS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264 mp4": ("mp4", "libx264", {"g": "12", "bf": "2", "crf": "28"}),
    "h264 pyramid mkv": ("mkv", "libx264", {"g": "30", "bf": "3", "b-pyramid": "normal", "crf": "28"}),
    "h264 ts": ("ts", "libx264", {"g": "12", "bf": "2", "crf": "28"}),
    "h264 cavlc mov": ("mov", "libx264", {"g": "250", "profile": "baseline", "crf": "28"}),
    "hevc mp4": ("mp4", "libx265", {"x265-params": "keyint=12:bframes=3:log-level=none", "crf": "30"}),
    "vp9 webm": ("webm", "libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8"}),
    "vp8 webm": ("webm", "libvpx", {"g": "20", "deadline": "realtime"}),
    "av1 mp4": ("mp4", "libsvtav1", {"g": "20", "preset": "12"}),
    "mpeg4 avi": ("avi", "mpeg4", {"g": "12"}),
    "mpeg4 mp4": ("mp4", "mpeg4", {"g": "12", "bf": "2"}),
    "mpeg2 ts": ("ts", "mpeg2video", {"g": "12", "bf": "2"}),
}
DAMAGES = ("cut", "flip one", "flip some", "flip many", "flip at the ends", "overwrite", "remove", "insert")
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"fps": 1},
    {"fps": 5},
    {"fps": 25, "max_frames": 4},
    {"fps": 2, "start_time": 1.2},
    {"fps": 4, "start_time": 0.5, "end_time": 2.1},
)
RIGHT = ("frames", "error", "unnoticed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400, help="damaged files (default 400)")
    parser.add_argument("--seed", type=int, default=0, help="another seed damages other places (default 0)")
    parser.add_argument("--only", type=int, help="one file, by its number")
    parser.add_argument("--keep", type=Path, help="folder for files that were read wrongly")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return 0
    numbers = range(options.count) if options.only is None else [options.only]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = list(run(numbers, options.seed, Path(folder), options.keep))
    show(outcomes)
    return int(any(outcome["kind"] not in RIGHT for outcome in outcomes))


def show(outcomes: Sequence[dict[str, Any]]) -> None:
    """Prints what was wrong, then counts."""
    for outcome in outcomes:
        if outcome["kind"] not in RIGHT:
            print(f"{outcome['kind']}: {json.dumps(outcome)}")
    counts = collections.Counter((outcome["clip"], outcome["kind"]) for outcome in outcomes)
    for (clip, kind), count in sorted(counts.items()):
        print(f"{clip:<20} {kind:<12} {count:>5}")
    total = collections.Counter(outcome["kind"] for outcome in outcomes)
    print(f"{len(outcomes)} files: " + ", ".join(f"{count} {kind}" for kind, count in total.most_common()))


def run(numbers: Sequence[int], seed: int, folder: Path, keep: Path | None) -> Iterator[dict[str, Any]]:
    """Damages and reads the files of `numbers`; yields one outcome for each."""
    clips = {name: make_clip(name) for name in CLIPS}
    for name, data in clips.items():
        (folder / name).write_bytes(data)
    reader = Reader()
    try:
        for number in numbers:
            generator = random.Random(f"{seed}-{number}")
            name = list(CLIPS)[number % len(CLIPS)]
            damage = generator.choice(DAMAGES)
            sampling = generator.choice(SAMPLINGS)
            path = folder / f"{number}.{CLIPS[name][0]}"
            path.write_bytes(damaged(clips[name], damage, generator))
            outcome = {"number": number, "clip": name, "damage": damage, "sampling": sampling}
            outcome.update(reader.read({"path": str(path), "original": str(folder / name), "sampling": sampling}))
            if keep is not None and outcome["kind"] not in RIGHT:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / path.name).write_bytes(path.read_bytes())
            path.unlink()
            yield outcome
    finally:
        reader.close()


def damaged(data: bytes, damage: str, generator: random.Random) -> bytes:
    """A damaged copy."""
    size = len(data)
    if damage == "cut":
        return data[: generator.randrange(1, size)]
    start = generator.randrange(size)
    length = min(generator.choice((1, 16, 200, 2000)), size // 4)
    if damage == "remove":
        return data[:start] + data[start + length :]
    if damage == "insert":
        return data[:start] + generator.randbytes(length) + data[start:]
    copy = bytearray(data)
    if damage == "overwrite":
        copy[start : start + length] = generator.choice((bytes, generator.randbytes))(length)
        return bytes(copy[:size])
    flips = {"flip one": 1, "flip some": 5, "flip many": max(1, size // 200), "flip at the ends": 3}[damage]
    for _ in range(flips):
        near = generator.randrange(min(1500, size))
        place = (
            generator.choice((near, size - 1 - near)) if damage == "flip at the ends" else generator.randrange(size)
        )
        copy[place] ^= 1 << generator.randrange(8)
    return bytes(copy)


def make_clip(name: str) -> bytes:
    """Encodes one clip of moving texture."""
    import av
    import numpy as np

    suffix, codec, options = CLIPS[name]
    rng = np.random.default_rng(len(name))
    texture = np.kron(rng.integers(0, 200, (HEIGHT // 8, 3 * WIDTH // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    buffer = io.BytesIO()
    container_format = {"mkv": "matroska", "ts": "mpegts"}.get(suffix, suffix)
    with av.open(buffer, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        # One thread: threads by slice would cut each picture into slices.
        stream.codec_context.thread_count = 1
        for number in range(NUM_FRAMES):
            picture = texture[:, 3 * number : 3 * number + WIDTH].copy()
            picture[20:40, number : number + 20] = 255 - 3 * number
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


class Reader:
    """Reads files in another process, which is started anew when it crashes or hangs."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def read(self, request: dict[str, Any]) -> dict[str, Any]:
        """Outcome of one file."""
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        try:
            line = self._lines.get(timeout=HANG_SECONDS)
        except queue.Empty:
            self.close()
            return {"kind": "hang"}
        if line is None:
            status = self._process.wait()
            self.close()
            return {"kind": "crash", "status": status}
        result: dict[str, Any] = json.loads(line)
        return result

    def _start(self) -> None:
        self._lines = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        threading.Thread(target=self._listen, args=(self._process, self._lines), daemon=True).start()
        # Imports take seconds, and are no hang.
        self._lines.get(timeout=300)

    @staticmethod
    def _listen(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


# ---------------------------------------------------------------------------------------------- worker


def work() -> None:
    """Answers each line of standard input (a damaged file, the whole one, a sampling) with an outcome."""
    import videollama3  # noqa: F401 - its import is the slow part

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(outcome_of(**request)), flush=True)


def outcome_of(path: str, original: str, sampling: dict[str, Any]) -> dict[str, Any]:
    """Reads a file with ours and, where that gives frames, by decoding everything."""
    try:
        plan, pictures = ours(path, sampling)
    except (ValueError, TimeoutError) as error:
        # Every documented error of a file is one of these, and names it.
        return {"kind": "error" if NAME in str(error) else "nameless", "message": str(error)[:200]}
    except Exception as error:  # the question of this script
        return {"kind": "other error", "message": f"{type(error).__name__}: {error}"[:300]}
    outcome = {"kind": "frames"} | compare(plan, pictures, decode_everything(path), sampling)
    if outcome["kind"] == "wrong pixels" and is_damaged(plan, outcome["time"], original):
        outcome["kind"] = "unnoticed"
    return outcome


def ours(path: str, sampling: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Plan and frames, as `media_requests.encode_request` reads them."""
    from videollama3.processing.video_file import ReadingLimits
    from videollama3.processing.video_reading import UnexpectedFrameError, plan_video, read_frames

    options = {"max_frames": 180, "limits": ReadingLimits(max_seconds=HANG_SECONDS / 2), **sampling}
    plan = plan_video(path, name=NAME, **options)
    try:
        return plan, list(read_frames(plan))
    except UnexpectedFrameError:
        plan = plan_video(path, name=NAME, by_decoding=True, **options)
    try:
        return plan, list(read_frames(plan))
    except UnexpectedFrameError as error:
        raise ValueError(f"{error} The file is damaged.") from error


@dataclasses.dataclass
class Everything:
    """All frames of a file.

    Attributes:
        times: of its frames, as ffmpeg guesses them where they run back and forth.
        pts: of its frames, as they came out of the decoder.
        pictures: RGB of each.
        errors: packets that could not be decoded; plain decoding stops at the first.
    """

    times: Any
    pts: list[int | None]
    pictures: list[Any]
    errors: int


def decode_everything(path: str) -> Everything:
    """Decodes every packet on one thread, going on after errors."""
    import av
    import numpy as np

    from videollama3.processing import frame_timing
    from videollama3.processing.video_file import METADATA_OPTIONS

    guess = frame_timing._BestEffortTime()
    times: list[int] = []
    pts: list[int | None] = []
    pictures: list[Any] = []
    errors = duration = 0
    with av.open(path, **METADATA_OPTIONS) as container:
        stream = next(s for s in container.streams.video if s.codec_context is not None)
        stream.codec_context.thread_count = 1
        period = frame_timing._frame_period(stream)
        for packet in _tolerant(container.demux(stream)):
            try:
                frames = stream.codec_context.decode(packet if packet.size else None)
            except (av.error.FFmpegError, EOFError):
                errors += 1
                continue
            for frame in frames:
                value = guess.next(frame.pts, frame.dts)
                expected = times[-1] + period if times else (stream.start_time or 0)
                times.append(expected if value is None or (times and value < times[-1]) else value)
                duration = getattr(frame, "duration", None) or 0
                pts.append(frame.pts)
                pictures.append(_to_rgb(frame))
        frame_times = frame_timing._frame_times(container, stream, np.array(times or [0], dtype=np.int64), duration)
    return Everything(frame_times, pts, pictures, errors)


def _to_rgb(frame: Any) -> Any:
    import av
    import numpy as np

    try:
        return frame.to_ndarray(format="rgb24")
    except av.error.FFmpegError:
        # Damaged headers announce colours that cannot be converted.
        return np.zeros((0, 0, 3), np.uint8)


def _tolerant(packets: Iterator[Any]) -> Iterator[Any]:
    import av

    while True:
        try:
            yield next(packets)
        except (StopIteration, IndexError, av.error.FFmpegError):
            return


def compare(plan: Any, pictures: list[Any], everything: Everything, sampling: dict[str, Any]) -> dict[str, Any]:
    """`kind: wrong` with a reason unless the frames are those that decoding everything gives."""
    import numpy as np

    from videollama3.processing.frame_sampling import sample_frames

    times = everything.times.pts.tolist() if plan.by_decoding else everything.pts
    by_time = dict(zip(times, everything.pictures, strict=False))
    got = plan.times.pts[plan.sampled.indices].tolist()
    for time, picture in zip(got, pictures, strict=True):
        if time not in by_time:
            return {"kind": "wrong time", "message": f"{time} is not among the decoded"}
        expected = np.rot90(by_time[time], plan.rotation)
        if picture.shape != expected.shape or not np.array_equal(picture, expected):
            return {"kind": "wrong pixels", "time": time}
    lost = len(plan.times.pts) - len(everything.pts)
    if everything.errors or lost > 0 or times != everything.times.pts.tolist():
        # What the decoder lost, or gave in no order, has no place in the rule: packets tell more of the times.
        return {"errors": everything.errors}
    try:
        sampled = sample_frames(everything.times, **{"max_frames": 180, **sampling})
    except ValueError as error:
        return {"kind": "wrong choice", "message": f"got {got}, expected {error}"}
    expected_times = everything.times.pts[sampled.indices].tolist()
    if got != expected_times or plan.sampled.timestamps.tolist() != sampled.timestamps.tolist():
        return {"kind": "wrong choice", "message": f"got {got}, expected {expected_times}"}
    return {}


def is_damaged(plan: Any, time: int, original: str) -> bool:
    """Whether the packets that the frame at `time` may refer to are not those of the whole file."""
    from videollama3.processing.frame_decoding import plan_spans

    packets = _packets(plan.source)
    if plan.packets is not None:
        (span,) = plan_spans(plan.packets, [time])
        packets = packets[span.first : span.last + 1]
    whole = _packets(original)
    starts = (i for i, packet in enumerate(whole) if packet == packets[0])
    return not any(whole[i : i + len(packets)] == packets for i in starts)


def _packets(path: str) -> list[bytes]:
    import av

    from videollama3.processing.video_file import METADATA_OPTIONS

    with av.open(path, **METADATA_OPTIONS) as container:
        return [bytes(packet) for packet in _tolerant(container.demux(video=0)) if packet.size]


if __name__ == "__main__":
    sys.exit(main())
