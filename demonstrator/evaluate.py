"""How often the demonstrator is right, on clips that it has never seen, read through the whole path.

A checkpoint enters; accuracies by kind of question, agreement with and without pruning and the share of pruned tokens
leave as a table and JSON. Clips are made here from other seeds than the training data, encoded to mp4, sampled,
pruned and answered by `generate`.

    python -m demonstrator.evaluate CHECKPOINT --clips 200 -o report.json

One kind of question on many more clips of one shape:

    python -m demonstrator.evaluate CHECKPOINT --pictures 0 --clips 800 --scenes one --kinds direction --seed 78
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

import videollama3

from .questions import Turn, ask, is_right
from .scenes import random_clip, random_encoding, random_picture, write_clip, write_picture

HELDOUT_SEED = 10**6
PICTURE_KINDS = ("color", "shape", "count", "position", "presence", "caption")
CLIP_SCENES = ("one", "one", "several", "events")
CLIP_KINDS = ("color", "shape", "direction", "count", "position", "presence", "order", "when", "caption")
MAX_NEW_TOKENS = 96
_BATCH_SIZE = 24


@dataclasses.dataclass(frozen=True)
class Question:
    """A question on a file.

    Attributes:
        path: of the picture or clip.
        media: image or video.
        scene: what is in it: one, several or events.
        turn: question and what counts as right.
        add_system_prompt: whether it is asked with the system prompt.
    """

    path: str
    media: str
    scene: str
    turn: Turn
    add_system_prompt: bool

    def messages(self) -> list[dict[str, Any]]:
        """The question as the processor takes it."""
        parts = [{"type": self.media, "path": self.path}, {"type": "text", "text": self.turn.question}]
        return [{"role": "user", "content": parts}]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: the answer.
        num_tokens: visual tokens before pruning.
        num_kept: after it.
    """

    text: str
    num_tokens: int
    num_kept: int


