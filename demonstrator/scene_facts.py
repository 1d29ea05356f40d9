"""What is true of a scene as the sampled frames show it: events, directions, places.

A `Scene` enters, facts leave; putting them into words is left to `questions.py`.
"""

from __future__ import annotations

import dataclasses

from .scenes import MIN_SEEN_MOTION, Direction, Scene, Shape

# A centre this close to the line between two thirds of the frame has no clear position.
_CLEAR_MARGIN = 0.04


@dataclasses.dataclass(frozen=True)
class Event:
    """A shape appears or vanishes.

    Attributes:
        frame: index of the first frame that differs.
        shape: which one.
        verb: appears or vanishes.
    """

    frame: int
    shape: Shape
    verb: str


def events(scene: Scene) -> list[Event]:
    """What appears and vanishes, in order of time."""
    found = [Event(shape.first_frame, shape, "appears") for shape in scene.shapes if shape.first_frame > 0]
    found += [
        Event(shape.last_frame + 1, shape, "vanishes")
        for shape in scene.shapes
        if shape.last_frame < scene.num_frames - 1
    ]
    return sorted(found, key=lambda event: event.frame)


def seen_motion(scene: Scene, shape: Shape) -> float:
    """How far a shape gets from the first to the last sampled frame that shows it, as a share of the frame's side."""
    frames = scene.seen_frames(shape)
    if not frames:
        return 0.0
    (ax, ay), (bx, by) = shape.motion.at(frames[0] / scene.rate), shape.motion.at(frames[-1] / scene.rate)
    return max(abs(ax - bx) / scene.width, abs(ay - by) / scene.height)


def seen_direction(scene: Scene, shape: Shape) -> Direction | None:
    """Which way a shape moves in the sampled frames; None where they do not show it clearly."""
    if len(scene.seen_frames(shape)) < 2:
        return None
    if shape.motion.direction == "none":
        return "none"
    return shape.motion.direction if seen_motion(scene, shape) >= MIN_SEEN_MOTION * 0.99 else None


def cell(scene: Scene, shape: Shape, frame: int = 0) -> str:
    """Where the centre of a shape is, as column and row of a grid of 10 x 10 cells: "(0, 9)" is at the bottom left.

    A centre outside the frame counts to the nearest cell.
    """
    x, y = shape.motion.at(frame / scene.rate)
    column, row = (min(max(int(10 * v), 0), 9) for v in (x / scene.width, y / scene.height))
    return f"({column}, {row})"


def position(scene: Scene, shape: Shape, frame: int | None = None) -> str | None:
    """Where a shape is, by thirds of the picture; None for one that stands between two or is out of sight.

    Args:
        scene: of the shape.
        shape: one of its shapes.
        frame: when; None for a shape that stands all the time, which one that moves does not.
    """
    if frame is None and shape.motion.direction != "none":
        return None
    if frame is not None and not shape.first_frame <= frame <= shape.last_frame:
        return None
    x, y = shape.motion.at((frame or 0) / scene.rate)
    x, y = x / scene.width, y / scene.height
    if not (0 < x < 1 and 0 < y < 1) or any(abs(v - line) < _CLEAR_MARGIN for v in (x, y) for line in (1 / 3, 2 / 3)):
        return None
    row = ("top", "middle", "bottom")[min(int(y * 3), 2)]
    column = ("left", "middle", "right")[min(int(x * 3), 2)]
    if row == column:
        return "center"
    return row if column == "middle" else column if row == "middle" else f"{row} {column}"
