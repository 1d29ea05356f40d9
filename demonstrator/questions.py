"""Questions in plain English on a scene, with true answers, in many wordings; captions.

A `Scene` and a random generator enter, question-and-answer pairs leave, each with its kind and what counts as right;
words are left to `wording.py`, what is true to `scene_facts.py`, what is asked together to `conversations.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from .scene_facts import cell, events, position, seen_direction, seen_motion
from .scenes import COLORS, KINDS, Direction, Scene, Shape
from .wording import reference, roughen, say, unique

Rng = np.random.Generator

NUMBERS = ("zero", "one", "two", "three", "four", "five")
_MOVES: dict[Direction, str] = {
    "left": "moves left",
    "right": "moves right",
    "up": "moves up",
    "down": "moves down",
    "none": "does not move",
}
# Seconds by which an answer to "when" may be off: with ticks of a second, none.
WHEN_TOLERANCE = 0.5
# A cell of the 10 x 10 grid, as `scene_facts.cell` names it.
_CELL = re.compile(r"\((\d), (\d)\)")


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        kind: color, shape, direction, count, position, track, order, when, events, presence, check, caption, roster or
            times.
        question: in plain English.
        answer: the sentence to learn.
        key: what an answer must contain to be right, lower case; for `when` the time in seconds.
        others: words of the same kind that a right answer must not contain.
        detail: what makes it easier or harder than others of its kind, for the report; empty where nothing does.
    """

    kind: str
    question: str
    answer: str
    key: str
    others: tuple[str, ...] = ()
    detail: str = ""


_POSITIONS = (
    "top left",
    "top right",
    "bottom left",
    "bottom right",
    "top",
    "bottom",
    "left",
    "right",
    "center",
)


def _color(rng: Rng, scene: Scene, media: str, shape: Shape | None = None) -> Turn | None:
    shape = shape or scene.shapes[int(rng.integers(len(scene.shapes)))]
    name = reference(rng, scene, shape, hide="color")
    if name is None:
        return None
    question = say(
        rng,
        [
            "What color is the NAME?",
            "What color is the NAME?",
            "What color is the NAME?",
            "What is the color of the NAME?",
            "Which color is the NAME?",
            "Which color does the NAME have?",
            "What color does the NAME have?",
            "What colour is the NAME?",
            "What is the colour of the NAME?",
            "Name the color of the NAME.",
            "What color is the NAME in the VIDEO?",
            "Tell me the color of the NAME.",
            "The NAME is of which color?",
            "What's the color of the NAME?",
            "What color is it?" if len(scene.shapes) == 1 else "What color is the NAME?",
        ],
        media,
        NAME=name,
    )
    answer = say(rng, ["The NAME is COLOR."], media, NAME=name if name != "thing" else "shape", COLOR=shape.color)
    return Turn("color", question, answer, shape.color, ("red", "green", "blue", "yellow", "purple", "white"))


def _shape(rng: Rng, scene: Scene, media: str, shape: Shape | None = None) -> Turn | None:
    shape = shape or scene.shapes[int(rng.integers(len(scene.shapes)))]
    if len(scene.shapes) == 1:
        question = say(
            rng,
            [
                "What shape is it?",
                "What shape is it?",
                "What shape is it?",
                "What shape is the object?",
                "What shape is shown?",
                "Which shape is it?",
                "Which shape do you see?",
                "What shape do you see?",
                "What is the shape?",
                "What shape is in the VIDEO?",
                "Which shape is in the VIDEO?",
                "Name the shape.",
                "What kind of shape is it?",
                "What kind of shape is this?",
                "What shape is this?",
                "What is the shape of the object?",
                "What form does it have?",
                "What shape is the COLOR object?",
                "What shape is the COLOR one?",
                "What object is in the VIDEO?",
                "What is shown in the VIDEO?",
            ],
            media,
            COLOR=shape.color,
        )
        answer = f"It is a {shape.kind}."
    else:
        if not unique(scene, shape, "color"):
            return None
        question = say(
            rng,
            [
                "What shape is the COLOR object?",
                "What shape is the COLOR one?",
                "Which shape is COLOR?",
                "What is the shape of the COLOR object?",
                "What shape is COLOR?",
                "What is the COLOR object?",
                "Name the COLOR shape.",
                "What kind of shape is the COLOR one?",
            ],
            media,
            COLOR=shape.color,
        )
        answer = f"It is a {shape.kind}."
    return Turn("shape", question, answer, shape.kind, ("circle", "square", "triangle", "cross"))


