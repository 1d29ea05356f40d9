"""Conversations in every accepted form come to one form, with media in document order."""

import pytest

from videollama3.processing.conversations import is_batch, read_conversation


def test_the_authors_form():
    conversation = read_conversation(
        [
            {"role": "system", "content": "You are helpful."},
            {
                "role": "user",
                "content": [
                    {"type": "video", "video": {"video_path": "a.mp4", "fps": 1, "max_frames": 128}},
                    {"type": "image", "image": {"image_path": "b.png"}, "timestamp": 2},
                    {"type": "text", "text": "What?"},
                ],
            },
        ]
    )
    assert conversation.messages == [
        {"role": "system", "content": "You are helpful."},
        {
            "role": "user",
            "content": [
                {"type": "video"},
                {"type": "image", "timestamp": 2.0},
                {"type": "text", "text": "What?"},
            ],
        },
    ]
    video, image = conversation.media
    assert (video.kind, video.source, video.options) == ("video", "a.mp4", {"fps": 1, "max_frames": 128})
    assert (image.kind, image.source, image.where) == ("image", "b.png", "message 1, part 1")


@pytest.mark.parametrize(
    ("part", "kind", "source", "options"),
    [
        ({"type": "image", "url": "http://x/y.png"}, "image", "http://x/y.png", {}),
        ({"type": "image", "path": "y.png"}, "image", "y.png", {}),
        ({"type": "image", "base64": "AAAA"}, "image", "data:;base64,AAAA", {}),
        ({"type": "image_url", "image_url": {"url": "data:x", "detail": "low"}}, "image", "data:x", {}),
        ({"type": "video_url", "video_url": {"url": "file:///v.mp4"}}, "video", "file:///v.mp4", {}),
        ({"type": "video", "video": "v.mp4", "start_time": 1.5}, "video", "v.mp4", {"start_time": 1.5}),
        ({"type": "video", "path": "v.mp4", "fps": None, "url": None}, "video", "v.mp4", {}),
        ({"video": ["0.png", "1.png"], "timestamps": [0, 1]}, "video", ["0.png", "1.png"], {"timestamps": [0, 1]}),
        ({"type": "image"}, "image", None, {}),
    ],
)
def test_media_parts(part, kind, source, options):
    (reference,) = read_conversation([{"role": "user", "content": [part]}]).media
    assert (reference.kind, reference.source, reference.options) == (kind, source, options)


def test_the_users_messages_are_not_changed():
    messages = [{"role": "user", "content": [{"type": "video", "video": {"video_path": "a.mp4", "fps": 2}}, "hi"]}]
    read_conversation(messages)
    assert messages == [
        {"role": "user", "content": [{"type": "video", "video": {"video_path": "a.mp4", "fps": 2}}, "hi"]}
    ]


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ([], TypeError, r"non-empty list of messages, got \[\]"),
        ("hello", TypeError, "non-empty list of messages, got 'hello'"),
        ([{"content": "x"}], TypeError, "message 0 as a dict with `role` and `content`"),
        ([{"role": "user", "content": 3}], TypeError, "content of message 0 as a string or a list, got 3"),
        ([{"role": "user", "content": [3]}], TypeError, "message 0, part 0 as a string or a dict, got 3"),
        ([{"role": "user", "content": [{"type": "audio"}]}], ValueError, "type text, image or video, got 'audio'"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            TypeError,
            "text of message 0, part 0 as a string, got None",
        ),
        (
            [{"role": "user", "content": [{"type": "video", "video": "a", "path": "b"}]}],
            ValueError,
            r"one source for message 0, part 0, got \['video', 'path'\]",
        ),
        (
            [{"role": "user", "content": [{"type": "video", "video": {"video_path": "a", "max_frame": 3}}]}],
            ValueError,
            r"got \['max_frame'\]",
        ),
        (
            [{"role": "user", "content": ["x", {"type": "image", "image": "a", "fps": 3}]}],
            ValueError,
            r"message 0, part 1 \(an image\) with keys among .*, got \['fps'\]",
        ),
    ],
)
def test_bad_conversations(messages, error, message):
    with pytest.raises(error, match=message):
        read_conversation(messages)


def test_is_batch():
    one = [{"role": "user", "content": "x"}]
    assert not is_batch(one)
    assert is_batch([one, one])
