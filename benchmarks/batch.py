"""How does `videollama3 batch` compare with a plain loop over the same clips, and does its memory stay flat?

    python benchmarks/batch.py

The demonstrator answers at most 16 tokens about each of `--clips` small clips (4 s at 25 frames per second),
`--memory-clips` in the second part. A few distinct files stand under many names (hard links): reading does not know.
The loop calls the processor and `generate` for one clip after the other; the command reads in processes of its own and
answers in batches, and must give the same answers. CPU seconds hold all processes and, of the command, the start of
those that read, which import PyTorch: a sum that does not grow with the clips. So the cost per clip beyond it is given
as well: what the second part took more than the first, by the clips that it had more. Loading the model counts on
neither side. With a model this small the work is reading; what batches save grows with the model.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import common

import media

SIDES = ("loop", "batch")
PROMPT = "What happens in the video?"
NEW_TOKENS = 16
SECONDS, WIDTH, HEIGHT = 4, 176, 144
DISTINCT = 5
SAMPLE_SECONDS = 0.1


def main() -> None:
    parser = common.common_parser(__doc__ or "", rounds=3)
    parser.add_argument("--clips", type=int, default=300, help="for the comparison (default 300)")
    parser.add_argument("--memory-clips", type=int, default=2000, help="for the memory (default 2000)")
    parser.add_argument("--workers", type=int, default=2, help="processes that read (default 2)")
    options = parser.parse_args()
    if options.worker:
        common.answer(work(json.loads(options.worker)))
        return
    environment = common.environment()
    clips, many = (8, 24) if options.toy else (options.clips, options.memory_clips)
    rounds = 1 if options.toy else options.rounds
    with tempfile.TemporaryDirectory() as folder:
        few_clips, many_clips = (link_clips(Path(folder) / str(count), count) for count in (clips, many))
        spec = {"folder": str(few_clips), "workers": options.workers}
        runs = [{side: common.run_fresh(__file__, {**spec, "side": side}) for side in SIDES} for _ in range(rounds)]
        memory = common.run_fresh(__file__, {**spec, "side": "batch", "folder": str(many_clips)})
    same = all(run["loop"].pop("answers") == run["batch"].pop("answers") for run in runs)
    memory.pop("answers")
    record = {
        "question": (__doc__ or "").splitlines()[0],
        "command": common.command_line(__file__),
        **environment,
        "setting": {
            "toy": options.toy,
            "clips": clips,
            "memory_clips": many,
            "distinct_files": DISTINCT,
            "clip": f"{SECONDS} s, {WIDTH} x {HEIGHT}",
            "workers": options.workers,
            "new_tokens": NEW_TOKENS,
        },
        "same_answers": same,
        "throughput": throughput(runs, clips, memory, many),
        "memory": flatness(memory["samples"], many),
    }
    show(record)
    common.write_json("batch_toy" if options.toy else "batch", record, folder=options.output)


def link_clips(folder: Path, count: int) -> Path:
    """A folder of `count` names for a few files."""
    folder.mkdir()
    files = [media.clip(seconds=SECONDS, width=WIDTH + 16 * i, height=HEIGHT) for i in range(DISTINCT)]
    for number in range(count):
        source = files[number % len(files)]
        target = folder / f"{number:05d}.mp4"
        try:
            os.link(source, target)
        except OSError:
            # Another file system.
            target.write_bytes(source.read_bytes())
    return folder


def throughput(runs: list[dict[str, Any]], clips: int, longer: dict[str, Any], more_clips: int) -> dict[str, Any]:
    """Seconds of each side, ratios, and the command's cost per clip beyond its start."""
    sides = {
        side: {name: common.middle([run[side][name] for run in runs]) for name in ("wall_seconds", "cpu_seconds")}
        for side in SIDES
    }
    costs = {side: sides[side]["cpu_seconds"]["median"] for side in SIDES}
    per_clip = (longer["cpu_seconds"] - costs["batch"]) / (more_clips - clips)
    return {
        "sides": sides,
        "cpu_seconds_of_memory_clips": longer["cpu_seconds"],
        "cpu_ms_per_clip": {
            "loop": round(1000 * costs["loop"] / clips, 2),
            "batch beyond its start": round(1000 * per_clip, 2),
            "batch / loop": round(per_clip * clips / costs["loop"], 3),
        },
        "clips_per_cpu_second": {side: round(clips / sides[side]["cpu_seconds"]["median"], 2) for side in SIDES},
        "batch / loop": {
            name: common.ratio(sides["batch"][name], sides["loop"][name]) for name in ("wall_seconds", "cpu_seconds")
        },
    }


