"""Folders, globs and JSONL files as rows; bad rows are named."""

import json

import pytest

from videollama3.bulk.input_rows import RowDefaults, open_input

ASK = RowDefaults(prompt="What?")


def write_rows(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_a_folder_is_searched_through_in_order(tmp_path):
    touch(tmp_path, "b.mp4", "a/z.MKV", "a/c.png", "notes.txt", "a.gif", "b.mp4.part")
    rows = open_input(str(tmp_path), ASK)
    assert [row.id for row in rows] == ["a.gif", "a/c.png", "a/z.MKV", "b.mp4"]
    assert [row.index for row in rows] == [0, 1, 2, 3]
    kinds = [row.messages[0]["content"][0]["type"] for row in rows]
    assert kinds == ["video", "image", "video", "video"]
    assert rows[1].messages == [
        {
            "role": "user",
            "content": [{"type": "image", "image": str(tmp_path / "a/c.png")}, {"type": "text", "text": "What?"}],
        }
    ]


def test_a_glob_and_one_file(tmp_path, monkeypatch):
    touch(tmp_path, "b.mp4", "a/z.mp4", "a/c.png", "a/n.txt")
    monkeypatch.chdir(tmp_path)
    assert [row.id for row in open_input("**/*.mp4", ASK)] == ["a/z.mp4", "b.mp4"]
    assert [row.id for row in open_input("a/*", ASK)] == ["a/c.png", "a/z.mp4"]
    assert [row.id for row in open_input("b.mp4", ASK)] == ["b.mp4"]


def test_what_is_no_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "n.txt", "empty/n.txt")
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"a folder, a glob or a media file .*got 'n.txt'"):
        open_input("n.txt", ASK)
    with pytest.raises(ValueError, match=r"'empty' with at least media \(.*\.mp4 .*\), got none"):
        open_input("empty", ASK)
    with pytest.raises(ValueError, match=r"'none.jsonl' with at least one row, got none"):
        open_input("none.jsonl", ASK)
    for absent, message in (("no.jsonl", "rows in 'no.jsonl', got no such file"), ("no.mp4", "got 'no.mp4': nothing")):
        with pytest.raises(FileNotFoundError, match=message):
            open_input(absent, ASK)


def test_rows_say_more_than_the_command_line(tmp_path):
    defaults = RowDefaults(prompt="What?", fps=3, max_visual_tokens=500)
    path = write_rows(
        tmp_path / "rows.jsonl",
        {"video": "a.mp4"},
        {"video": "/b.mp4", "prompt": "Who?", "id": 7, "fps": 2, "start_time": 1, "end_time": 5, "max_frames": 9},
        {"media": ["c.png", "https://example.org/d.mp4"], "max_visual_tokens": 90},
        {"image": "data:image/png;base64," + "A" * 500, "prompt": None},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "video", "path": "e.mp4", "fps": 1}, {"type": "text", "text": "1"}],
                },
                {"role": "assistant", "content": "2"},
                {"role": "user", "content": "3"},
            ],
            "id": "talk",
        },
    )
    first, second, third, fourth, fifth = open_input(path, defaults)
    assert first.messages[0]["content"][0] == {"type": "video", "video": str(tmp_path / "a.mp4"), "fps": 3}
    assert (first.id, first.prompt, first.max_visual_tokens) == ("a.mp4", "What?", 500)
    assert second.messages[0]["content"][0] == {
        "type": "video",
        "video": "/b.mp4",
        "fps": 2,
        "max_frames": 9,
        "start_time": 1,
        "end_time": 5,
    }
    assert (second.id, second.prompt) == ("7", "Who?")
    assert [part["type"] for part in third.messages[0]["content"]] == ["image", "video", "text"]
    assert third.messages[0]["content"][1]["video"] == "https://example.org/d.mp4"
    assert (third.media, third.max_visual_tokens) == (("c.png", "https://example.org/d.mp4"), 90)
    assert len(fourth.media[0]) < 200 < len(fourth.messages[0]["content"][0]["image"])
    assert fifth.messages[0]["content"][0] == {"type": "video", "video": str(tmp_path / "e.mp4"), "fps": 1}
    assert [message["role"] for message in fifth.messages] == ["user", "assistant", "user"]
    assert (fifth.id, fifth.prompt, fifth.media) == ("talk", "3", ("e.mp4",))


