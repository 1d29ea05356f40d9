"""What is asked together in one row of training: conversations, exercises, streaming turns.

A `Scene` and a random generator enter, question-and-answer pairs in their order or timed messages leave; single
questions are left to `questions.py`, files and shares of rows to `make_data.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from .questions import Turn, ask
from .scene_facts import Event, events
from .scenes import Scene
from .wording import reference, roughen, say

Rng = np.random.Generator

SHARE_OF_DESCRIPTIONS = 0.2
SHARE_OF_WHETHER = 0.15
# Of the rows on several shapes.
SHARE_OF_ONE_BY_ONE = 0.5
# Of those: all asked about in one question, which is answered in one sentence.
SHARE_OF_ROSTERS = 0.7
# Of questions such as "Is it red?" in a row on one shape.
NUM_CHECKS = 5
# Of the conversations on clips: an answer is as long as the others together.
SHARE_WITH_TRACK = 0.35
# Seconds from where a clip is watched: a request at this time stands before the first frame, where `videollama3 watch`
# puts it.
BEFORE_THE_CLIP = -1.0


def _asked(rng: Rng, scene: Scene, kinds: Iterable[str]) -> list[Turn]:
    """A question of each kind to which the scene has a clear answer."""
    return [turn for kind in kinds if (turn := ask(rng, scene, str(kind))) is not None]


def description(rng: Rng, scene: Scene) -> list[Turn]:
    """A caption alone: the row from which attributes are learnt fastest."""
    return _asked(rng, scene, ["caption"])


def conversation(rng: Rng, scene: Scene, *, max_turns: int = 6) -> list[Turn]:
    """Several questions of different kinds on one scene, in random order.

    A caption, where there is one, comes last: what it says would answer every question after it.
    """
    kinds = ["color", "shape", "direction", "count", "position", "presence", "order", "when"]
    if scene.num_frames > 1 and rng.random() < SHARE_WITH_TRACK:
        kinds.append("track")
    turns = _asked(rng, scene, rng.permutation(kinds))
    turns = turns[: int(rng.integers(max(1, max_turns - 2), max_turns + 1))]
    return turns + description(rng, scene) if rng.random() < 0.3 else turns


def one_by_one(rng: Rng, scene: Scene) -> list[Turn]:
    """One kind of question on every shape of a scene, and how many there are.

    Mostly as one question with a list for an answer (`questions._roster`), which says most in the fewest words, half
    of the time after the number; else the number stands at some place among the questions.
    Which shape has which colour, place or direction is all that these answers tell apart, and none of them can be
    copied from one before it. With one question a row on a shape by chance, whose colour is asked for stays a guess.
    """
    if rng.random() < SHARE_OF_ROSTERS and (turns := _asked(rng, scene, ["roster"])):
        # Before the list, from which it could be read off.
        return _asked(rng, scene, ["count"]) + turns if rng.random() < 0.5 else turns
    kinds = ["color", "shape", "position"] + (["direction", "direction"] if scene.num_frames > 1 else [])
    kind = str(rng.choice(kinds))
    order = rng.permutation(len(scene.shapes))
    turns = [turn for i in order if (turn := ask(rng, scene, kind, shape=scene.shapes[i])) is not None]
    turns[(at := int(rng.integers(len(turns) + 1))) : at] = _asked(rng, scene, ["count"])
    return turns


def whether(rng: Rng, scene: Scene) -> list[Turn]:
    """Whether some shapes are there, and how many are; of one shape also whether it is red, or a circle.

    Trained without these, the model says yes to all. Several such questions cost little more than one, and those on
    one attribute, with answers of one word, are what it learns to say no to first.
    """
    kinds = rng.permutation(["presence", "presence", "presence", "count", *["check"] * NUM_CHECKS])
    # No answer that could be copied from one before it.
    return list(
        {turn.question if turn.kind == "check" else turn.answer: turn for turn in _asked(rng, scene, kinds)}.values()
    )


def any_talk(rng: Rng, scene: Scene) -> list[Turn]:
    """One of the above: what is encoded once is asked about several times."""
    draw = rng.random()
    if draw < SHARE_OF_DESCRIPTIONS:
        return description(rng, scene)
    if draw < SHARE_OF_DESCRIPTIONS + SHARE_OF_WHETHER:
        return whether(rng, scene)
    if len(scene.shapes) > 1 and draw < SHARE_OF_DESCRIPTIONS + SHARE_OF_WHETHER + SHARE_OF_ONE_BY_ONE:
        return one_by_one(rng, scene)
    return conversation(rng, scene)


@dataclasses.dataclass(frozen=True)
class StreamTurn:
    """A message of a streaming conversation.

    Attributes:
        role: user or assistant.
        content: what is said.
        seconds: when.
    """

    role: str
    content: str
    seconds: float


def stream_conversation(
    rng: Rng, scene: Scene, event: Event | None = None, *, start_seconds: float = 0.0
) -> list[StreamTurn] | None:
    """A request such as "Tell me when the red circle appears." before the clip, and its answer when it happens.

    Args:
        rng: chooses wording and, where `event` is None, what is waited for.
        scene: what is watched.
        event: that is waited for.
        start_seconds: from where on it is watched.

    Returns:
        Messages in order of time; None for a scene in which nothing appears or vanishes.
    """
    happened = events(scene)
    if not happened:
        return None
    event = event or happened[int(rng.integers(len(happened)))]
    name = event.shape.name if rng.random() < 0.7 else reference(rng, scene, event.shape) or event.shape.name
    verb = event.verb
    request = say(
        rng,
        [
            f"Tell me when the NAME {verb}.",
            f"Tell me when the NAME {verb}.",
            f"Say when the NAME {verb}.",
            f"Let me know when the NAME {verb}.",
            f"Please tell me as soon as the NAME {verb}.",
            f"Tell me when a NAME {verb}.",
        ],
        "video",
        NAME=name,
    )
    seconds = math.floor(event.frame / scene.rate * 100) / 100
    label = scene.label(event.frame)
    return [
        StreamTurn("user", roughen(rng, request), start_seconds + BEFORE_THE_CLIP),
        StreamTurn("assistant", f"The {name} {verb} now.", max(seconds, label)),
    ]