def flatness(samples: list[list[float]], rows: int) -> dict[str, Any]:
    """Resident memory while rows are answered: in the second tenth of them, and in the last."""
    tenths: dict[int, list[tuple[float, float]]] = {}
    for done, own, reading in samples:
        if 0 < done < rows:
            tenths.setdefault(int(done * 10 // rows), []).append((own, reading))
    if not tenths:
        # At toy size all rows are done between two samples.
        tenths = {0: [(own, reading) for _, own, reading in samples]}
    marks = {
        name: {
            "model_process_mib": round(statistics.median(own for own, _ in tenths[tenth]), 1),
            "reading_processes_mib": round(statistics.median(reading for _, reading in tenths[tenth]), 1),
        }
        for name, tenth in (("second tenth", min(1, max(tenths))), ("last tenth", max(tenths)))
    }
    return {
        **marks,
        "peak": {
            "model_process_mib": round(max(own for _, own, _ in samples), 1),
            "reading_processes_mib": round(max(reading for *_, reading in samples), 1),
        },
        "samples": len(samples),
    }


def show(record: dict[str, Any]) -> None:
    rates, ratios = record["throughput"]["clips_per_cpu_second"], record["throughput"]["batch / loop"]
    common.print_table(
        [
            "clips",
            "loop: clips per CPU s",
            "batch: clips per CPU s",
            "CPU batch / loop",
            "beyond the start",
            "wall batch / loop",
        ],
        [
            [
                record["setting"]["clips"],
                *(f"{rates[side]:.1f}" for side in SIDES),
                common.show_ratio(ratios["cpu_seconds"]),
                record["throughput"]["cpu_ms_per_clip"]["batch / loop"],
                common.show_ratio(ratios["wall_seconds"]),
            ]
        ],
    )
    print(f"same answers: {record['same_answers']}\n")
    common.print_table(
        ["resident MiB", "second tenth", "last tenth", "peak"],
        [
            [name, *(record["memory"][mark][name] for mark in ("second tenth", "last tenth", "peak"))]
            for name in ("model_process_mib", "reading_processes_mib")
        ],
    )


# ---------------------------------------------------------------------------------------------- workers


def work(spec: dict[str, Any]) -> dict[str, Any]:
    """One process: one side over a folder."""
    return run_loop(spec) if spec["side"] == "loop" else run_batch(spec)


def run_loop(spec: dict[str, Any]) -> dict[str, Any]:
    """What a user would write."""
    from videollama3.loading import GREEDY

    model, processor = load_demonstrator()
    answers = []
    wall, cpu = time.perf_counter(), common.cpu_seconds()
    for path in sorted(Path(spec["folder"]).iterdir()):
        content = [{"type": "video", "video": str(path)}, {"type": "text", "text": PROMPT}]
        inputs = processor(
            conversation=[{"role": "user", "content": content}],
            add_system_prompt=True,
            add_generation_prompt=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, **GREEDY)
        new = output[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(new, skip_special_tokens=True))
    return {
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": common.cpu_seconds() - cpu,
        "answers": answers,
    }


def load_demonstrator() -> tuple[Any, Any]:
    """Model and processor as the command loads them without `--model`."""
    import torch

    import videollama3

    path = videollama3.demonstrator_path()
    model = videollama3.VideoLlama3ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, videollama3.VideoLlama3Processor.from_pretrained(path)


def run_batch(spec: dict[str, Any]) -> dict[str, Any]:
    """The command, in this process; the processes that read are counted when they have ended."""
    import videollama3  # noqa: F401 - imported here, so that both sides have what they import
    from videollama3.cli import main as command

    load_demonstrator()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.jsonl"
        arguments = ["batch", spec["folder"], "-o", str(output), "--prompt", PROMPT]
        arguments += ["--max-new-tokens", str(NEW_TOKENS), "--workers", str(spec["workers"])]
        wall, cpu = time.perf_counter(), all_cpu_seconds()
        with sampled_memory(output) as samples, contextlib.redirect_stdout(io.StringIO()):
            status = command(arguments)
        wall = time.perf_counter() - wall
        end_processes()
        cpu = all_cpu_seconds() - cpu
        results = [json.loads(line) for line in output.read_text(encoding="ascii").splitlines()]
    if status != 0:
        raise RuntimeError(f"Expected the command to succeed, got exit status {status}.")
    answers = [result["answer"] for result in sorted(results, key=lambda result: result["index"])]
    return {"wall_seconds": wall, "cpu_seconds": cpu, "answers": answers, "samples": samples}


def all_cpu_seconds() -> float:
    """Of this process and those of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return common.cpu_seconds() + children.ru_utime + children.ru_stime


def end_processes() -> None:
    """Ends the process that the reading ones were forked from; it has waited for them, so that they count."""
    from multiprocessing import forkserver

    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@contextlib.contextmanager
def sampled_memory(output: Path) -> Any:
    """Notes rows done, resident MiB of this process, and of the reading ones together (shared pages once each)."""
    samples: list[list[float]] = []
    done = threading.Event()

    def sample() -> None:
        rows, position = 0, 0
        while not done.wait(SAMPLE_SECONDS):
            if output.exists():
                with output.open("rb") as file:
                    file.seek(position)
                    added = file.read()
                rows, position = rows + added.count(b"\n"), position + len(added)
            samples.append([rows, own_mib(), sum(proportional_mib(process) for process in descendants(os.getpid()))])

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def own_mib() -> float:
    return common._resident_bytes("VmRSS") / 2**20


def proportional_mib(process: int) -> float:
    try:
        with open(f"/proc/{process}/smaps_rollup", encoding="ascii") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("Pss:"))
    except (FileNotFoundError, ProcessLookupError, StopIteration):
        return 0.0


def descendants(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


if __name__ == "__main__":
    sys.exit(main())
