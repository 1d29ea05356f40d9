"""What every benchmark shares: fresh processes, cost of a call, statistics, tables and result files.

A script's command line and its measurements enter; a printed table and a JSON file in `results/` leave. What
is measured is left to the scripts. This module imports neither torch nor transformers, so that the process
that starts the others stays small.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
_DISTRIBUTIONS = (
    "videollama3",
    "torch",
    "transformers",
    "av",
    "pillow",
    "numpy",
    "torchvision",
    "torchcodec",
    "torchao",
)
_MIB = 2**20
_RATIO_FORMS = {"median": "{:.2f}", "min": "({:.2f})"}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What calls cost, measured inside one process.

    Attributes:
        wall_seconds: of each call.
        cpu_seconds: of each call, all threads together.
        peak_mib: highest resident memory during the first call, above what was resident before it.
    """

    wall_seconds: list[float]
    cpu_seconds: list[float]
    peak_mib: float


def measure(call: Callable[[], Any], *, repeats: int = 1) -> Cost:
    """Runs `call` `repeats` times; a warm-up belongs before, so that lazy imports are not counted."""
    gc.collect()
    base = _resident_bytes("VmRSS")
    _reset_peak()
    wall: list[float] = []
    cpu: list[float] = []
    peak = base
    for _ in range(repeats):
        wall_start, cpu_start = time.perf_counter(), cpu_seconds()
        result = call()
        wall.append(time.perf_counter() - wall_start)
        cpu.append(cpu_seconds() - cpu_start)
        if len(wall) == 1:
            peak = _resident_bytes("VmHWM")
        del result
    return Cost(wall, cpu, max(0.0, (peak - base) / _MIB))


def cpu_seconds() -> float:
    """User and system time of this process, all its threads together."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _resident_bytes(field: str) -> int:
    # Not ru_maxrss where it can be had otherwise: a child inherits its parent's.
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        # The peak then counts from the start of the process: an upper bound.
        return


def run_fresh(script: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Runs `script --worker <spec>` in a new process and returns what it hands to `answer`.

    Raises:
        RuntimeError: when the process fails, with the end of its error output.
    """
    done = subprocess.run(
        [sys.executable, script, "--worker", json.dumps(spec)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"Expected worker {dict(spec)} to succeed, got exit status {done.returncode}:\n{done.stderr[-2000:]}"
        )
    answer_line: str = done.stdout.strip().splitlines()[-1]
    return json.loads(answer_line)  # type: ignore[no-any-return]


def answer(values: Mapping[str, Any]) -> None:
    """Hands a worker's result to the process that started it."""
    print(json.dumps(values), flush=True)


def middle(values: Sequence[float]) -> dict[str, float]:
    """Median and spread of repeats."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


def ratio(ours: Mapping[str, float], peer: Mapping[str, float]) -> dict[str, float | None]:
    """Ours divided by the peer's; below 1 ours is cheaper. None where the peer costs nothing.

    Of medians, and of the least of all repeats, which other work on the machine disturbs least.
    """
    return {key: round(ours[key] / peer[key], 3) if peer[key] else None for key in ("median", "min")}


def show_ratio(values: Mapping[str, float | None]) -> str:
    """`of medians (of minima)`."""
    return " ".join("-" if values[key] is None else form.format(values[key]) for key, form in _RATIO_FORMS.items())


def has_module(name: str) -> bool:
    """Whether a module can be found, without importing it."""
    return importlib.util.find_spec(name) is not None


def environment() -> dict[str, Any]:
    """Versions and hardware, without host or path names."""
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "versions": versions,
        "hardware": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "load_average_before": round(os.getloadavg()[0], 2),
        },
    }


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (FileNotFoundError, StopIteration):
        return platform.processor() or platform.machine()


def command_line(script: str) -> str:
    """The command to repeat a run, relative to the repository."""
    return " ".join(["python", f"benchmarks/{Path(script).name}", *sys.argv[1:]])


def write_json(name: str, record: Mapping[str, Any], *, folder: Path | None = None) -> Path:
    """Writes `<folder>/<name>.json` (default `benchmarks/results`) and says so."""
    target = folder or RESULTS
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten: {path.relative_to(FOLDER.parent) if path.is_relative_to(FOLDER.parent) else path}")
    return path


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a Markdown table, columns aligned."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    for line in lines:
        print("| " + " | ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def spread(stats: Mapping[str, float], *, digits: int = 2) -> str:
    """`median (min-max)`."""
    return f"{stats['median']:.{digits}f} ({stats['min']:.{digits}f}-{stats['max']:.{digits}f})"


def common_parser(doc: str, *, rounds: int) -> argparse.ArgumentParser:
    """Options that every script has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"interleaved rounds (default {rounds})")
    parser.add_argument("--toy", action="store_true", help="tiny inputs, one round: shows that the script runs")
    parser.add_argument("--output", type=Path, default=None, help="folder of the JSON (default benchmarks/results)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser
