"""Questions, their answers and what counts as right."""

import dataclasses

import numpy as np
import pytest
from demonstrator.conversations import BEFORE_THE_CLIP, conversation, one_by_one, stream_conversation, whether
from demonstrator.questions import Turn, ask, caption, is_right
from demonstrator.scene_facts import cell, events, position, seen_direction
from demonstrator.scenes import Motion, Shape, random_clip, random_picture

from .test_scenes import scene_of

RED_CIRCLE = Shape("circle", "red", (255, 0, 0), 16, Motion(20, 14))
BLUE_SQUARE = Shape("square", "blue", (0, 0, 255), 16, Motion(100, 70))
KINDS = (
    "color",
    "shape",
    "direction",
    "count",
    "position",
    "track",
    "presence",
    "order",
    "when",
    "events",
    "check",
    "roster",
    "times",
    "caption",
)


def rng():
    return np.random.default_rng(0)


def answer(scene, kind):
    turn = ask(rng(), scene, kind)
    return None if turn is None else turn.answer


def test_answers_of_a_scene_drawn_by_hand():
    moving = dataclasses.replace(RED_CIRCLE, motion=Motion(20, 42, "right", 80, 0, 4))
    scene = scene_of(moving)
    assert answer(scene, "color").endswith("is red.")
    assert answer(scene, "shape") == "It is a circle."
    assert answer(scene, "direction") == "It moves right."
    assert answer(scene, "count") == "There is one (1) shape."
    assert answer(scene, "order") is None
    assert answer(scene, "events") == "Nothing appears or vanishes."
    assert answer(scene, "track") == "At 0.0 (3, 5), 1.0 (4, 5), 2.0 (6, 5), 3.0 (8, 5)."
    assert caption(scene) == "A red circle moves right."


def test_two_events():
    scene = scene_of(
        dataclasses.replace(RED_CIRCLE, first_frame=22), dataclasses.replace(BLUE_SQUARE, last_frame=12), rate=10
    )
    assert [(event.frame, event.shape.color, event.verb) for event in events(scene)] == [
        (13, "blue", "vanishes"),
        (22, "red", "appears"),
    ]
    assert answer(scene, "order") == "The blue square vanishes first."
    assert answer(scene, "when") in ("At 1.0 seconds.", "At 2.0 seconds.")
    assert answer(scene, "events") == "At 1.0 the blue square vanishes, at 2.0 the red circle appears."
    assert caption(scene) == (
        "Two shapes: a red circle at the top left does not move and appears at 2.0 seconds and a blue square vanishes "
        "at 1.0 seconds."
    )
    user, assistant = stream_conversation(rng(), scene)
    assert (user.role, user.seconds) == ("user", BEFORE_THE_CLIP)
    assert (assistant.content, assistant.seconds) in (
        ("The red circle appears now.", 2.2),
        ("The blue square vanishes now.", 1.3),
    )


def test_nothing_to_stream_where_nothing_happens():
    assert stream_conversation(rng(), scene_of(RED_CIRCLE)) is None


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [(20, 14, "top left"), (60, 42, "center"), (100, 42, "right"), (60, 70, "bottom"), (41, 14, None)],
)
def test_positions_by_thirds(x, y, expected):
    shape = dataclasses.replace(RED_CIRCLE, motion=Motion(x, y))
    assert position(scene_of(shape), shape) == expected


def test_a_picture_tells_the_cell_too():
    scene = dataclasses.replace(scene_of(RED_CIRCLE), num_frames=1)
    assert answer(scene, "position") == "It is at (1, 1), at the top left."
    assert caption(scene) == "A red circle at (1, 1)."
    assert answer(scene, "track") is None


def test_the_position_of_a_shape_that_moves_is_asked_for_at_the_beginning_and_at_the_end_only():
    scene = scene_of(dataclasses.replace(RED_CIRCLE, motion=Motion(10, 42, "right", 90, 0, 4)))
    generator = rng()
    turns = [turn for _ in range(200) if (turn := ask(generator, scene, "position", rough=False)) is not None]
    said = {(turn.question.rstrip("?").split()[-1], turn.answer) for turn in turns}
    first, last = "It is at the left.", "It is at the right."
    assert said == {("beginning", first), ("first", first), ("end", last), ("last", last)}


def test_a_shape_that_leaves_is_last_seen_at_the_edge():
    leaves = dataclasses.replace(RED_CIRCLE, motion=Motion(60, 42, "left", 90, 0, 4))
    scene = scene_of(leaves)
    assert scene.seen_frames(leaves) == [9, 19]
    assert cell(scene, leaves, 39) == "(0, 5)", "the nearest to a centre outside"
    assert answer(scene, "direction") == "It moves left."
    assert answer(scene, "track") == "At 0.0 (3, 5), 1.0 (1, 5)."


def test_a_shape_out_of_sight_has_no_position():
    leaves = dataclasses.replace(RED_CIRCLE, motion=Motion(20, 42, "left", 40, 0, 4))
    appears = dataclasses.replace(RED_CIRCLE, first_frame=22)
    assert position(scene_of(leaves), leaves, 0) == "left"
    assert position(scene_of(leaves), leaves, 39) is None
    assert position(scene_of(appears), appears, 10) is None