def _direction(rng: Rng, scene: Scene, media: str, shape: Shape | None = None) -> Turn | None:
    shape = shape or scene.shapes[int(rng.integers(len(scene.shapes)))]
    direction = seen_direction(scene, shape)
    name = reference(rng, scene, shape)
    if direction is None or name is None:
        return None
    question = say(
        rng,
        [
            "Which way does the NAME move?",
            "Which way does the NAME move?",
            "Which way does the NAME move?",
            "Which way is the NAME moving?",
            "Which direction does the NAME move?",
            "In which direction does the NAME move?",
            "In what direction does the NAME move?",
            "In which direction is the NAME moving?",
            "What direction is the NAME moving in?",
            "Where does the NAME go?",
            "Where does the NAME move?",
            "How does the NAME move?",
            "What is the direction of motion of the NAME?",
            "Does the NAME move left, right, up or down?",
            "To which side does the NAME move?",
            "Which way does the NAME go?",
            "Which way does it move?" if len(scene.shapes) == 1 else "Which way does the NAME move?",
            "What does the NAME do in the VIDEO?",
        ],
        media,
        NAME=name,
    )
    answer = f"It {_MOVES[direction]}."
    if direction == "none":
        detail = "stands"
    else:
        detail = "moves a fifth or more" if seen_motion(scene, shape) >= 0.2 else "moves less than a fifth"
    return Turn(
        "direction",
        question,
        answer,
        "not move" if direction == "none" else direction,
        ("left", "right", "up", "down", "not move"),
        detail,
    )


def _count(rng: Rng, scene: Scene, media: str) -> Turn | None:
    question = say(
        rng,
        [
            "How many shapes are there?",
            "How many shapes are there?",
            "How many shapes are there?",
            "How many shapes do you see?",
            "How many shapes can you see?",
            "How many objects are there?",
            "How many shapes are in the VIDEO?",
            "How many shapes are shown?",
            "How many shapes does the VIDEO show?",
            "Count the shapes.",
            "What is the number of shapes?",
            "How many different shapes are there?",
            "How many figures are there?",
            "How many things are there in the VIDEO?",
        ],
        media,
    )
    count = len(scene.shapes)
    word = NUMBERS[count]
    # Word and digit: whoever reads the answer may look for either.
    answer = f"There is {word} ({count}) shape." if count == 1 else f"There are {word} ({count}) shapes."
    return Turn("count", question, answer, word, NUMBERS[1:])


def _position(rng: Rng, scene: Scene, media: str, shape: Shape | None = None) -> Turn | None:
    shape = shape or scene.shapes[int(rng.integers(len(scene.shapes)))]
    frames = scene.sampled_frames()
    moments = ("",) if len(frames) < 2 else ("", " at the beginning", " at first", " at the end", " at last")
    moment = str(rng.choice(moments))
    frame = {"": None, " at the beginning": frames[0], " at first": frames[0]}.get(moment, frames[-1])
    place = position(scene, shape, frame)
    name = reference(rng, scene, shape)
    if place is None or name is None:
        return None
    question = say(
        rng,
        [
            "Where is the NAMEWHEN?",
            "Where is the NAMEWHEN?",
            "Where is the NAME in the VIDEOWHEN?",
            "What is the position of the NAMEWHEN?",
            "In which part of the VIDEO is the NAMEWHEN?",
            "Where do you see the NAMEWHEN?",
            "Where can the NAME be seenWHEN?",
        ],
        media,
        NAME=name,
        WHEN=moment,
    )
    said = f"{'in' if place == 'center' else 'at'} the {place}"
    answer = f"It is at {cell(scene, shape)}, {said}." if scene.num_frames == 1 else f"It is {said}."
    return Turn("position", question, answer, place, tuple(p for p in _POSITIONS if p not in place))


