"""A checkpoint and rows on disk for whole runs: pictures, a clip and text, few enough for seconds on the CPU."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.media import write_clip
from videollama3.random_checkpoint import build_random

RECIPES = Path(__file__).parents[2] / "recipes"


def write_checkpoint(folder):
    """A tiny random checkpoint in this package's layout."""
    model, processor = build_random(hidden_size=32, num_hidden_layers=1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def write_rows(folder, *, repeats=2):
    """Rows in the authors' form beside their media; returns the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = {"red": (220, 30, 30), "blue": (30, 30, 220)}
    for name, colour in colours.items():
        Image.fromarray(np.full((56, 84, 3), colour, dtype=np.uint8)).save(folder / f"{name}.png")
    pictures = [np.full((56, 84, 3), 40 * i, dtype=np.uint8) for i in range(4)]
    write_clip(folder / "clip.mp4", 4, 1, pictures=pictures, height=56, width=84)
    rows = [
        *({"image": [f"{name}.png"], "conversations": _turns("<image>\nColor?", name)} for name in colours),
        {"video": ["clip.mp4"], "conversations": _turns("<video>\nWhat?", "It gets brighter.")},
        {"conversations": _turns("Say yes.", "yes")},
        {"conversations": _turns("Say no.", "no")},
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * repeats))
    return str(path)


def recipe_overrides(task, folder, *more):
    """Settings with which a recipe trains on (checkpoint, rows) in seconds."""
    start, rows = task
    return [
        f"model.path={start}",
        f"data.train={rows}",
        f"data.eval={rows}",
        "data.workers=0",
        "data.max_length=300",
        "batch.gradient_accumulation_steps=1",
        "schedule.warmup=0",
        "schedule.precision=fp32",
        "output.log_every=1",
        f"output.folder={folder}",
        *more,
    ]


def _turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