def test_keys_tell_rows_apart_and_do_not_depend_on_the_folder(tmp_path):
    rows = [{"video": "a.mp4"}, {"video": "a.mp4", "fps": 2}, {"video": "b.mp4"}, {"fps": 2, "video": "a.mp4"}]
    touch(tmp_path, "other/x")
    first = open_input(write_rows(tmp_path / "rows.jsonl", *rows), ASK)
    moved = open_input(write_rows(tmp_path / "other" / "rows.jsonl", *rows), ASK)
    keys = [row.key for row in first]
    assert keys == [row.key for row in moved] == [first.key(i) for i in range(4)]
    assert len(set(keys)) == 3
    assert keys[1] == keys[3]


def test_videos_in_messages_take_the_rest_from_the_command_line(tmp_path):
    parts = [
        {"type": "video", "path": "a.mp4", "end_time": 5},
        {"type": "image", "path": "b.png"},
        {"type": "video", "video": ["c.png", "d.png"], "fps": 2},
        {"type": "text", "text": "?"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", {"messages": [{"role": "user", "content": parts}]})
    (row,) = open_input(path, RowDefaults(fps=3, max_frames=7, start_time=1, end_time=9))
    video, image, frames, _ = row.messages[0]["content"]
    assert {name: video[name] for name in video if name not in ("type", "video")} == {
        "fps": 3,
        "max_frames": 7,
        "start_time": 1,
        "end_time": 5,
    }
    assert set(image) == {"type", "image"}
    assert {name: frames[name] for name in frames if name not in ("type", "video")} == {"fps": 2}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "Expected the row as JSON, got something else"),
        (["a.mp4"], "Expected a JSON object, got"),
        ({"video": "a.mp4", "max_frame": 3}, "Expected keys among end_time, .*, got 'max_frame'"),
        ({"prompt": "?"}, "Expected `media`, `video`, `image` or `messages`, got none"),
        ({"video": 3}, "Expected `video` as a path, a URL or a list of them, got 3"),
        ({"video": "a.mp4", "prompt": 3}, "Expected a question in `prompt`, or --prompt for all rows, got 3"),
        ({"video": "a.mp4", "fps": 0}, "Expected fps as a positive finite number .*got 0"),
        ({"video": "a.mp4", "max_frames": 0}, "Expected max_frames as a positive integer, got 0"),
        ({"video": "a.mp4", "start_time": 3, "end_time": 2}, "end_time"),
        ({"video": "a.mp4", "max_visual_tokens": 1.5}, "Expected max_visual_tokens as a positive integer, got 1.5"),
        ({"image": "a.png", "fps": 2}, "Expected fps beside a video, got images only"),
        ({"messages": [{"role": "user", "content": "?"}], "prompt": "?"}, "to say the rest inside them, got 'prompt'"),
        ({"messages": []}, "Expected a conversation as a non-empty list"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "part 0 with its video, got a placeholder"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    rows = open_input(write_rows(tmp_path / "rows.jsonl", {"video": "a.mp4"}, row), ASK)
    assert rows[0].id == "a.mp4"
    with pytest.raises(ValueError, match=r"rows\.jsonl row 1: .*" + message):
        rows[1]
    with pytest.raises(ValueError, match=r"got 1 bad of 2: .*rows\.jsonl row 1: .*" + message):
        rows.check()


def test_all_bad_rows_are_counted(tmp_path):
    rows = open_input(write_rows(tmp_path / "rows.jsonl", *[{"video": "a.mp4"}, {"x": 1}] * 5), RowDefaults())
    with pytest.raises(ValueError, match="got 10 bad of 10") as caught:
        rows.check()
    assert str(caught.value).count(".jsonl row ") == 3
