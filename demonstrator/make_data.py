"""Pictures, clips and rows of questions for the stages of the demonstrator's training.

A seed and counts enter; png and mp4 files and JSONL rows in the authors' format leave, the same for any number of
processes. Scenes come from `scenes.py`, words from `questions.py`.

    python -m demonstrator.make_data FOLDER

    FOLDER/captions.jsonl: pictures of one shape, each described
    FOLDER/pictures.jsonl, FOLDER/clips.jsonl: each described or asked about
    FOLDER/rosters.jsonl: those pictures with several shapes once more, one attribute of each listed
    FOLDER/kept_rosters.jsonl: some of these pictures again, for what comes after the stage of pictures
    FOLDER/motions.jsonl: of those clips the ones of one shape once more, asked which way it moves, where it is when
        and what is there; those of shapes that stand or move little twice
    FOLDER/singles.jsonl: those of one shape once more, asked which way it moves, what it is and how many there are
    FOLDER/each.jsonl: those of several shapes once more, with one kind of question on each of them
    FOLDER/events.jsonl: those in which something appears or vanishes once more, asked what came first, and when
    FOLDER/streams.jsonl: clips in which something happens, with a request to tell when
    FOLDER/review.jsonl: more pictures and clips, so that later stages forget nothing
    FOLDER/presences.jsonl: these once more, asked whether something is there, and how many are
    FOLDER/heldout_pictures.jsonl, FOLDER/heldout_clips.jsonl
    FOLDER/captions/000000.png, FOLDER/clips/000000.mp4, ...: the files of each
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from videollama3.processing.prompt_tokens import SYSTEM_PROMPT

from .conversations import any_talk, description, one_by_one, stream_conversation, whether
from .questions import Turn, ask
from .scene_facts import Event, events, seen_motion
from .scenes import TICK_SECONDS, Scene, random_clip, random_encoding, random_picture, write_clip, write_picture

Row = dict[str, Any]

# The command line puts the system prompt first, the processor by itself does not: both are learnt.
SHARE_WITH_SYSTEM_PROMPT = 0.35
SHARE_WITH_SYSTEM_PROMPT_MOTIONS = 0.5
SHARE_WITH_SYSTEM_PROMPT_LATE = 0.75
# Of the questions on motions: where the shape is at each second, and whether that comes before its direction.
SHARE_WITH_TRACK = 0.5
SHARE_WITH_TRACK_FIRST = 0.25
SHARE_WITH_PRESENCE = 0.5
# Of the rows on what happens: a list of when what happens to which shape.
SHARE_WITH_TIMES = 0.5
# Of the others: a list of all that happens, and whether it comes before the other questions.
SHARE_WITH_LIST = 0.5
SHARE_WITH_LIST_FIRST = 0.25
# Rows that list an attribute of each shape, for a picture of several, and whether the number is asked for before it.
ROSTERS_OF_A_PICTURE = 2
SHARE_WITH_COUNT = 0.3
# One picture in so many has rows of lists in later stages too.
PICTURES_PER_KEPT = 8
# Of the streaming clips: something else happens before or after what is waited for.
SHARE_OF_STREAMS_WITH_MORE = 0.75
# Of the frame's width or height.
SMALL_MOTION = 0.2
CAPTIONS, PICTURES, CLIPS, STREAMS, REVIEW, HELDOUT_PICTURES, HELDOUT_CLIPS = range(7)
MOTIONS, PRESENCES, EVENTS, EACH, SINGLES, ROSTERS, KEPT_ROSTERS = range(7, 14)
_FOLDERS = ("captions", "pictures", "clips", "streams", "review", "heldout_pictures", "heldout_clips")


@dataclasses.dataclass(frozen=True)
class Counts:
    """How much is made.

    Attributes:
        captions: png files of one shape.
        pictures: png files of one to four shapes.
        clips: mp4 files.
        streams: mp4 files of streaming rows, of which there are up to two for each.
        review: png and mp4 files, half of each.
        heldout: pictures and clips each, for evaluation during training.
    """

    captions: int = 14000
    pictures: int = 24000
    clips: int = 10000
    streams: int = 2000
    review: int = 3000
    heldout: int = 200


def rng_of(seed: int, part: int, number: int) -> np.random.Generator:
    """The random generator of one file, whatever process makes it."""
    return np.random.default_rng([seed, part, number])


def row_of(turns: list[Turn], *, media: dict[str, list[str]], tag: str, system_prompt: bool) -> Row:
    """A row in the authors' format; the media's tag stands in the first question."""
    said: list[dict[str, str]] = [{"from": "system", "value": SYSTEM_PROMPT}] if system_prompt else []
    for i, turn in enumerate(turns):
        said.append({"from": "human", "value": turn.question if i else f"{tag}\n{turn.question}"})
        said.append({"from": "gpt", "value": turn.answer})
    return {**media, "conversations": said}


def _row(
    rng: np.random.Generator, name: str, kind: str, turns: list[Turn], system_prompts: float = SHARE_WITH_SYSTEM_PROMPT
) -> Row:
    system_prompt = bool(rng.random() < system_prompts)
    return row_of(turns, media={kind: [name]}, tag=f"<{kind}>", system_prompt=system_prompt)


def make_caption(number: int, *, folder: Path, seed: int) -> list[Row]:
    """Writes a picture of one shape and returns a row that describes it."""
    rng = rng_of(seed, CAPTIONS, number)
    scene = random_picture(rng, count=1)
    name = f"{_FOLDERS[CAPTIONS]}/{number:06d}.png"
    write_picture(scene, folder / name)
    return [_row(rng, name, "image", description(rng, scene))]


def make_picture(number: int, *, folder: Path, part: int, seed: int) -> list[Row]:
    """Writes one picture and returns its row."""
    rng = rng_of(seed, part, number)
    scene = random_picture(rng)
    name = f"{_FOLDERS[part]}/{number:06d}.png"
    write_picture(scene, folder / name)
    return [_row(rng, name, "image", any_talk(rng, scene))]


def make_roster(number: int, *, part: int, seed: int) -> list[Row]:
    """Rows on a picture that `make_picture` writes, if it shows several shapes: one attribute of each of them."""
    scene = random_picture(rng_of(seed, PICTURES, number))
    rng = rng_of(seed, part, number)
    name = f"{_FOLDERS[PICTURES]}/{number:06d}.png"
    rows = []
    for _ in range(ROSTERS_OF_A_PICTURE if len(scene.shapes) > 1 else 0):
        kinds = ["count", "roster"] if rng.random() < SHARE_WITH_COUNT else ["roster"]
        turns = [turn for asked in kinds if (turn := ask(rng, scene, asked)) is not None]
        if any(turn.kind == "roster" for turn in turns):
            rows.append(_row(rng, name, "image", turns))
    return rows


def make_clip(number: int, *, folder: Path, part: int, seed: int) -> list[Row]:
    """Writes one clip and returns its row."""
    rng = rng_of(seed, part, number)
    scene = random_clip(rng)
    name = f"{_FOLDERS[part]}/{number:06d}.mp4"
    write_clip(scene, folder / name, random_encoding(rng))
    return [_row(rng, name, "video", any_talk(rng, scene))]


def make_motion(number: int, *, seed: int) -> list[Row]:
    """Rows on a clip that `make_clip` writes, if it shows one shape: which way it moves, and where it is when.

    A shape that stands or moves little is asked about in two rows: one that moves far is seen more often, and its
    direction is told by more that differs between frames.
    """
    scene = random_clip(rng_of(seed, CLIPS, number))
    if len(scene.shapes) != 1:
        return []
    rng = rng_of(seed, MOTIONS, number)
    rows = []
    for _ in range(2 if seen_motion(scene, scene.shapes[0]) < SMALL_MOTION else 1):
        kinds = ["direction"]
        if rng.random() < SHARE_WITH_TRACK:
            # The direction mostly first: after the places it could be read off them.
            kinds.insert(0 if rng.random() < SHARE_WITH_TRACK_FIRST else 1, "track")
        if rng.random() < SHARE_WITH_PRESENCE:
            kinds += ["check", "presence"]
        turns = [turn for kind in kinds if (turn := ask(rng, scene, kind)) is not None]
        if any(turn.kind == "direction" for turn in turns):
            name = f"{_FOLDERS[CLIPS]}/{number:06d}.mp4"
            rows.append(_row(rng, name, "video", turns, SHARE_WITH_SYSTEM_PROMPT_MOTIONS))
    return rows


def make_single(number: int, *, seed: int) -> list[Row]:
    """A row on a clip that `make_clip` writes, if it shows one shape: its motion, kind, colour and number.

    For what is learnt last: rows on several shapes make these slip.
    """
    scene = random_clip(rng_of(seed, CLIPS, number))
    if len(scene.shapes) != 1:
        return []
    rng = rng_of(seed, SINGLES, number)
    kinds = rng.permutation(["direction", "count", "shape", "color"])
    turns = [turn for kind in kinds if (turn := ask(rng, scene, str(kind))) is not None]
    name = f"{_FOLDERS[CLIPS]}/{number:06d}.mp4"
    return [_row(rng, name, "video", turns, SHARE_WITH_SYSTEM_PROMPT_MOTIONS)]


def make_each(number: int, *, seed: int) -> list[Row]:
    """A row on a clip that `make_clip` writes, if it shows several shapes: one kind of question on each of them."""
    scene = random_clip(rng_of(seed, CLIPS, number))
    if len(scene.shapes) < 2:
        return []
    rng = rng_of(seed, EACH, number)
    name = f"{_FOLDERS[CLIPS]}/{number:06d}.mp4"
    return [_row(rng, name, "video", one_by_one(rng, scene), SHARE_WITH_SYSTEM_PROMPT_MOTIONS)]


def make_event(number: int, *, seed: int) -> list[Row]:
    """A row on a clip that `make_clip` writes, if something appears or vanishes in it: what came first, and when."""
    scene = random_clip(rng_of(seed, CLIPS, number))
    if not events(scene):
        return []
    rng = rng_of(seed, EVENTS, number)
    happened = events(scene)
    order, times = ("order", None), ("times", None)
    asked = [order, *(("when", happened[i].shape) for i in rng.permutation(len(happened)))]
    # What came first stands first or last, as the times tell it.
    asked = asked if rng.random() < 0.7 else [*asked[1:], asked[0]]
    if rng.random() < SHARE_WITH_TIMES:
        asked = [times, order] if rng.random() < 0.5 else [order, times]
    elif rng.random() < SHARE_WITH_LIST:
        asked.insert(0 if rng.random() < SHARE_WITH_LIST_FIRST else len(asked), ("events", None))
    turns = [turn for kind, shape in asked if (turn := ask(rng, scene, kind, shape=shape)) is not None]
    name = f"{_FOLDERS[CLIPS]}/{number:06d}.mp4"
    return [_row(rng, name, "video", turns, SHARE_WITH_SYSTEM_PROMPT_MOTIONS)] if turns else []


def make_review(number: int, *, folder: Path, seed: int) -> list[Row]:
    """Writes a picture or, for odd numbers, a clip, and returns its row."""
    make = make_clip if number % 2 else make_picture
    return make(number, folder=folder, part=REVIEW, seed=seed)


def make_presence(number: int, *, seed: int) -> list[Row]:
    """A row on a file that `make_review` writes: whether some shapes are there, and how many are."""
    rng = rng_of(seed, REVIEW, number)
    scene, medium, suffix = (random_clip(rng), "video", "mp4") if number % 2 else (random_picture(rng), "image", "png")
    rng = rng_of(seed, PRESENCES, number)
    name = f"{_FOLDERS[REVIEW]}/{number:06d}.{suffix}"
    turns = whether(rng, scene)
    return [_row(rng, name, medium, turns, SHARE_WITH_SYSTEM_PROMPT_LATE)] if turns else []


def stream_scene(rng: np.random.Generator) -> Scene:
    """A clip in which something happens, mostly more than once."""
    wanted = 2 if rng.random() < SHARE_OF_STREAMS_WITH_MORE else 1
    while len(events(scene := random_clip(rng, "events"))) < wanted:
        pass
    return scene


def make_stream(number: int, *, folder: Path, seed: int) -> list[Row]:
    """Writes one clip in which something happens and returns its streaming rows.

    One waits for any of the events. Where there are several, a second one waits for the last of them from a second
    before the last but one on: what has to be learnt is to stay silent at that, and labels are drawn from few frames.
    """
    rng = rng_of(seed, STREAMS, number)
    scene = stream_scene(rng)
    name = f"streams/{number:06d}.mp4"
    write_clip(scene, folder / name, random_encoding(rng))
    happened = events(scene)
    rows = [_stream_row(rng, name, scene)]
    if len(happened) > 1:
        start = max(scene.label(happened[-2].frame) - TICK_SECONDS, 0.0)
        rows.append(_stream_row(rng, name, scene, happened[-1], start_seconds=start))
    return rows


def _stream_row(
    rng: np.random.Generator, name: str, scene: Scene, event: Event | None = None, *, start_seconds: float = 0.0
) -> Row:
    turns = stream_conversation(rng, scene, event, start_seconds=start_seconds)
    assert turns is not None
    said = [{"role": turn.role, "content": turn.content, "time": turn.seconds} for turn in turns]
    if rng.random() < SHARE_WITH_SYSTEM_PROMPT:
        said.insert(0, {"role": "system", "content": SYSTEM_PROMPT, "time": turns[0].seconds})
    return {
        "stream": True,
        "video": [name],
        "start_time": start_seconds,
        "end_time": scene.seconds,
        "conversation": said,
    }


def _write(path: Path, made: Iterable[list[Row]]) -> int:
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for rows in made:
            for row in rows:
                file.write(json.dumps(row) + "\n")
                count += 1
    return count


def make_data(folder: Path, *, counts: Counts, seed: int = 0, processes: int = 2) -> dict[str, int]:
    """Makes everything.

    Args:
        folder: is created.
        counts: how much.
        seed: of everything.
        processes: that draw and encode.

    Returns:
        Rows in each JSONL file, by its name.
    """
    shared = {"folder": folder, "seed": seed}
    parts: dict[str, tuple[Callable[[int], list[Row]], int]] = {
        "captions": (functools.partial(make_caption, **shared), counts.captions),
        "pictures": (functools.partial(make_picture, part=PICTURES, **shared), counts.pictures),
        "rosters": (functools.partial(make_roster, part=ROSTERS, seed=seed), counts.pictures),
        "kept_rosters": (
            functools.partial(make_roster, part=KEPT_ROSTERS, seed=seed),
            counts.pictures // PICTURES_PER_KEPT,
        ),
        "clips": (functools.partial(make_clip, part=CLIPS, **shared), counts.clips),
        "motions": (functools.partial(make_motion, seed=seed), counts.clips),
        "singles": (functools.partial(make_single, seed=seed), counts.clips),
        "each": (functools.partial(make_each, seed=seed), counts.clips),
        "events": (functools.partial(make_event, seed=seed), counts.clips),
        "streams": (functools.partial(make_stream, **shared), counts.streams),
        "review": (functools.partial(make_review, **shared), counts.review),
        "presences": (functools.partial(make_presence, seed=seed), counts.review),
        "heldout_pictures": (functools.partial(make_picture, part=HELDOUT_PICTURES, **shared), counts.heldout),
        "heldout_clips": (functools.partial(make_clip, part=HELDOUT_CLIPS, **shared), counts.heldout),
    }
    written: dict[str, int] = {}
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for name, (make, count) in parts.items():
            if name in _FOLDERS:
                (folder / name).mkdir(parents=True, exist_ok=True)
            written[name] = _write(folder / f"{name}.jsonl", pool.imap(make, range(count), chunksize=16))
    return written


def main() -> None:
    """Makes the data and says how much it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    for field in dataclasses.fields(Counts):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    options = vars(parser.parse_args())
    folder, seed, processes = options.pop("folder"), options.pop("seed"), options.pop("processes")
    started = time.monotonic()
    written = make_data(folder, counts=Counts(**options), seed=seed, processes=processes)
    for name, count in written.items():
        print(f"{folder / name}.jsonl: {count} rows")
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