def test_a_motion_that_the_sampled_frames_hardly_show_is_not_asked_about():
    barely = dataclasses.replace(RED_CIRCLE, motion=Motion(20, 42, "right", 11, 0, 4))
    assert seen_direction(scene_of(barely), barely) is None
    gone = dataclasses.replace(RED_CIRCLE, motion=Motion(20, 42, "right", 80, 0, 4), last_frame=6)
    assert seen_direction(scene_of(gone), gone) is None


def test_every_true_answer_counts_as_right_and_names_one_thing():
    counts = dict.fromkeys(KINDS, 0)
    for number in range(200):
        generator = np.random.default_rng([4, number])
        scene = random_clip(generator) if number % 3 else random_picture(generator)
        for kind in KINDS:
            turn = ask(generator, scene, kind)
            if turn is None:
                continue
            counts[kind] += 1
            assert turn.kind == kind
            assert turn.question.strip()
            assert is_right(turn, turn.answer), turn
    assert min(counts.values()) > 15, counts


def test_what_counts_as_right():
    turn = Turn("direction", "?", "It moves left.", "left", ("left", "right", "up", "down", "not move"))
    assert is_right(turn, "To the LEFT.")
    assert not is_right(turn, "It moves right.")
    assert not is_right(turn, "left, right")
    when = Turn("when", "?", "At 2.5 seconds.", "2.5")
    assert is_right(when, "At 3.0 seconds.")
    assert not is_right(when, "At 3.5 seconds.")
    assert not is_right(when, "soon")
    described = Turn("caption", "?", "A red circle at (0, 9).", "a red circle at (0, 9).")
    assert is_right(described, "A red circle at (1, 8).")
    assert not is_right(described, "A red circle at (2, 9).")
    assert not is_right(described, "A red square at (0, 9).")
    assert not is_right(described, "A red circle.")


def test_questions_do_not_give_their_answer_away():
    for number in range(150):
        generator = np.random.default_rng([5, number])
        scene = random_clip(generator)
        for kind in ("color", "shape"):
            turn = ask(generator, scene, kind)
            if turn is not None:
                assert turn.key not in turn.question.lower(), turn


def test_one_kind_of_question_on_every_shape():
    scene = scene_of(RED_CIRCLE, BLUE_SQUARE)
    seen = set()
    for seed in range(60):
        turns = one_by_one(np.random.default_rng(seed), scene)
        (kind,) = {turn.kind for turn in turns} - {"count"}
        seen.add(kind)
        assert sorted(turn.kind for turn in turns).count("count") <= 1
        assert len([turn for turn in turns if turn.kind == kind]) == (1 if kind == "roster" else 2)
        if kind in ("color", "shape"):
            expected = {"red", "blue"} if kind == "color" else {"circle", "square"}
            assert {turn.key for turn in turns if turn.kind == kind} == expected
    assert seen == {"color", "shape", "position", "direction", "roster"}


def test_whether_something_is_there_is_asked_of_one_shape_and_of_several():
    for scene, kinds in (
        (scene_of(RED_CIRCLE), {"presence", "check", "count"}),
        (scene_of(RED_CIRCLE, BLUE_SQUARE), {"presence", "count"}),
    ):
        asked = [turn for seed in range(40) for turn in whether(np.random.default_rng(seed), scene)]
        assert {turn.kind for turn in asked} == kinds
        assert {turn.key for turn in asked if turn.kind == "presence"} == {"yes", "no,"}


def test_a_question_on_a_shape_of_choice():
    scene = scene_of(dataclasses.replace(RED_CIRCLE, first_frame=22), BLUE_SQUARE, rate=10)
    for seed in range(20):
        at = np.random.default_rng(seed)
        assert ask(at, scene, "color", shape=BLUE_SQUARE).key == "blue"
        assert ask(at, scene, "when", shape=scene.shapes[0]).key == "2.0"
        assert ask(at, scene, "when", shape=BLUE_SQUARE) is None


def test_a_roster_tells_one_attribute_of_each_shape_beside_its_name():
    scene = scene_of(
        dataclasses.replace(RED_CIRCLE, motion=Motion(20, 42, "right", 80, 0, 4)),
        dataclasses.replace(BLUE_SQUARE, first_frame=22),
    )
    told = set()
    for seed in range(80):
        for kind in ("roster", "times"):
            turn = ask(np.random.default_rng(seed), scene, kind, rough=False)
            names = turn.question.rstrip(".").split(": ")[1].split(", ")
            said = turn.answer.removeprefix("Each: ").rstrip(".").split(", ")
            assert [text.rpartition(" ")[0] for text in said] == names
            assert (turn.kind == "times") == turn.question.startswith("List times: ")
            told |= set(said)
    red, blue = ("red", "circle", "red circle"), ("blue", "square", "blue square")
    expected = {f"{name} right" for name in red} | {f"{name} none" for name in blue} | {f"{name} 2.0" for name in blue}
    assert told == expected | {"circle red", "square blue", "red circle", "blue square"}
    assert ask(rng(), scene_of(RED_CIRCLE), "roster") is None
    assert ask(rng(), scene_of(RED_CIRCLE), "times") is None


def test_a_caption_stands_last():
    for number in range(60):
        generator = np.random.default_rng([6, number])
        kinds = [turn.kind for turn in conversation(generator, random_clip(generator))]
        assert "caption" not in kinds[:-1]
        assert 1 <= len(kinds) <= 7
