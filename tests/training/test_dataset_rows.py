"""Rows as users have them: the authors' form, messages, streams, and every way in which they are wrong."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from videollama3.training.dataset_rows import missing_files, read_row


def authors(*turns, **media):
    return {**media, "conversations": [{"from": role, "value": value} for role, value in turns]}


def parts(row, message=0):
    return [part.get("text") or part[part["type"]] for part in row.messages[message]["content"]]


def test_tags_mark_positions_and_text_loses_the_space_around_them():
    row = read_row(
        authors(
            ("system", " Be brief. "),
            ("human", "First <image>\nthen\n<image>\n\nand? "),
            ("gpt", " Yes. "),
            ("human", "And <image>"),
            ("gpt", "No."),
            image=["a.png", "/b.png", "https://example.org/c.png"],
        ),
        media_root="/data",
    )
    assert row.kind == "images"
    assert row.messages[0] == {"role": "system", "content": " Be brief. "}
    assert parts(row, 1) == ["First", "/data/a.png", "then", "/b.png", "and?"]
    assert row.messages[2] == {"role": "assistant", "content": " Yes. "}
    assert parts(row, 3) == ["And", "https://example.org/c.png"]
    assert row.media == ["/data/a.png", "/b.png", "https://example.org/c.png"]


def test_missing_tags_go_to_the_front_of_the_first_human_turn():
    row = read_row(
        authors(("system", "s"), ("human", "What?"), ("gpt", "A."), ("human", "Why?"), ("gpt", "B."), video="a.mp4"),
        media_root="/data",
    )
    assert row.kind == "video"
    assert parts(row, 1) == ["/data/a.mp4", "What?"]
    assert parts(row, 3) == ["Why?"]
    both = read_row(authors(("human", "Q"), ("gpt", "A"), image=["/1.png", "/2.png"], video=["/v.mp4"]))
    assert both.kind == "mixed"
    assert parts(both) == ["/1.png", "/2.png", "/v.mp4", "Q"]


def test_a_tag_that_the_answer_speaks_of_stays_text():
    row = read_row(authors(("human", "Q"), ("gpt", "an <image> tag"), image="/a.png"))
    assert row.kind == "image"
    assert parts(row) == ["/a.png", "Q"]
    assert row.messages[1]["content"] == "an <image> tag"


def test_text_only_and_absent_keys():
    row = read_row({**authors(("human", "Q"), ("gpt", "A")), "image": None, "video": None, "id": 7})
    assert (row.kind, row.media, row.stream) == ("text", [], None)
    assert read_row({"messages": row.messages}).messages == row.messages


def test_messages_take_content_dicts_of_every_form():
    picture = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    row = read_row(
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "video", "video": {"video_path": "clips/a.mp4", "fps": 2}, "text": None},
                        {"type": "image", "path": "b.png", "timestamp": 2.5},
                        {"type": "image"},
                        {"type": "video"},
                        {"type": "text", "text": " <image> is text "},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
            ],
            "images": [picture],
            "videos": [{"bytes": None, "path": "c.mp4"}],
        },
        media_root="/data",
    )
    assert row.kind == "mixed"
    assert row.messages[0]["content"] == [
        {"type": "video", "video": "/data/clips/a.mp4", "fps": 2},
        {"type": "image", "image": "/data/b.png", "timestamp": 2.5},
        {"type": "image", "image": picture},
        {"type": "video", "video": "/data/c.mp4"},
        {"type": "text", "text": " <image> is text "},
    ]


def test_arrays_and_bytes_inside_messages_are_sources():
    """As `datasets` leaves pictures that it has not decoded, and as numpy users have them."""
    array = np.zeros((4, 6, 3), np.uint8)

    def content(*parts):
        row = read_row({"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "A"}]})
        return row.messages[0]["content"]

    parts = [
        {"type": "image", "image": array},
        {"type": "video", "video": [array, array]},
        {"type": "image", "image": {"bytes": b"png", "path": None}},
        {"type": "image", "image": {"bytes": b"png", "path": "name.png"}},
        {"type": "video", "video": {"bytes": b"mp4", "path": None}},
    ]
    picture, video, *encoded = content(*parts)
    assert picture["image"] is array
    assert all(frame is array for frame in video["video"])
    assert [part.get("image", part.get("video")) for part in encoded] == [b"png", b"png", b"mp4"]
    with pytest.raises(ValueError, match="with a source, got a dict without one"):
        content({"type": "image", "image": {"bytes": None, "path": None}})


def test_relative_paths_start_from_the_root_or_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").touch()
    row = read_row(authors(("human", "Q"), ("gpt", "A"), image="a.png"))
    assert row.media == [str(tmp_path / "a.png")]
    assert missing_files(row) == []
    inside = read_row(authors(("human", "Q"), ("gpt", "A"), image="sub/../b.png"), media_root=tmp_path)
    assert missing_files(inside) == [str(tmp_path / "b.png")]
    home = read_row(authors(("human", "Q"), ("gpt", "A"), image="~/x.png"))
    assert home.media == [os.path.expanduser("~/x.png")]
    assert missing_files(read_row(authors(("human", "Q"), ("gpt", "A"), image="https://example.org/x.png"))) == []


def test_frames_of_a_video_are_found_beside_the_rows_too(tmp_path):
    picture = Image.new("RGB", (4, 4))
    frames = [f"{i}.png" for i in range(2)]
    (tmp_path / "0.png").touch()
    row = read_row(
        {
            "messages": [
                {"role": "user", "content": [{"type": "video", "video": [*frames, picture]}]},
                {"role": "assistant", "content": "A"},
            ]
        },
        media_root=tmp_path,
    )
    assert row.media == [[str(tmp_path / "0.png"), str(tmp_path / "1.png"), picture]]
    assert missing_files(row) == [str(tmp_path / "1.png")]
    with pytest.raises(ValueError, match=r"Expected a frame of .* inside the media root"):
        read_row(
            {
                "video": [["../x.png"]],
                "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
            },
            media_root=tmp_path,
        )


@pytest.mark.parametrize("name", ["clip-12:30.png", "a b:c.mp4"])
def test_a_colon_makes_no_url(tmp_path, name):
    row = read_row(authors(("human", "Q"), ("gpt", "A"), image=name), media_root=tmp_path)
    assert row.media == [str(tmp_path / name)]


def test_stream_rows():
    row = read_row(
        {
            "stream": True,
            "video": ["a.mp4"],
            "start_time": 1.5,
            "end_time": 9,
            "conversation": [
                {"role": "user", "content": "Q", "time": 2.0},
                {"role": "assistant", "content": "A", "time": 3},
            ],
        },
        media_root="/data",
    )
    assert row.kind == "stream"
    assert (row.stream.video, row.stream.start_time, row.stream.end_time) == ("/data/a.mp4", 1.5, 9)
    assert row.messages[1] == {"role": "assistant", "content": "A", "time": 3}
    assert row.media == ["/data/a.mp4"]


QA = (("human", "Q"), ("gpt", "A"))


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ("text", TypeError, r"a row as a JSON object, got 'text'"),
        ({"id": 1}, ValueError, r"a row with `conversations` .* got the keys \['id'\]"),
        ({"conversations": []}, TypeError, r"`conversations` as a non-empty list, got \[\]"),
        (authors(("robot", "Q")), TypeError, r"turn 0 as .* got \{'from': 'robot'"),
        (authors(("human", None)), TypeError, r"turn 0 as .* got \{'from': 'human', 'value': None\}"),
        (authors(("gpt", "A"), ("human", "Q")), ValueError, "begins with human or system, got gpt first"),
        (authors(("human", "Q")), ValueError, "an answer of the assistant to learn, got none"),
        (authors(("human", "Q"), ("gpt", " \n")), ValueError, "an answer in message 1, got an empty one"),
        (authors(("human", "<image>Q"), ("gpt", "A")), ValueError, r"got 1 tag\(s\) and 0 image\(s\)"),
        (
            authors(*QA[:1], ("gpt", "A"), ("human", "<image>"), ("gpt", "B"), image=["/a", "/b"]),
            ValueError,
            r"one <image> tag for each image of the row, got 1 tag\(s\) and 2 image\(s\)",
        ),
        (authors(("human", "<image>Q"), ("gpt", "A"), video="/a.mp4"), ValueError, r"got 1 tag\(s\) and 0 image\(s\)"),
        (
            authors(*QA, image="../a.png"),
            ValueError,
            r"inside the media root '/data', got '../a.png', which leads out",
        ),
        (authors(*QA, image=""), ValueError, "message 0, part 0 with a source, got an empty one"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            ValueError,
            r"message 0, part 0 with its image, or one more in the row's `images`, got 0",
        ),
        (
            {"messages": [{"role": "user", "content": "Q"}], "images": ["a"]},
            ValueError,
            r"a place in the messages for each image of the row, got 1 image\(s\), 1 without one",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            ValueError,
            "of type text, image or video, got 'audio'",
        ),
        ({"stream": True, "video": [], "conversation": []}, ValueError, "one video in a streaming row, got 0"),
        (
            {"stream": True, "video": "a", "conversation": [{"role": "stream", "content": "x"}]},
            ValueError,
            r"the roles user, assistant and system .* got \['stream'\]",
        ),
        (
            {
                "stream": True,
                "video": "a",
                "conversation": [{"role": "user", "content": [{"type": "image", "path": "b"}]}],
            },
            ValueError,
            "text only in a streaming row, got message 0, part 0 with media",
        ),
        (
            {"stream": True, "video": "a", "conversation": [{"role": "assistant", "content": ""}]},
            ValueError,
            "an answer in message 0, got an empty one",
        ),
    ],
)
def test_bad_rows(row, error, message):
    with pytest.raises(error, match=message):
        read_row(row, media_root="/data")


# --- what is said of a video ---


def test_a_row_says_what_part_of_its_video_it_is_about():
    trim = {"start_time": 1, "end_time": 2.5}
    row = read_row({**authors(("human", "Q"), ("gpt", "A"), video=["/a.mp4"]), **trim})
    assert row.messages[0]["content"][0] == {"type": "video", "video": "/a.mp4", **trim}
    part = {"type": "video", "path": "/a.mp4", "start_time": 4}
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A"}]
    row = read_row({"messages": messages, **trim})
    assert row.messages[0]["content"][0] == {"type": "video", "video": "/a.mp4", "start_time": 4, "end_time": 2.5}
    assert "start_time" not in read_row({**authors(("human", "Q"), ("gpt", "A"), image="/a.png"), **trim}).messages[0]
    with pytest.raises(ValueError, match="start_time and end_time with one video in a row, got 2 videos"):
        read_row({**authors(("human", "Q"), ("gpt", "A"), video=["/a.mp4", "/b.mp4"]), **trim})


def test_a_video_of_a_row_says_how_it_is_sampled():
    video = {"video_path": "a.mp4", "start_time": 1, "fps": 2}
    row = read_row(authors(("human", "<video>Q"), ("gpt", "A"), video=[video]), media_root="/data")
    assert row.messages[0]["content"][0] == {"type": "video", "video": "/data/a.mp4", "start_time": 1, "fps": 2}


def test_cells_of_a_table_may_hold_lists_as_json():
    row = authors(("human", "<video>Q"), ("gpt", "A"), video=["/a.mp4"])
    assert read_row({key: json.dumps(value) for key, value in row.items()}) == read_row(row)
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert read_row({"messages": json.dumps(messages), "video": None}) == read_row({"messages": messages})
    with pytest.raises(TypeError, match="`conversations` as a non-empty list, got '\\[1,'"):
        read_row({"conversations": "[1,"})


def test_media_of_the_authors_form_by_either_name():
    assert read_row(authors(("human", "<video>Q"), ("gpt", "A"), videos=["/a.mp4"])).media == ["/a.mp4"]
    assert read_row(authors(("human", "Q"), ("gpt", "A"), images=["/a.png"])).media == ["/a.png"]


@pytest.mark.parametrize("role", ["human", "gpt", "tool"])
def test_roles_of_messages(role):
    messages = [{"role": role, "content": "Q"}, {"role": "assistant", "content": "A"}]
    with pytest.raises(ValueError, match=rf"the roles user, assistant and system, got \['{role}'\]"):
        read_row({"messages": messages})


def test_a_tag_in_messages_is_no_place():
    messages = [{"role": "user", "content": "<video>\nQ"}, {"role": "assistant", "content": "A"}]
    with pytest.raises(ValueError, match=r"a part {'type': 'video'} is a place, <video> in a text is one in"):
        read_row({"messages": messages, "videos": ["/a.mp4"]})
