"""OpenAI's messages as conversations."""

import pytest

from videollama3.serving.media_access import MediaAccess
from videollama3.serving.openai_messages import read_messages

DATA = "data:image/png;base64,AA"


def read(*messages):
    return read_messages(list(messages), MediaAccess())


def user(*parts):
    return {"role": "user", "content": list(parts)}


def test_text_images_and_videos():
    message = user(
        {"type": "image_url", "image_url": {"url": DATA, "detail": "high"}},
        {"type": "input_image", "image_url": DATA},
        {"type": "video_url", "video_url": {"url": "http://a/b.mp4", "fps": 2, "max_frames": 8, "end_time": None}},
        {"type": "text", "text": "Well?"},
        {"type": "input_text", "text": "?"},
    )
    assert read({"role": "system", "content": "Be brief."}, message) == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": DATA},
                {"type": "image", "image": DATA},
                {"type": "video", "video": "http://a/b.mp4", "fps": 2, "max_frames": 8},
                {"type": "text", "text": "Well?"},
                {"type": "text", "text": "?"},
            ],
        },
    ]


def test_an_answer_as_the_client_got_it():
    answer = {"role": "assistant", "content": "Yes.", "refusal": None, "tool_calls": None, "audio": None}
    assert read(answer) == [{"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (3, "Expected message 0 as an object with `role` and `content`, got 3"),
        ({"role": "tool", "content": "x"}, "a role among system, user, assistant, got 'tool'"),
        ({"content": "x"}, "got None"),
        ({"role": "user"}, "Expected the content of message 0 as a string or a list, got None"),
        ({"role": "assistant", "tool_calls": [{}]}, "with text, images and videos only, got tool_calls"),
        (user("x"), "Expected message 0, part 0 as an object with a `type`, got 'x'"),
        (user({"type": "text"}), "Expected the text of message 0, part 0 as a string, got None"),
        (user({"type": "input_audio", "input_audio": {}}), "got 'input_audio'"),
        (user({"type": "video", "video": DATA}), "got 'video'"),
        (user({"type": "image_url"}), r"Expected message 0, part 0 \(image\) with its URL as a string, got None"),
        (user({"type": "image_url", "image_url": {"url": DATA, "fps": 1}}), "of url, detail; got fps"),
        (
            user({"type": "video_url", "video_url": {"url": DATA, "num_frames": 8}}),
            "max_visual_tokens; got num_frames",
        ),
        (user({"type": "video_url", "video_url": {"url": "/etc/passwd"}}), "without --media-root"),
    ],
)
def test_what_it_does_not_know(message, problem):
    with pytest.raises((TypeError, ValueError), match=problem):
        read(message)


@pytest.mark.parametrize("messages", [None, [], "hello", {"role": "user"}])
def test_no_messages(messages):
    with pytest.raises(TypeError, match="as a non-empty list"):
        read_messages(messages, MediaAccess())