def make_questions(
    folder: Path,
    *,
    num_pictures: int,
    num_clips: int,
    seed: int = HELDOUT_SEED,
    scenes: Sequence[str] = CLIP_SCENES,
    kinds: Sequence[str] = CLIP_KINDS,
) -> list[Question]:
    """Writes held-out files and asks one question of every kind that they have an answer to.

    Every second file is asked in plain words, the others with other case, punctuation and words around; every second
    pair with the system prompt.
    """
    questions = []
    for number in range(num_pictures):
        rng = np.random.default_rng([seed, 0, number])
        scene = random_picture(rng)
        path = folder / f"{number:05d}.png"
        write_picture(scene, path)
        for kind in PICTURE_KINDS:
            if (turn := ask(rng, scene, kind, rough=number % 2 == 1)) is not None:
                questions.append(Question(str(path), "image", "picture", turn, number // 2 % 2 == 1))
    for number in range(num_clips):
        rng = np.random.default_rng([seed, 1, number])
        name = scenes[number % len(scenes)]
        scene = random_clip(rng, name)  # type: ignore[arg-type]
        path = folder / f"{number:05d}.mp4"
        write_clip(scene, path, random_encoding(rng))
        for kind in kinds:
            if (turn := ask(rng, scene, kind, rough=number // 4 % 2 == 1)) is not None:
                questions.append(Question(str(path), "video", name, turn, number // 8 % 2 == 1))
    return questions


def answer(model: Any, processor: Any, questions: list[Question], *, prune: bool = True) -> list[Answer]:
    """Greedy answers, a batch of questions at a time.

    Args:
        model: a `VideoLlama3ForCausalLM` in evaluation mode.
        processor: its processor.
        questions: in any order; those of a batch share one setting of the system prompt.
        prune: whether unchanged tokens are pruned.
    """
    answers: dict[int, Answer] = {}
    for with_system in (False, True):
        numbers = [i for i, question in enumerate(questions) if question.add_system_prompt == with_system]
        for start in range(0, len(numbers), _BATCH_SIZE):
            part = numbers[start : start + _BATCH_SIZE]
            said = _answer_batch(model, processor, [questions[i] for i in part], with_system, prune)
            answers.update(zip(part, said, strict=True))
    return [answers[i] for i in range(len(questions))]


def _answer_batch(
    model: Any, processor: Any, questions: list[Question], with_system: bool, prune: bool
) -> list[Answer]:
    inputs = processor(
        conversation=[question.messages() for question in questions],
        add_system_prompt=with_system,
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        use_token_compression=prune,
    ).to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    counts = _visual_tokens(inputs, questions)
    return [Answer(text.strip(), *count) for text, count in zip(texts, counts, strict=True)]


def _visual_tokens(inputs: Any, questions: list[Question]) -> list[tuple[int, int]]:
    """Visual tokens of each question's clip before and after pruning; zeros for pictures."""
    if "video_grid_thw" not in inputs:
        return [(0, 0)] * len(questions)
    totals = (inputs["video_grid_thw"].prod(dim=1) // inputs["video_merge_sizes"] ** 2).tolist()
    kept = [int(mask.sum()) for mask in inputs["video_compression_mask"].split(totals)]
    pairs = iter(zip(totals, kept, strict=True))
    return [next(pairs) if question.media == "video" else (0, 0) for question in questions]


def summarize(questions: list[Question], pruned: list[Answer], whole: list[Answer] | None) -> dict[str, Any]:
    """Accuracies with and without pruning, agreement and the share of pruned tokens."""
    clips = {q.path: a for q, a in zip(questions, pruned, strict=True) if q.media == "video"}
    tokens, kept = (sum(getattr(a, name) for a in clips.values()) for name in ("num_tokens", "num_kept"))
    report: dict[str, Any] = {
        "accuracy": _by_question(questions, _right(questions, pruned)),
        "pruned_percent": round(100 * (1 - kept / tokens), 1) if tokens else None,
    }
    if whole is not None:
        on_clips = [i for i, question in enumerate(questions) if question.media == "video"]
        asked = [questions[i] for i in on_clips]
        same = [pruned[i].text == whole[i].text for i in on_clips]
        report["same_without_pruning"] = _share(same)
        report["same_without_pruning_by_question"] = _by_question(asked, same)
        report["accuracy_without_pruning"] = _by_question(asked, _right(asked, [whole[i] for i in on_clips]))
    return report


def _right(questions: list[Question], answers: list[Answer]) -> list[bool]:
    return [is_right(question.turn, said.text) for question, said in zip(questions, answers, strict=True)]


def _by_question(questions: list[Question], values: list[bool]) -> dict[str, dict[str, float]]:
    """Shares by media and kind and by scene and kind; of direction also by how far the shape moves."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for question, value in zip(questions, values, strict=True):
        turn = question.turn
        kinds = [turn.kind, f"{turn.kind}, {turn.detail}"] if turn.detail else [turn.kind]
        for scene in dict.fromkeys((question.media, question.scene)):
            if scene != "picture":
                for kind in kinds:
                    groups[f"{scene}/{kind}"].append(value)
    return {name: _share(group) for name, group in sorted(groups.items())}


def _share(values: list[bool]) -> dict[str, float]:
    return {"percent": round(100 * sum(values) / len(values), 1), "questions": len(values)}


def evaluate(
    model: Any,
    processor: Any,
    *,
    num_pictures: int,
    num_clips: int,
    seed: int = HELDOUT_SEED,
    scenes: Sequence[str] = CLIP_SCENES,
    kinds: Sequence[str] = CLIP_KINDS,
    both: bool = True,
) -> dict[str, Any]:
    """Asks a model about held-out pictures and clips.

    Args:
        model: a `VideoLlama3ForCausalLM` in evaluation mode.
        processor: its processor.
        num_pictures: how many pictures.
        num_clips: how many clips.
        seed: of the files; other than that of the training data.
        scenes: of the clips, in turn: one, several or events.
        kinds: of questions on clips.
        both: whether clips are asked about without pruning as well.

    Returns:
        The report, with wrong answers listed.
    """
    with tempfile.TemporaryDirectory() as folder:
        questions = make_questions(
            Path(folder), num_pictures=num_pictures, num_clips=num_clips, seed=seed, scenes=scenes, kinds=kinds
        )
        pruned = answer(model, processor, questions)
        whole = answer(model, processor, questions, prune=False) if both and num_clips else None
    report = summarize(questions, pruned, whole)
    report["wrong"] = [
        f"{q.scene}: {q.turn.question} | {q.turn.answer} | {a.text}"
        for q, a in zip(questions, pruned, strict=True)
        if not is_right(q.turn, a.text)
    ]
    return report


def main() -> None:
    """Prints a table and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--seed", type=int, default=HELDOUT_SEED)
    parser.add_argument(
        "--scenes", nargs="+", default=CLIP_SCENES, choices=set(CLIP_SCENES), help="of the clips, in turn"
    )
    parser.add_argument("--kinds", nargs="+", default=CLIP_KINDS, choices=CLIP_KINDS, help="of questions on clips")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    # As `videollama3 ask` computes on a CPU.
    model = AutoModelForImageTextToText.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(options.checkpoint)
    started = time.monotonic()
    report = evaluate(
        model,
        processor,
        num_pictures=options.pictures,
        num_clips=options.clips,
        seed=options.seed,
        scenes=options.scenes,
        kinds=options.kinds,
    )
    report.update(
        seconds=round(time.monotonic() - started),
        dtype=str(model.dtype),
        versions={
            "videollama3": videollama3.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )
    whole = report.get("accuracy_without_pruning", {})
    for name, score in report["accuracy"].items():
        without = f"{whole[name]['percent']:7.1f} % without pruning" if name in whole else ""
        print(f"{name:45}{score['percent']:7.1f} %{score['questions']:6} questions{without}")
    if options.clips:
        print(f"{report['pruned_percent']} % of the clips' visual tokens pruned")
        print(f"same answer without pruning: {report['same_without_pruning']['percent']} %")
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
