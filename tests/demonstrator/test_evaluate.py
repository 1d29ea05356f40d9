"""The evaluation runs the whole path and counts what is right."""

import pytest
from demonstrator.build_model import build_model, build_processor
from demonstrator.evaluate import Answer, Question, answer, evaluate, make_questions, summarize
from demonstrator.make_tokenizer import make_tokenizer
from demonstrator.questions import Turn

from demonstrator import evaluate as evaluation

TURNS = [
    Turn("color", "What color is it?", "The shape is red.", "red", ("red", "green", "blue")),
    Turn(
        "direction",
        "Which way does it move?",
        "It does not move.",
        "not move",
        ("left", "right", "up", "down", "not move"),
        "stands",
    ),
]


def test_accuracy_agreement_and_pruned_share():
    questions = [Question("a.mp4", "video", "one", turn, False) for turn in TURNS] + [
        Question("b.png", "image", "picture", TURNS[0], False)
    ]
    pruned = [Answer("It is red.", 100, 20), Answer("It moves left.", 100, 20), Answer("blue", 0, 0)]
    whole = [Answer("It is red.", 100, 100), Answer("It does not move.", 100, 100), Answer("blue", 0, 0)]
    assert summarize(questions, pruned, whole) == {
        "accuracy": {
            "image/color": {"percent": 0.0, "questions": 1},
            "one/color": {"percent": 100.0, "questions": 1},
            "one/direction": {"percent": 0.0, "questions": 1},
            "one/direction, stands": {"percent": 0.0, "questions": 1},
            "video/color": {"percent": 100.0, "questions": 1},
            "video/direction": {"percent": 0.0, "questions": 1},
            "video/direction, stands": {"percent": 0.0, "questions": 1},
        },
        "accuracy_without_pruning": {
            f"{scene}/{kind}": {"percent": 100.0, "questions": 1}
            for scene in ("one", "video")
            for kind in ("color", "direction", "direction, stands")
        },
        "pruned_percent": 80.0,
        "same_without_pruning": {"percent": 50.0, "questions": 2},
        "same_without_pruning_by_question": {
            f"{scene}/{kind}": {"percent": percent, "questions": 1}
            for scene in ("one", "video")
            for kind, percent in (("color", 100.0), ("direction", 0.0), ("direction, stands", 0.0))
        },
    }


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Random weights never end an answer by themselves."""
    monkeypatch.setattr(evaluation, "MAX_NEW_TOKENS", 3)


@pytest.fixture(scope="module")
def demonstrator():
    tokenizer = make_tokenizer(num_scenes=300)
    return build_model(tokenizer.get_vocab(), layers=1, vision_layers=1).eval(), build_processor(tokenizer)


def test_questions_cover_every_kind_and_are_the_same_again(tmp_path):
    questions = make_questions(tmp_path, num_pictures=4, num_clips=16)
    assert {question.turn.kind for question in questions if question.media == "video"} >= {
        "color",
        "direction",
        "when",
    }
    assert {question.add_system_prompt for question in questions} == {False, True}
    assert questions[:9] == make_questions(tmp_path, num_pictures=4, num_clips=1)[:9]


def test_scenes_and_kinds_of_questions_are_chosen(tmp_path):
    questions = make_questions(tmp_path, num_pictures=0, num_clips=4, scenes=["one"], kinds=["direction"])
    assert {(question.scene, question.turn.kind) for question in questions} == {("one", "direction")}
    assert len({question.path for question in questions}) == len(questions) > 1


def test_random_weights_are_evaluated(demonstrator):
    report = evaluate(*demonstrator, num_pictures=1, num_clips=2)
    assert 0 < report["pruned_percent"] < 100
    assert report["accuracy"]["video/color"]["percent"] == 0.0
    assert len(report["wrong"]) == sum(
        score["questions"]
        for name, score in report["accuracy"].items()
        if name.split("/")[0] in ("image", "video") and "," not in name
    )


def test_pictures_alone(demonstrator):
    report = evaluate(*demonstrator, num_pictures=1, num_clips=0)
    assert report["pruned_percent"] is None
    assert {name.split("/")[0] for name in report["accuracy"]} == {"image"}
    assert "same_without_pruning" not in report


def test_a_batch_answers_as_its_questions_alone(demonstrator, tmp_path):
    questions = make_questions(tmp_path, num_pictures=1, num_clips=1)[:4]
    together = answer(*demonstrator, questions)
    assert together == [answer(*demonstrator, [question])[0] for question in questions]
