"""Files and rows of the training data."""

import json

import numpy as np
from demonstrator.make_data import (
    CLIPS,
    KEPT_ROSTERS,
    PICTURES,
    ROSTERS,
    STREAMS,
    Counts,
    make_data,
    make_each,
    make_event,
    make_motion,
    make_picture,
    make_presence,
    make_roster,
    make_single,
    make_stream,
    rng_of,
    stream_scene,
)
from demonstrator.scene_facts import events, seen_direction, seen_motion
from demonstrator.scenes import TICK_SECONDS, random_clip, random_picture
from PIL import Image

from videollama3.training.dataset_rows import missing_files, read_row

COUNTS = Counts(captions=3, pictures=2, clips=1, streams=1, review=2, heldout=1)


def test_rows_are_what_training_reads(tmp_path):
    written = make_data(tmp_path, counts=COUNTS, processes=1)
    assert written == {
        "captions": 3,
        "pictures": 2,
        "rosters": 4,
        "kept_rosters": 0,
        "clips": 1,
        "motions": 1,
        "singles": 1,
        "each": 0,
        "events": 0,
        "streams": 1,
        "review": 2,
        "presences": 2,
        "heldout_pictures": 1,
        "heldout_clips": 1,
    }
    for name, kind in (
        ("captions", "image"),
        ("pictures", "image"),
        ("clips", "video"),
        ("motions", "video"),
        ("rosters", "image"),
        ("streams", "stream"),
        ("heldout_clips", "video"),
    ):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == written[name]
        for row in rows:
            checked = read_row(row, media_root=tmp_path)
            assert checked.kind == kind
            assert not missing_files(checked)
    for line in (tmp_path / "presences.jsonl").read_text().splitlines():
        assert not missing_files(read_row(json.loads(line), media_root=tmp_path))


def test_motions_are_asked_about_clips_of_one_shape():
    scenes = [random_clip(rng_of(0, CLIPS, number)) for number in range(40)]
    tracks = []
    for number, scene in enumerate(scenes):
        rows = make_motion(number, seed=0)
        if len(scene.shapes) != 1:
            assert not rows
        for row in rows:
            assert row["video"] == [f"clips/{number:06d}.mp4"]
            answers = {said["value"] for said in row["conversations"] if said["from"] == "gpt"}
            direction = seen_direction(scene, scene.shapes[0])
            assert ("It does not move." if direction == "none" else f"It moves {direction}.") in answers
            tracks.append(any(text.startswith("At ") and ".0 (" in text for text in answers))
            assert len(rows) == (2 if seen_motion(scene, scene.shapes[0]) < 0.2 else 1)
    assert 0.25 < np.mean(tracks) < 0.75
    assert 10 < sum(len(make_motion(number, seed=0)) > 0 for number in range(40)) < 30


def test_one_attribute_of_each_of_several_shapes_is_listed():
    counted = []
    for number in range(40):
        scene = random_picture(rng_of(0, PICTURES, number))
        rows = make_roster(number, part=ROSTERS, seed=0)
        assert len(rows) <= (2 if len(scene.shapes) > 1 else 0)
        for row in rows:
            assert row["image"] == [f"pictures/{number:06d}.png"]
            # The number before the list, from which it could be read off.
            *count, answer = (said["value"] for said in row["conversations"] if said["from"] == "gpt")
            assert 2 <= len(answer.split(", ")) <= len(scene.shapes)
            assert all(f"({len(scene.shapes)}) shapes." in told for told in count)
            counted.append(len(count))
    assert 0.1 < np.mean(counted) < 0.5
    assert max(counted) == 1


def test_later_stages_draw_lists_of_the_same_pictures_anew():
    first, kept = (
        [make_roster(number, part=part, seed=0) for number in range(20)] for part in (ROSTERS, KEPT_ROSTERS)
    )
    shown = [[{row["image"][0] for row in rows} for rows in part] for part in (first, kept)]
    # Some pictures have no list that tells all shapes apart, by chance.
    assert all(len(one | other) <= 1 for one, other in zip(*shown, strict=True))
    assert any(shown[1])
    assert first != kept


def test_no_answer_about_what_is_there_can_be_copied_from_one_before_it():
    answers = []
    for number in range(60):
        for row in make_presence(number, seed=0):
            said = [message["value"] for message in row["conversations"] if message["from"] == "gpt"]
            told = [text for text in said if text.startswith(("Yes, ", "No, "))]
            assert len(set(told)) == len(told)
            answers += said
    assert 0.4 < np.mean([text == "Yes." for text in answers if text in ("Yes.", "No.")]) < 0.6