def _track(rng: Rng, scene: Scene, media: str, shape: Shape | None = None) -> Turn | None:
    shape = shape or scene.shapes[int(rng.integers(len(scene.shapes)))]
    name = reference(rng, scene, shape)
    frames = scene.seen_frames(shape)
    if scene.num_frames == 1 or name is None or not frames:
        return None
    question = say(
        rng,
        [
            "Track the NAME.",
            "Follow the NAME.",
            "Where is the NAME second by second?",
            "Where is the NAME at each second?",
            "Track the NAME in the VIDEO.",
        ],
        media,
        NAME=name,
    )
    places = ", ".join(f"{scene.label(frame):.1f} {cell(scene, shape, frame)}" for frame in frames)
    return Turn("track", question, f"At {places}.", f"at {places}.")


def _presence(rng: Rng, scene: Scene, media: str) -> Turn | None:
    shape = scene.shapes[int(rng.integers(len(scene.shapes)))]
    color: str = shape.color
    kind: str = shape.kind
    if rng.random() >= 0.5:
        color = str(rng.choice(COLORS)) if rng.random() < 0.5 else color
        kind = str(rng.choice(KINDS))
    there = any(s.color == color and s.kind == kind for s in scene.shapes)
    question = say(
        rng,
        [
            "Is there a NAME?",
            "Is there a NAME in the VIDEO?",
            "Do you see a NAME?",
            "Does the VIDEO show a NAME?",
            "Can you see a NAME?",
        ],
        media,
        NAME=f"{color} {kind}",
    )
    answer = f"Yes, there is a {color} {kind}." if there else f"No, there is no {color} {kind}."
    return Turn("presence", question, answer, "yes" if there else "no,", ("yes", "no,"))


def _check(rng: Rng, scene: Scene, media: str) -> Turn | None:
    if len(scene.shapes) != 1:
        return None
    shape = scene.shapes[0]
    asked = str(rng.choice(["color", "kind", "both"]))
    color: str = shape.color
    kind: str = shape.kind
    if rng.random() < 0.5:
        # One attribute is wrong; which one of two is drawn.
        if asked == "color" or (asked == "both" and rng.random() < 0.5):
            color = str(rng.choice([other for other in COLORS if other != color]))
        else:
            kind = str(rng.choice([other for other in KINDS if other != kind]))
    name = {"color": color, "kind": f"a {kind}", "both": f"a {color} {kind}"}[asked]
    question = say(rng, ["Is it NAME?", "Is the shape NAME?", "Is the object NAME?"], media, NAME=name)
    word = "yes" if (color, kind) == (shape.color, shape.kind) else "no"
    return Turn("check", question, f"{word.capitalize()}.", word, ("yes", "no"))


def _order(rng: Rng, scene: Scene, media: str) -> Turn | None:
    happened = events(scene)
    if len(happened) < 2:
        return None
    first = happened[0]
    appeared = [event for event in happened if event.verb == "appears"]
    if len(appeared) >= 2 and rng.random() < 0.4:
        first = appeared[0]
        question = say(
            rng,
            [
                "Which shape appears first?",
                "What appears first?",
                "Which shape appears first in the VIDEO?",
                f"Which appears first, the {appeared[0].shape.name} or the {appeared[1].shape.name}?",
                f"Which appears first, the {appeared[1].shape.name} or the {appeared[0].shape.name}?",
            ],
            media,
        )
    else:
        question = say(
            rng,
            [
                "What happened first?",
                "What happens first?",
                "What happens first in the VIDEO?",
                "Which event comes first?",
                "What is the first thing that happens?",
            ],
            media,
        )
    answer = f"The {first.shape.name} {first.verb} first."
    return Turn("order", question, answer, f"{first.shape.name} {first.verb}")


