"""How a question is worded: one of many ways to say it, a name for one shape of several, rough edges.

Options and a random generator enter, text leaves; what is asked is left to `questions.py`.
"""

from __future__ import annotations

import numpy as np

from .scenes import Scene, Shape

Rng = np.random.Generator


def unique(scene: Scene, shape: Shape, field: str) -> bool:
    """Whether no other shape of a scene has the same `field`: color or kind."""
    return sum(getattr(other, field) == getattr(shape, field) for other in scene.shapes) == 1


def reference(rng: Rng, scene: Scene, shape: Shape, hide: str = "") -> str | None:
    """A phrase that names one shape of several, without saying what `hide` asks for."""
    options = []
    if len(scene.shapes) == 1:
        options += ["shape", "object", "thing", "figure"] if rng.random() < 0.4 else ["shape"]
    if hide != "color" and hide != "kind":
        options.append(shape.name)
    if hide != "color" and unique(scene, shape, "color"):
        options += [f"{shape.color} shape", f"{shape.color} object", f"{shape.color} one"]
    if hide != "kind" and unique(scene, shape, "kind"):
        options.append(shape.kind)
    if not options:
        return None
    if len(scene.shapes) == 1 and rng.random() < 0.6:
        return options[0]
    return str(rng.choice(options))


def say(rng: Rng, options: list[str], media: str, **names: str) -> str:
    """One of several sentences, VIDEO replaced by what the medium is called and other words by `names`."""
    text = str(rng.choice(options)).replace("VIDEO", media)
    for name, value in names.items():
        text = text.replace(name, value)
    return text


def roughen(rng: Rng, text: str) -> str:
    """Changes case and punctuation, or adds a few words around, as people do."""
    draw = rng.random()
    if draw < 0.12:
        text = (
            str(
                rng.choice(
                    [
                        "Look at the video. ",
                        "Please answer: ",
                        "Tell me: ",
                        "Question: ",
                        "Watch closely. ",
                        "Can you tell me: ",
                        "In this video: ",
                    ]
                )
            )
            + text
        )
    elif draw < 0.2:
        text += str(
            rng.choice(
                [" Answer briefly.", " Answer in one word.", " Please answer.", " Answer in one sentence.", " Thanks."]
            )
        )
    draw = rng.random()
    if draw < 0.15:
        text = text.lower()
    elif draw < 0.18:
        text = text.upper()
    draw = rng.random()
    if draw < 0.15:
        text = text.rstrip("?.")
    elif draw < 0.2:
        text = text.rstrip("?.") + " ?"
    return text
