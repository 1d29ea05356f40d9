"""How soon and how reliably a model says by itself that a shape has appeared, on clips that it has never seen.

A checkpoint enters; the mean delay, misses and false alarms leave as a table and JSON. Clips are made here from other
seeds than the training data, encoded to mp4 and watched as `videollama3 watch` watches a file; questions on finished
clips are left to `evaluate.py`.

    python -m demonstrator.evaluate_watching CHECKPOINT --clips 100 -o report.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

import videollama3
from videollama3.loading import GREEDY
from videollama3.streaming import StreamingSession, TimedMessage

from .evaluate import HELDOUT_SEED
from .scenes import COLORS, KINDS, Scene, random_clip, random_encoding, write_clip

MAX_NEW_TOKENS = 24
# The part of the held-out seeds that `evaluate.py` does not use.
_PART = 2


@dataclasses.dataclass(frozen=True)
class Watch:
    """A clip and what to look out for.

    Attributes:
        path: of the mp4 file.
        name: of the shape, such as "red circle".
        appears_seconds: label of the first tick that shows it; None where it never appears.
    """

    path: str
    name: str
    appears_seconds: float | None

    @property
    def instruction(self) -> str:
        """What the model is told."""
        return f"Tell me when the {self.name} appears."


@dataclasses.dataclass(frozen=True)
class Score:
    """What the messages on one clip are worth.

    Attributes:
        delay_seconds: from the tick that first shows the shape to the first message since; None for a miss, and
            where it never appears.
        says_name: whether that message names the shape.
        num_early: messages before it appears; all where it never does.
        num_repeats: further messages after the first one since.
    """

    delay_seconds: float | None
    says_name: bool
    num_early: int
    num_repeats: int


def make_watches(folder: Path, *, num_clips: int, seed: int = HELDOUT_SEED) -> list[Watch]:
    """Writes clips; in every second one the shape that is asked for never appears.

    Args:
        folder: takes the mp4 files.
        num_clips: how many.
        seed: other than that of the training data.
    """
    watches = []
    for number in range(num_clips):
        rng = np.random.default_rng([seed, _PART, number])
        scene = _clip_in_which_something_appears(rng)
        path = folder / f"{number:05d}.mp4"
        write_clip(scene, path, random_encoding(rng))
        shape = next(shape for shape in scene.shapes if shape.first_frame > 0)
        if number % 2 == 0:
            watches.append(Watch(str(path), shape.name, scene.label(shape.first_frame)))
        else:
            watches.append(Watch(str(path), _absent_name(rng, scene), None))
    return watches


def _clip_in_which_something_appears(rng: np.random.Generator) -> Scene:
    while True:
        scene = random_clip(rng, "events")
        if any(shape.first_frame > 0 for shape in scene.shapes):
            return scene


def _absent_name(rng: np.random.Generator, scene: Scene) -> str:
    names = [f"{color} {kind}" for color in COLORS for kind in KINDS]
    return str(rng.choice([name for name in names if name not in {shape.name for shape in scene.shapes}]))


def watch(
    model: Any, processor: Any, item: Watch, *, threshold: float = 0.5, system_prompt: bool = True
) -> list[TimedMessage]:
    """What a model says while a clip runs.

    Args:
        model: a `VideoLlama3ForCausalLM` in evaluation mode.
        processor: its processor.
        item: the clip and what to look out for.
        threshold: probability from which on it speaks.
        system_prompt: whether the released models' system prompt comes first, as `videollama3 watch` puts it.
    """
    with StreamingSession(model, processor, form="stream", system_prompt=system_prompt) as session:
        feed = session.open(item.path)
        options = {"max_new_tokens": MAX_NEW_TOKENS, **GREEDY}
        return list(session.watch(item.instruction, feed, threshold=threshold, **options))


def score(item: Watch, messages: Sequence[TimedMessage]) -> Score:
    """Compares messages, in order of time, with what the clip shows."""
    if item.appears_seconds is None:
        return Score(None, says_name=False, num_early=len(messages), num_repeats=0)
    since = [message for message in messages if message.seconds >= item.appears_seconds]
    num_early = len(messages) - len(since)
    if not since:
        return Score(None, says_name=False, num_early=num_early, num_repeats=0)
    return Score(
        delay_seconds=since[0].seconds - item.appears_seconds,
        says_name=item.name in since[0].text.lower(),
        num_early=num_early,
        num_repeats=len(since) - 1,
    )


def summarize(items: Sequence[Watch], scores: Sequence[Score]) -> dict[str, Any]:
    """Counts and the mean delay; None where there is nothing to take a mean of."""
    pairs = list(zip(items, scores, strict=True))
    there = [score for item, score in pairs if item.appears_seconds is not None]
    absent = [score for item, score in pairs if item.appears_seconds is None]
    found = [score for score in there if score.delay_seconds is not None]
    delays = [score.delay_seconds for score in found if score.delay_seconds is not None]
    return {
        "clips in which it appears": len(there),
        "told": len(found),
        "missed": len(there) - len(found),
        "mean delay in seconds": round(sum(delays) / len(delays), 3) if delays else None,
        "largest delay in seconds": max(delays) if delays else None,
        "told by name": sum(score.says_name for score in found),
        "messages before it appears": sum(score.num_early for score in there),
        "clips with one of these": sum(score.num_early > 0 for score in there),
        "messages repeated after it": sum(score.num_repeats for score in there),
        "clips in which it never appears": len(absent),
        "messages on these": sum(score.num_early for score in absent),
        "of these with a message": sum(score.num_early > 0 for score in absent),
    }


def evaluate(
    model: Any,
    processor: Any,
    *,
    num_clips: int,
    seed: int = HELDOUT_SEED,
    threshold: float = 0.5,
    system_prompt: bool = True,
) -> dict[str, Any]:
    """Lets a model watch held-out clips.

    Args:
        model: a `VideoLlama3ForCausalLM` in evaluation mode.
        processor: its processor.
        num_clips: how many; in half of them the shape appears.
        seed: of the clips.
        threshold: probability from which on it speaks.
        system_prompt: whether the released models' system prompt comes first.

    Returns:
        The summary, and of each clip what was asked and said.
    """
    with tempfile.TemporaryDirectory() as folder:
        items = make_watches(Path(folder), num_clips=num_clips, seed=seed)
        said = [watch(model, processor, item, threshold=threshold, system_prompt=system_prompt) for item in items]
    clips = [
        {
            "instruction": item.instruction,
            "appears_seconds": item.appears_seconds,
            "messages": [dataclasses.asdict(message) for message in messages],
        }
        for item, messages in zip(items, said, strict=True)
    ]
    return {"summary": summarize(items, list(map(score, items, said))), "clips": clips}


def main() -> None:
    """Prints a table and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=HELDOUT_SEED)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--no-system-prompt", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    # As `videollama3 ask` computes on a CPU.
    model = AutoModelForImageTextToText.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(options.checkpoint)
    started = time.monotonic()
    report = evaluate(
        model,
        processor,
        num_clips=options.clips,
        seed=options.seed,
        threshold=options.threshold,
        system_prompt=not options.no_system_prompt,
    )
    for name, value in report["summary"].items():
        print(f"{name:32}{'-' if value is None else value:>8}")
    if options.output is not None:
        report.update(
            threshold=options.threshold,
            system_prompt=not options.no_system_prompt,
            seed=options.seed,
            seconds=round(time.monotonic() - started),
            dtype=str(model.dtype),
            versions={
                "videollama3": videollama3.__version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        )
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
