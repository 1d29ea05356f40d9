"""Coloured shapes on dark backgrounds: random scenes, their pictures at any time, and mp4 or png files of them.

A random generator enters, a `Scene` leaves, from which pictures, files and true answers follow; what is true of it is
left to `scene_facts.py`. Frame size, rate, length, sizes, speeds, drawing style, noise and compression all vary, so
that a model trained on these clips is not tied to one renderer.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, Literal

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Color = Literal["red", "green", "blue", "yellow", "purple", "white"]
Kind = Literal["circle", "square", "triangle", "cross"]
Direction = Literal["left", "right", "up", "down", "none"]
Pixels = npt.NDArray[np.uint8]
Rng = np.random.Generator

COLORS: tuple[Color, ...] = ("red", "green", "blue", "yellow", "purple", "white")
KINDS: tuple[Kind, ...] = ("circle", "square", "triangle", "cross")
MAX_SHAPES = 4
DIRECTIONS: tuple[Direction, ...] = ("left", "right", "up", "down")
_STEPS: dict[Direction, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "none": (0, 0),
}

MIN_SIDE, MAX_SIDE = 84, 320
RATES = (10, 12, 15, 20, 24, 25, 30)
# Clips at low rates cost less to draw and to encode; what the model sees of them is the same.
_RATE_WEIGHTS = (0.3, 0.15, 0.15, 0.1, 0.1, 0.1, 0.1)
MIN_SECONDS, MAX_SECONDS = 3.0, 10.0
# The demonstrator looks at one frame per second, as the model does: the frame labelled t shows the last picture before
# t + 1.
TICK_SECONDS = 1.0
# A shape that moves does so by at least this share of the frame, as seen in the sampled frames: more than a cell of
# the grid in which places are told.
MIN_SEEN_MOTION = 0.12
_SMOOTH_FACTOR = 4
_NOISE_FRAMES = 5


@dataclasses.dataclass(frozen=True)
class Motion:
    """Where the centre of a shape is.

    Attributes:
        x: of the centre before it moves, in pixels from the left.
        y: likewise from the top.
        direction: which way it moves; none for a shape that stands.
        distance: how far it moves, in pixels.
        begin_seconds: when it begins to move.
        end_seconds: when it has arrived.
    """

    x: float
    y: float
    direction: Direction = "none"
    distance: float = 0.0
    begin_seconds: float = 0.0
    end_seconds: float = 1.0

    def at(self, seconds: float) -> tuple[float, float]:
        """The centre at a time, in pixels."""
        share = (seconds - self.begin_seconds) / (self.end_seconds - self.begin_seconds)
        way = self.distance * min(max(share, 0.0), 1.0)
        dx, dy = _STEPS[self.direction]
        return self.x + dx * way, self.y + dy * way


@dataclasses.dataclass(frozen=True)
class Shape:
    """One shape of a scene.

    Attributes:
        kind: what it is.
        color: name of its colour.
        rgb: the colour itself, 0..255.
        size: diameter or side, in pixels.
        motion: where it is.
        first_frame: index of the first frame that shows it.
        last_frame: index of the last frame that shows it.
        angle: clockwise turn in degrees.
        arm: width of a cross's arms, as a share of its size.
        outline: width of the line, as a share of the size, for shapes that are not filled; 0 = filled.
    """

    kind: Kind
    color: Color
    rgb: tuple[int, int, int]
    size: float
    motion: Motion
    first_frame: int = 0
    last_frame: int = 10**6
    angle: float = 0.0
    arm: float = 0.33
    outline: float = 0.0

    @property
    def name(self) -> str:
        """Colour and kind, such as "red circle"."""
        return f"{self.color} {self.kind}"


@dataclasses.dataclass(frozen=True)
class Look:
    """How a scene is drawn.

    Attributes:
        background: 0..255.
        smooth: whether edges are anti-aliased.
        noise: standard deviation of the noise, in grey levels.
        noise_moves: whether the noise changes from frame to frame.
        seed: of the noise.
    """

    background: tuple[int, int, int]
    smooth: bool = True
    noise: float = 0.0
    noise_moves: bool = False
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Scene:
    """Shapes in front of a plain background over some time.

    Attributes:
        width: of a frame in pixels.
        height: of a frame in pixels.
        rate: frames per second.
        num_frames: of the clip; 1 for a picture.
        shapes: in no particular order.
        look: how it is drawn.
    """

    width: int
    height: int
    rate: int
    num_frames: int
    shapes: tuple[Shape, ...]
    look: Look

    @property
    def seconds(self) -> float:
        """Length of the clip."""
        return self.num_frames / self.rate

    def label(self, frame: int) -> float:
        """Time in seconds that the model reads next to the first sampled frame that shows what `frame` shows."""
        return math.floor(Fraction(frame, self.rate) / Fraction(TICK_SECONDS)) * TICK_SECONDS

    def sampled_frames(self) -> list[int]:
        """Indices of the frames that the demonstrator looks at, by the training rule of the model."""
        ticks = max(1, math.floor(Fraction(self.num_frames, self.rate) / Fraction(TICK_SECONDS)))
        return [math.ceil((k + 1) * Fraction(TICK_SECONDS) * self.rate) - 1 for k in range(ticks)]

    def seen_frames(self, shape: Shape) -> list[int]:
        """Those of the sampled frames in which a shape is in sight."""
        return [
            frame
            for frame in self.sampled_frames()
            if shape.first_frame <= frame <= shape.last_frame
            and _is_inside(shape.motion.at(frame / self.rate), shape.size, (self.width, self.height))
        ]

    def pictures(self, frames: list[int] | None = None) -> Iterator[Pixels]:
        """Pictures of some or all frames: uint8 (height, width, 3)."""
        noise = _noise(self)
        before: tuple[tuple[int, float, float], ...] | None = None
        picture = np.zeros(0, dtype=np.uint8)
        for frame in range(self.num_frames) if frames is None else frames:
            state = tuple(
                (i, *shape.motion.at(frame / self.rate))
                for i, shape in enumerate(self.shapes)
                if shape.first_frame <= frame <= shape.last_frame
            )
            if state != before:
                picture, before = self._draw(state), state
            yield picture if noise is None else _add_noise(picture, noise, frame, self.look)

    def _draw(self, state: tuple[tuple[int, float, float], ...]) -> Pixels:
        image = Image.new("RGB", (self.width, self.height), self.look.background)
        for i, x, y in state:
            _draw_shape(image, self.shapes[i], x, y, smooth=self.look.smooth)
        return np.asarray(image)


# ---------------------------------------------------------------------- drawing


def _polygons(shape: Shape) -> list[list[tuple[float, float]]]:
    """Corners of a shape of size 1 around the origin; none for a circle."""
    half, arm = 0.5, shape.arm / 2
    if shape.kind == "square":
        corners = [[(-half, -half), (half, -half), (half, half), (-half, half)]]
    elif shape.kind == "triangle":
        corners = [[(0.0, -half), (half, half), (-half, half)]]
    elif shape.kind == "cross":
        corners = [
            [
                (-arm, -half),
                (arm, -half),
                (arm, -arm),
                (half, -arm),
                (half, arm),
                (arm, arm),
                (arm, half),
                (-arm, half),
                (-arm, arm),
                (-half, arm),
                (-half, -arm),
                (-arm, -arm),
            ]
        ]
    else:
        return []
    cos, sin = math.cos(math.radians(shape.angle)), math.sin(math.radians(shape.angle))
    return [[(x * cos - y * sin, x * sin + y * cos) for x, y in polygon] for polygon in corners]


def _draw_shape(image: Image.Image, shape: Shape, x: float, y: float, *, smooth: bool) -> None:
    """Draws a shape with its centre at (x, y); by a mask four times as large where edges are to be smooth."""
    if not smooth:
        _fill(ImageDraw.Draw(image), shape, x, y, shape.size, shape.rgb)
        return
    reach = math.ceil(shape.size * 0.75) + 2
    left, top = math.floor(x) - reach, math.floor(y) - reach
    side = 2 * reach
    mask = Image.new("L", (side * _SMOOTH_FACTOR, side * _SMOOTH_FACTOR), 0)
    factor = _SMOOTH_FACTOR
    _fill(ImageDraw.Draw(mask), shape, (x - left) * factor, (y - top) * factor, shape.size * factor, 255)
    image.paste(shape.rgb, (left, top), mask.reduce(factor))


def _fill(
    draw: ImageDraw.ImageDraw, shape: Shape, x: float, y: float, size: float, color: int | tuple[int, int, int]
) -> None:
    line = max(1, round(shape.outline * size)) if shape.outline else 0
    if shape.kind == "circle":
        box = (x - size / 2, y - size / 2, x + size / 2 - 1, y + size / 2 - 1)
        draw.ellipse(box, fill=None if line else color, outline=color if line else None, width=line or 1)
        return
    for polygon in _polygons(shape):
        corners = [(x + size * px, y + size * py) for px, py in polygon]
        if line:
            draw.line([*corners, corners[0], corners[1]], fill=color, width=line, joint="curve")
        else:
            draw.polygon(corners, fill=color)


def _noise(scene: Scene) -> npt.NDArray[np.int16] | None:
    """A few frames of noise, int16 (frames, height, width, 3); None for a clean scene."""
    if not scene.look.noise:
        return None
    rng = np.random.default_rng(scene.look.seed)
    count = _NOISE_FRAMES if scene.look.noise_moves else 1
    size = (count, scene.height, scene.width, 3)
    return np.rint(rng.standard_normal(size, dtype=np.float32) * scene.look.noise).astype(np.int16)


def _add_noise(picture: Pixels, noise: npt.NDArray[np.int16], frame: int, look: Look) -> Pixels:
    # Shifted, so that a few frames of noise do for a whole clip.
    values = np.roll(noise[frame % len(noise)], 7 * frame, axis=1) if look.noise_moves else noise[0]
    return np.clip(picture + values, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------- choosing


def random_color(rng: Rng, color: Color) -> tuple[int, int, int]:
    """Some red, green, blue, 0..255, that people call by this name; a plain one half of the time."""
    if rng.random() < 0.5:
        plain = _PLAIN_COLORS[color]
        return plain[int(rng.integers(len(plain)))]
    if color == "white":
        level = int(rng.integers(205, 250))
        red, green, blue = (level + int(v) for v in rng.integers(-8, 6, 3))
        return red, green, blue
    if color == "purple":
        blue = int(rng.integers(110, 256))
        red = int(blue * rng.uniform(0.58, 1.0))
        return red, int(red * rng.uniform(0, 0.5)), blue
    low, high = _COLOR_RANGES[color]
    red, green, blue = (int(rng.integers(a, b + 1)) for a, b in zip(low, high, strict=True))
    return red, green, blue


_PLAIN_COLORS: dict[Color, tuple[tuple[int, int, int], ...]] = {
    "red": ((255, 0, 0), (220, 40, 40), (220, 20, 60), (230, 30, 30), (200, 0, 0)),
    "green": ((0, 255, 0), (0, 128, 0), (0, 200, 0), (40, 200, 60), (50, 205, 50), (34, 139, 34)),
    "blue": ((0, 0, 255), (50, 90, 230), (30, 144, 255), (40, 80, 255), (0, 0, 200), (65, 105, 225)),
    "yellow": ((255, 255, 0), (230, 210, 50), (255, 215, 0), (240, 220, 40)),
    "purple": ((128, 0, 128), (160, 32, 240), (150, 50, 200), (148, 0, 211), (160, 60, 220), (147, 112, 219)),
    "white": ((255, 255, 255), (240, 240, 240), (230, 230, 230), (245, 245, 245)),
}
_COLOR_RANGES: dict[Color, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "red": ((170, 0, 0), (255, 70, 70)),
    "green": ((0, 115, 0), (85, 255, 100)),
    "blue": ((0, 0, 170), (60, 130, 255)),
    "yellow": ((205, 190, 0), (255, 255, 100)),
}


def _random_shape(
    rng: Rng, color: Color, kind: Kind, size: float, motion: Motion, first_frame: int, last_frame: int
) -> Shape:
    angle = 0.0
    if rng.random() < 0.25:
        angle = float(rng.uniform(-12, 12))
    if kind == "cross" and rng.random() < 0.3:
        angle = 45.0
    elif kind == "triangle" and rng.random() < 0.15:
        angle = float(rng.choice([90, 180, 270]))
    return Shape(
        kind=kind,
        color=color,
        rgb=random_color(rng, color),
        size=size,
        motion=motion,
        first_frame=first_frame,
        last_frame=last_frame,
        angle=angle,
        arm=float(rng.uniform(0.2, 0.42)),
        outline=float(rng.uniform(0.12, 0.2)) if rng.random() < 0.05 else 0.0,
    )


def _random_look(rng: Rng) -> Look:
    if rng.random() < 0.3:
        background = (0, 0, 0) if rng.random() < 0.4 else (int(rng.integers(5, 61)),) * 3
    else:
        red, green, blue = (int(v) for v in rng.integers(0, 61, 3))
        background = (red, green, blue)
    noisy = rng.random()
    return Look(
        background=background,
        smooth=bool(rng.random() < 0.6),
        noise=0.0 if noisy < 0.65 else float(rng.uniform(0.5, 5.0)),
        noise_moves=bool(noisy > 0.75),
        seed=int(rng.integers(2**31)),
    )


def _random_sides(rng: Rng) -> tuple[int, int]:
    """Width and height in even pixels, as most encoders want them; small ones are commoner."""
    low, high = math.log(MIN_SIDE), math.log(MAX_SIDE)
    width, height = (2 * round(math.exp(v) / 2) for v in rng.uniform(low, high, 2))
    return (width, width) if rng.random() < 0.2 else (width, height)


def _random_length(rng: Rng) -> tuple[int, int]:
    """Rate and number of frames; short clips are commoner."""
    rate = int(rng.choice(RATES, p=_RATE_WEIGHTS))
    seconds = min(MIN_SECONDS + float(rng.exponential(2.0)), MAX_SECONDS)
    return rate, math.ceil(seconds * rate)


def _random_motion(
    rng: Rng, direction: Direction, sides: tuple[int, int], size: float, seconds: float, rate: int
) -> Motion | None:
    """A motion in this direction that the sampled frames show, or None where the draw does not give one."""
    width, height = sides
    margin = size / 2 + 1
    x = float(rng.uniform(margin, max(width - margin, margin + 1)))
    y = float(rng.uniform(margin, max(height - margin, margin + 1)))
    if direction == "none":
        return Motion(x, y)
    along = width if direction in ("left", "right") else height
    room = along - 2 * margin
    style = rng.choice(["throughout", "stops", "late", "leaves"], p=[0.6, 0.2, 0.12, 0.08])
    distance = float(rng.uniform(min(0.15 * along, room), room))
    begin, end = 0.0, seconds
    if style == "stops":
        end = seconds * float(rng.uniform(0.15, 0.8))
    elif style == "late":
        begin = seconds * float(rng.uniform(0.1, 0.6))
        end = begin + (seconds - begin) * float(rng.uniform(0.3, 1.0))
    elif style == "leaves":
        distance = room * float(rng.uniform(0.6, 1.0)) + size
    slack = max(room - distance, 0.0) * float(rng.random())
    ahead = direction in ("right", "down")
    start = margin + slack if ahead else along - margin - slack
    x, y = (start, y) if direction in ("left", "right") else (x, start)
    motion = Motion(x, y, direction, distance, begin, end)
    return motion if _is_seen(motion, along, sides, size, seconds, rate) else None


def _is_inside(place: tuple[float, float], size: float, sides: tuple[int, int]) -> bool:
    """Whether a shape with its centre at this place is in sight, rather than a rest of it."""
    return all(-size / 4 < value < side + size / 4 for value, side in zip(place, sides, strict=True))


def _is_seen(motion: Motion, along: int, sides: tuple[int, int], size: float, seconds: float, rate: int) -> bool:
    """Whether the sampled frames show enough of a motion."""
    times = [k * TICK_SECONDS - 1 / rate for k in range(1, int(seconds / TICK_SECONDS) + 1)]
    inside = [place for place in map(motion.at, times) if _is_inside(place, size, sides)]
    if len(inside) < 2:
        return False
    moved = max(abs(inside[-1][0] - inside[0][0]), abs(inside[-1][1] - inside[0][1]))
    return moved >= MIN_SEEN_MOTION * along


def _overlap(one: Shape, other: Shape, rate: int, num_frames: int) -> bool:
    """Whether two shapes touch at some time when both are there."""
    first = max(one.first_frame, other.first_frame, 0)
    last = min(one.last_frame, other.last_frame, num_frames - 1)
    reach = (one.size + other.size) / 2 * 1.15
    for frame in range(first, last + 1, max(1, rate // 8)):
        (ax, ay), (bx, by) = one.motion.at(frame / rate), other.motion.at(frame / rate)
        if max(abs(ax - bx), abs(ay - by)) < reach:
            return True
    return False


def random_picture(rng: Rng, count: int | None = None) -> Scene:
    """A picture of `count` shapes, by chance one to four."""
    count = count or int(rng.choice([1, 2, 3, 4], p=[0.4, 0.25, 0.2, 0.15]))
    return _random_scene(rng, count=count, rate=1, num_frames=1, events=False, share_moving=0.0)


def random_clip(rng: Rng, kind: Literal["one", "several", "events"] | None = None) -> Scene:
    """A clip: one shape, several shapes, or shapes that appear and vanish; by chance where `kind` is None."""
    chosen = kind or str(rng.choice(["one", "several", "events"], p=[0.42, 0.28, 0.3]))
    rate, num_frames = _random_length(rng)
    if chosen == "one":
        return _random_scene(rng, count=1, rate=rate, num_frames=num_frames, events=False, share_moving=0.8)
    count = int(rng.choice([2, 3, 4], p=[0.5, 0.3, 0.2]))
    if chosen == "several":
        return _random_scene(rng, count=count, rate=rate, num_frames=num_frames, events=False, share_moving=0.6)
    count = int(rng.choice([1, 2, 3], p=[0.3, 0.5, 0.2]))
    return _random_scene(rng, count=count, rate=rate, num_frames=num_frames, events=True, share_moving=0.25)


def _random_scene(rng: Rng, *, count: int, rate: int, num_frames: int, events: bool, share_moving: float) -> Scene:
    sides = _random_sides(rng)
    names = rng.permutation(len(COLORS) * len(KINDS))[:count]
    largest = 0.6 if count == 1 else 0.32
    shapes: list[Shape] = []
    for number in names:
        for _ in range(40):
            shape = _try_shape(rng, int(number), sides, rate, num_frames, largest, share_moving)
            if shape is not None and not any(_overlap(shape, other, rate, num_frames) for other in shapes):
                shapes.append(shape)
                break
    if events:
        shapes = _with_events(rng, shapes, rate, num_frames)
    return Scene(*sides, rate, num_frames, tuple(shapes), _random_look(rng))


def _try_shape(
    rng: Rng, number: int, sides: tuple[int, int], rate: int, num_frames: int, largest: float, share_moving: float
) -> Shape | None:
    size = float(rng.uniform(0.16, largest)) * min(sides)
    direction: Direction = "none"
    if rng.random() < share_moving:
        direction = DIRECTIONS[int(rng.integers(4))]
    motion = _random_motion(rng, direction, sides, size, num_frames / rate, rate)
    if motion is None:
        return None
    color, kind = COLORS[number // len(KINDS)], KINDS[number % len(KINDS)]
    return _random_shape(rng, color, kind, size, motion, 0, num_frames - 1)


def _with_events(rng: Rng, shapes: list[Shape], rate: int, num_frames: int) -> list[Shape]:
    """Lets shapes appear or vanish, no two of them at the same tick; the last picture shows the latest event."""
    ticks = math.floor(num_frames / rate / TICK_SECONDS)
    slots = list(rng.permutation(np.arange(1, ticks)))
    result = []
    for i, shape in enumerate(shapes):
        if not slots or (i and rng.random() < 0.15):
            result.append(shape)
            continue
        slot = int(slots.pop())
        first = math.ceil(slot * TICK_SECONDS * rate)
        last = min(math.ceil((slot + 1) * TICK_SECONDS * rate), num_frames) - 1
        frame = int(rng.integers(first, max(last, first) + 1))
        if rng.random() < 0.65:
            result.append(dataclasses.replace(shape, first_frame=frame))
        else:
            result.append(dataclasses.replace(shape, last_frame=frame - 1))
    return result


# ---------------------------------------------------------------------- files


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How a clip is compressed.

    Attributes:
        codec: name of the encoder.
        pixel_format: of the stream.
        options: of the encoder.
    """

    codec: str = "libx264"
    pixel_format: str = "yuv420p"
    options: tuple[tuple[str, str], ...] = (("preset", "superfast"), ("crf", "20"))


def random_encoding(rng: Rng) -> Encoding:
    """H.264 at some quality, at times with full colour or without loss; rarely MPEG-4."""
    draw = rng.random()
    if draw < 0.06:
        return Encoding("mpeg4", "yuv420p", (("qscale", str(int(rng.integers(2, 7)))),))
    preset = str(rng.choice(["ultrafast", "superfast", "veryfast"]))
    if draw < 0.12:
        return Encoding("libx264", "yuv444p", (("preset", preset), ("crf", "0")))
    return Encoding("libx264", "yuv420p", (("preset", preset), ("crf", str(int(rng.integers(10, 33))))))


def write_clip(scene: Scene, file: Path | BinaryIO, encoding: Encoding | None = None) -> None:
    """Encodes a scene as mp4."""
    encoding = encoding or Encoding()
    target = file if isinstance(file, io.IOBase) else str(file)
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream(encoding.codec, rate=scene.rate, options=dict(encoding.options))
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, encoding.pixel_format
        stream.codec_context.thread_count = 1
        for picture in scene.pictures():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_picture(scene: Scene, file: Path | BinaryIO) -> None:
    """Writes the first frame of a scene as png."""
    Image.fromarray(next(scene.pictures())).save(file, format="PNG", compress_level=1)