def test_a_single_shape_is_asked_about_in_all_four_ways():
    answers = []
    for number in range(40):
        scene = random_clip(rng_of(0, CLIPS, number))
        rows = make_single(number, seed=0)
        assert len(rows) == (len(scene.shapes) == 1)
        answers += [[said["value"] for said in row["conversations"] if said["from"] == "gpt"] for row in rows]
    assert all("There is one (1) shape." in said for said in answers)
    assert all(any(text.startswith("It is a ") for text in said) for said in answers)
    assert np.mean([any("move" in text for text in said) for said in answers]) > 0.9


def test_each_of_several_shapes_is_asked_about():
    kinds, lists = set(), []
    for number in range(120):
        scene = random_clip(rng_of(0, CLIPS, number))
        rows = make_each(number, seed=0)
        assert len(rows) == (len(scene.shapes) > 1)
        for row in rows:
            answers = [said["value"] for said in row["conversations"] if said["from"] == "gpt"]
            asked = [text for text in answers if not text.startswith("There are ")]
            assert len(asked) in (len(answers), len(answers) - 1), "at most one number"
            if not asked:
                continue
            lists.append(all(text.startswith("Each: ") for text in asked))
            assert len(asked) <= (1 if lists[-1] else len(scene.shapes))
            kinds |= {text.split()[-2] for text in asked if not lists[-1]}
    assert {"is", "a", "moves", "not", "the"} <= kinds
    assert 0.5 < np.mean(lists) < 0.9


def test_what_happens_is_asked_about_clips_in_which_something_does():
    listed, times = [], []
    for number in range(120):
        happened = events(random_clip(rng_of(0, CLIPS, number)))
        rows = make_event(number, seed=0)
        assert len(rows) == (1 if happened else 0)
        for row in rows:
            assert row["video"] == [f"clips/{number:06d}.mp4"]
            answers = [said["value"] for said in row["conversations"] if said["from"] == "gpt"]
            if len(happened) > 1:
                assert any(text.endswith(" first.") for text in answers)
            whole = [text for text in answers if text.endswith(("appears.", "vanishes."))]
            listed.append(len(whole))
            times.append(any(text.startswith("Each: ") for text in answers))
            for text in whole:
                assert text.count(" the ") == len(happened)
    assert 0.1 < np.mean(listed) < 0.5
    assert 0.25 < np.mean(times) < 0.75


def test_the_same_seed_makes_the_same_file_in_any_order(tmp_path):
    (tmp_path / "pictures").mkdir()
    options = {"folder": tmp_path, "part": PICTURES, "seed": 7}
    first = make_picture(3, **options)
    pixels = np.asarray(Image.open(tmp_path / "pictures/000003.png"))
    make_picture(2, **options)
    assert make_picture(3, **options) == first
    assert (np.asarray(Image.open(tmp_path / "pictures/000003.png")) == pixels).all()
    assert make_picture(3, **{**options, "seed": 8}) != first


def test_a_streaming_answer_stands_at_the_time_of_its_event(tmp_path):
    (tmp_path / "streams").mkdir()
    waiting = []
    for number in range(12):
        rows = make_stream(number, folder=tmp_path, seed=0)
        waiting.append(len(rows))
        for row in rows:
            user, assistant = (message for message in row["conversation"] if message["role"] != "system")
            assert user["role"] == "user"
            assert user["time"] < row["start_time"], "before the first frame, as watch puts it"
            assert row["start_time"] + TICK_SECONDS <= assistant["time"] < row["end_time"]
            assert assistant["content"].endswith(" now.")
    assert set(waiting) == {1, 2}


def test_a_second_streaming_row_has_to_be_silent_when_something_else_happens(tmp_path):
    (tmp_path / "streams").mkdir()
    for number in range(12):
        happened = events(scene := stream_scene(rng_of(0, STREAMS, number)))
        rows = make_stream(number, folder=tmp_path, seed=0)
        assert len(rows) == min(len(happened), 2)
        assert rows[0]["start_time"] == 0.0
        if len(happened) > 1:
            other, awaited = happened[-2:]
            request, said = rows[1]["conversation"][-2:]
            assert said["content"].endswith(f"{awaited.verb} now.")
            assert request["time"] < rows[1]["start_time"] == scene.label(other.frame) - TICK_SECONDS
            assert rows[1]["start_time"] < other.frame / scene.rate < said["time"]
