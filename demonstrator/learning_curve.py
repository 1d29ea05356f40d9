"""How accuracy grows during training: checkpoints of stages, each asked about a few clips it has never seen.

Folders of runs with checkpoints enter; JSON and an SVG picture leave, accuracy of colour, shape and direction over
training samples. It shows the paper's thesis in miniature: pictures first, then video, against questions on video
from the start with a fresh encoder.

    python -m demonstrator.learning_curve OUTPUT --run NAME SAMPLES FOLDER [FOLDER ...] --run NAME SAMPLES FOLDER

    SAMPLES: seen before the first folder's, such as the pictures of the encoder's own training
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import videollama3  # noqa: F401  (registers the classes)

from .evaluate import HELDOUT_SEED, Question, answer, make_questions
from .questions import is_right

KINDS = ("color", "shape", "direction")
_COLORS = {"color": "#c0392b", "shape": "#2471a3", "direction": "#1e8449"}
_DASHES = ("", "6 4", "2 3")


def checkpoints(stages: list[Path], before: int = 0) -> list[tuple[int, Path]]:
    """Checkpoints of stages that follow each other, with the samples seen until then, `before` the first included."""
    found: list[tuple[int, Path]] = []
    for stage in stages:
        record = json.loads((stage / "training_record.json").read_text(encoding="utf-8"))
        state = json.loads((stage / "trainer_state.json").read_text(encoding="utf-8"))
        per_update = state["epoch"] * record["num_train_samples"] / state["global_step"]
        steps = {int(path.name.partition("-")[2]): path for path in stage.glob("checkpoint-*")}
        steps[record["num_updates"]] = stage
        found += [(before + round(step * per_update), steps[step]) for step in sorted(steps)]
        before += round(record["num_updates"] * per_update)
    return found


def accuracies(folder: Path, questions: list[Question]) -> dict[str, float]:
    """Share of right answers by kind of question."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    said = answer(model, AutoProcessor.from_pretrained(folder), questions)
    result = {}
    for kind in KINDS:
        right = [is_right(q.turn, a.text) for q, a in zip(questions, said, strict=True) if q.turn.kind == kind]
        result[kind] = round(sum(right) / len(right), 3)
    return result


def draw(runs: dict[str, list[dict[str, Any]]]) -> str:
    """The curves as SVG."""
    width, height, left, top = 720, 360, 60, 20
    most = max(point["samples"] for points in runs.values() for point in points)

    def place(samples: int, share: float) -> str:
        x = left + (width - left - 20) * samples / most
        return f"{x:.1f},{top + (height - top - 60) * (1 - share):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(0, share).split(",")
        end = place(most, share).split(",")[0]
        parts.append(f'<line x1="{x}" y1="{y}" x2="{end}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{float(y) + 4}" text-anchor="end">{share:.0%}</text>')
    for i, (name, points) in enumerate(runs.items()):
        for kind in KINDS:
            line = " ".join(place(point["samples"], point[kind]) for point in points)
            dash = f' stroke-dasharray="{_DASHES[i]}"' if _DASHES[i] else ""
            parts.append(f'<polyline points="{line}" fill="none" stroke="{_COLORS[kind]}" stroke-width="2"{dash}/>')
            x = left + 10 + 220 * KINDS.index(kind)
            y = height - 34 + 16 * i
            stroke = f'stroke="{_COLORS[kind]}" stroke-width="2"{dash}'
            parts.append(f'<line x1="{x}" y1="{y - 4}" x2="{x + 24}" y2="{y - 4}" {stroke}/>')
            parts.append(f'<text x="{x + 30}" y="{y}">{kind}, {name}</text>')
    parts.append(f'<text x="{width - 20}" y="{height - 50}" text-anchor="end">{most:,} samples</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Evaluates all checkpoints and writes OUTPUT.json and OUTPUT.svg."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--run", nargs="+", action="append", required=True, metavar="NAME SAMPLES FOLDER")
    parser.add_argument("--clips", type=int, default=80)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        asked = make_questions(Path(folder), num_pictures=0, num_clips=options.clips, seed=HELDOUT_SEED + 1)
        questions = [question for question in asked if question.scene == "one" and question.turn.kind in KINDS]
        for name, before, *stages in options.run:
            runs[name] = []
            for samples, checkpoint in checkpoints([Path(stage) for stage in stages], int(before)):
                runs[name].append({"samples": samples, **accuracies(checkpoint, questions)})
                print(name, runs[name][-1], flush=True)
    options.output.with_suffix(".json").write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
    options.output.with_suffix(".svg").write_text(draw(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