def _when(rng: Rng, scene: Scene, media: str, shape: Shape | None = None) -> Turn | None:
    happened = [event for event in events(scene) if shape in (None, event.shape)]
    if not happened:
        return None
    event = happened[int(rng.integers(len(happened)))]
    name = reference(rng, scene, event.shape)
    if name is None:
        return None
    stem = event.verb.removesuffix("es").removesuffix("s") if event.verb == "vanishes" else "appear"
    question = say(
        rng,
        [
            f"When does the NAME {stem}?",
            f"When does the NAME {stem}?",
            f"At what time does the NAME {stem}?",
            f"At which second does the NAME {stem}?",
            f"After how many seconds does the NAME {stem}?",
            f"When does the NAME {stem} in the VIDEO?",
        ],
        media,
        NAME=name,
    )
    seconds = scene.label(event.frame)
    return Turn("when", question, f"At {seconds:.1f} seconds.", f"{seconds:.1f}")


def _events(rng: Rng, scene: Scene, media: str) -> Turn:
    question = say(
        rng,
        [
            "List what happens.",
            "List what appears and vanishes.",
            "What appears and what vanishes?",
            "What appears and vanishes in the VIDEO?",
            "What happens at which second?",
        ],
        media,
    )
    happened = [f"{scene.label(event.frame):.1f} the {event.shape.name} {event.verb}" for event in events(scene)]
    answer = f"At {', at '.join(happened)}." if happened else "Nothing appears or vanishes."
    return Turn("events", question, answer, answer.lower())


def _roster(rng: Rng, scene: Scene, media: str, asked: str | None = None) -> Turn | None:
    """One attribute of each shape, right after its name, as in "Each: circle red, cross blue".

    An exercise. In a sentence what is asked for stands some words after the name, and a model this small does not find
    out that it has to look for what the name means; here it stands beside it.
    """
    in_clips = ["color", "shape", "direction", "direction"]
    asked = asked or str(rng.choice(in_clips if scene.num_frames > 1 else ["color", "shape", "position"]))
    times = {id(event.shape): f"{scene.label(event.frame):.1f}" for event in events(scene)}
    found = []
    for i in rng.permutation(len(scene.shapes)):
        shape = scene.shapes[i]
        names: list[str] = [] if asked in ("color", "shape") else [shape.name]
        names += [shape.color] if asked != "color" and unique(scene, shape, "color") else []
        names += [shape.kind] if asked != "shape" and unique(scene, shape, "kind") else []
        told = {
            "color": shape.color,
            "shape": shape.kind,
            "position": cell(scene, shape).strip("()").replace(",", ""),
            "direction": seen_direction(scene, shape),
            "time": times.get(id(shape)),
        }[asked]
        if names and told is not None:
            found.append((str(rng.choice(names)), told))
    if len(found) < (1 if asked == "time" else 2):
        return None
    plural = {"color": "colors", "shape": "shapes", "position": "places", "direction": "directions", "time": "times"}
    question = f"List {plural[asked]}: {', '.join(name for name, _ in found)}."
    answer = f"Each: {', '.join(f'{name} {told}' for name, told in found)}."
    return Turn("times" if asked == "time" else "roster", question, answer, answer.lower())


def _times(rng: Rng, scene: Scene, media: str) -> Turn | None:
    return _roster(rng, scene, media, "time")


def _number_phrase(scene: Scene) -> str:
    return f"{NUMBERS[len(scene.shapes)].capitalize()} shapes: "


def _describe(scene: Scene, shape: Shape) -> str:
    """One shape with all that is known of it: "a red circle moves left"."""
    text = f"a {shape.name}"
    if scene.num_frames > 1:
        direction = seen_direction(scene, shape)
        if direction == "none" and (place := position(scene, shape)):
            text += f" {'in' if place == 'center' else 'at'} the {place}"
        if direction is not None:
            text += f" {_MOVES[direction]}"
        if shape.first_frame > 0:
            text += f" and appears at {scene.label(shape.first_frame):.1f} seconds"
        elif shape.last_frame < scene.num_frames - 1:
            text += f" and vanishes at {scene.label(shape.last_frame + 1):.1f} seconds"
        return text.replace(f"{shape.name} and ", f"{shape.name} ")
    return f"{text} at {cell(scene, shape)}"


