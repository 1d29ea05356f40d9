"""Starts real processes: `torch.distributed.run` on the CPU with gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def train(folder, runs, *, processes, timeout):
    """Trains several times, one after the other, in so many processes; returns what process 0 wrote, by name.

    Processes start slowly, so that many runs share them.
    """
    result = start("worker.py", folder, {"runs": runs}, processes=processes, timeout=timeout)
    return json.loads(result.read_text())


def start(script, folder, work, *, processes, timeout):
    """Runs a script of this folder in so many processes; returns the file that process 0 wrote."""
    settings, result = folder / "settings.json", folder / "result"
    settings.write_text(json.dumps({**work, "result": str(result)}))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))},
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
    }
    process = subprocess.Popen(
        [sys.executable, *launcher, str(Path(__file__).parent / script), str(settings)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # The launcher ends the processes that it started.
        process.terminate()
        output, _ = process.communicate(timeout=60)
        raise AssertionError(f"no end after {timeout} s: {output.decode()[-3000:]}") from None
    assert process.returncode == 0, output.decode()[-5000:]
    return result
