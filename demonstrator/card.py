"""The model card of the demonstrator, with the figures of its own reports.

Reports of `evaluate.py` and `evaluate_watching.py` enter, the text of `README.md` in the checkpoint's folder leaves.
"""

from __future__ import annotations

from typing import Any

from .questions import NUMBERS
from .scenes import COLORS, KINDS

_KINDS = {
    "color": "What color is the shape?",
    "shape": "What shape is it?",
    "direction": "Which way does the shape move?",
    "count": "How many shapes are there?",
    "position": "Where is the shape?",
    "presence": "Is there a red circle?",
    "order": "What happened first?",
    "when": "When does the red circle appear?",
    "caption": "What happens in the video? (the whole sentence right; cells of places may be one off)",
}
_SCENES = {"video": "all clips", "one": "one shape", "several": "several shapes", "events": "shapes that come and go"}


def render_card(report: dict[str, Any], watching: dict[str, Any] | None) -> str:
    """The card.

    Args:
        report: of `evaluate.py`.
        watching: of `evaluate_watching.py`; None leaves that part out.
    """
    parts = [_HEAD.format(colors=", ".join(COLORS), kinds=", ".join(KINDS), most=NUMBERS[4]), _accuracy(report)]
    if watching is not None:
        parts.append(_watching(watching["summary"]))
    return "\n".join([*parts, _TAIL])


def _accuracy(report: dict[str, Any]) -> str:
    scores, same = report["accuracy"], report["same_without_pruning"]
    same_by_kind = report["same_without_pruning_by_question"]

    def cell(scene: str, kind: str) -> str:
        score = scores.get(f"{scene}/{kind}")
        return "" if score is None else f"{score['percent']:g} % of {score['questions']}"

    lines = [
        "## How often it is right",
        "",
        f"| question | {' | '.join(_SCENES.values())} | pictures |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {text} | {' | '.join(cell(scene, kind) for scene in _SCENES)} | {cell('image', kind)} |"
            for kind, text in _KINDS.items()
        ),
        "",
        "Held-out clips and pictures of other seeds than the training data, encoded, read through the whole path, "
        "greedy answers; every second question in other words than the plain one "
        "(`python -m demonstrator.evaluate`).",
        "",
        f"Pruning drops {report['pruned_percent']:g} % of the clips' visual tokens. Without it {same['percent']:g} % "
        f"of {same['questions']} answers are the same, word for word; on clips of one shape, to the first four "
        f"questions above, {', '.join(_percent(same_by_kind.get(f'one/{kind}')) for kind in list(_KINDS)[:4])}.",
        "",
    ]
    return "\n".join(lines)


def _percent(score: dict[str, float] | None) -> str:
    return "-" if score is None else f"{score['percent']:g} %"


def _watching(summary: dict[str, Any]) -> str:
    rows = "\n".join(f"| {name} | {'-' if value is None else value} |" for name, value in summary.items())
    return (
        "## Watching\n\n"
        '"Tell me when the red circle appears.", then the clip frame by frame, as `videollama3 watch` does; in every '
        "second clip the shape never appears (`python -m demonstrator.evaluate_watching`).\n\n"
        f"| | |\n| --- | --- |\n{rows}\n"
    )


_HEAD = """---
library_name: transformers
license: apache-2.0
pipeline_tag: image-text-to-text
tags:
- videollama3
- demonstrator
---

# Demonstrator

A VideoLLaMA3 of 6.7 million parameters, to be run in seconds on any machine: it shows what the package does, and
nothing of what the released models can do. It knows shapes ({kinds}; {colors}), up to {most} at once, that stand,
move, appear and vanish on plain dark backgrounds, and questions about them in plain English. Whatever else it is shown
or asked, it answers in these words.

```python
import videollama3
from transformers import AutoModelForImageTextToText, AutoProcessor

path = videollama3.demonstrator_path()
processor = AutoProcessor.from_pretrained(path)
model = AutoModelForImageTextToText.from_pretrained(path)
```
"""

_TAIL = """## How it was made

By the steps of `make demonstrator`, from generated data alone, on two CPU cores: docs/demonstrator.md of the
repository tells how, and which stages it has been through. `training_record.json` beside this card is the last one's.
Weights are bfloat16; it was trained in bfloat16 on float32 weights.
"""