def caption(scene: Scene) -> str:
    """Everything that is known of a scene; its shapes from left to right."""
    shapes = sorted(scene.shapes, key=lambda shape: shape.motion.x / scene.width)
    described = [_describe(scene, shape) for shape in shapes]
    if len(described) == 1:
        return described[0][0].upper() + described[0][1:] + "."
    return _number_phrase(scene) + ", ".join(described[:-1]) + " and " + described[-1] + "."


def _caption(rng: Rng, scene: Scene, media: str) -> Turn:
    question = say(
        rng,
        [
            "Describe the VIDEO.",
            "What do you see?",
            "What happens in the VIDEO?" if media == "video" else "Describe this VIDEO.",
            "Give a caption.",
            "What is in the VIDEO?",
            "Describe what you see.",
        ],
        media,
    )
    text = caption(scene)
    return Turn("caption", question, text, text.lower())


_ON_ONE_SHAPE: dict[str, Callable[[Rng, Scene, str, Shape | None], Turn | None]] = {
    "color": _color,
    "shape": _shape,
    "direction": _direction,
    "position": _position,
    "track": _track,
    "when": _when,
}
_ON_THE_SCENE: dict[str, Callable[[Rng, Scene, str], Turn | None]] = {
    "count": _count,
    "presence": _presence,
    "check": _check,
    "order": _order,
    "events": _events,
    "roster": _roster,
    "times": _times,
    "caption": _caption,
}
_ON_CLIPS_ONLY = ("direction", "track", "order", "when", "events")


def ask(rng: Rng, scene: Scene, kind: str, *, shape: Shape | None = None, rough: bool = True) -> Turn | None:
    """A question of one kind; None where the scene has no clear answer to it.

    Args:
        rng: chooses shape and wording.
        scene: what is asked about.
        kind: a name of `Turn.kind`.
        shape: which of its shapes is asked about, where the kind of question is on one; by chance for None.
        rough: whether case, punctuation and words around the question vary.
    """
    media = "image" if scene.num_frames == 1 else "video"
    if media == "image" and rng.random() < 0.5:
        media = "picture"
    if not scene.shapes or (scene.num_frames == 1 and kind in _ON_CLIPS_ONLY):
        return None
    one = _ON_ONE_SHAPE.get(kind)
    turn = one(rng, scene, media, shape) if one else _ON_THE_SCENE[kind](rng, scene, media)
    if turn is None or not rough:
        return turn
    question = roughen(rng, turn.question)
    return dataclasses.replace(turn, question=question if media == "video" else question.replace("video", "picture"))


def _cells_agree(text: str, other: str) -> bool:
    """Whether the same cells are named, or neighbours of them."""
    cells = zip(_CELL.findall(text), _CELL.findall(other), strict=True)
    return all(abs(int(a) - int(b)) <= 1 for one, two in cells for a, b in zip(one, two, strict=True))


def is_right(turn: Turn, answer: str, *, tolerance_seconds: float = WHEN_TOLERANCE) -> bool:
    """Whether an answer contains what it must and nothing that contradicts it.

    Args:
        turn: question with its key.
        answer: what the model said.
        tolerance_seconds: for `when`: how far off a time may be.
    """
    text = answer.lower()
    if turn.kind == "when":
        numbers = [word.strip(".,") for word in text.split() if word.strip(".,").replace(".", "", 1).isdigit()]
        return bool(numbers) and abs(float(numbers[0]) - float(turn.key)) <= tolerance_seconds + 1e-6
    if turn.kind in ("caption", "track"):
        told, true = (_CELL.sub("", said) for said in (text.strip(), turn.key))
        return told == true and _cells_agree(text, turn.key)
    if turn.key not in text:
        return False
    rest = text.replace(turn.key, " ")
    return not any(f" {other}" in f" {rest}" for other in turn.others if other != turn.key)
