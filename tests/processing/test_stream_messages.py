"""A conversation about a running video: which frames come before which message, and what is read of the file."""

import numpy as np
import pytest
import torch

from tests.conftest import GoldenCase
from tests.media import numbered_picture, read_number, write_clip
from videollama3 import random_checkpoint
from videollama3.processing.planned_media import VideoOptions, plan_videos
from videollama3.processing.stream_messages import first_frames, interleave, select_messages


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("media") / "clip.mp4", 125, 25)


def message(content, time):
    return {"role": "user", "content": content, "time": time}


def test_frames_come_before_the_first_message_at_or_after_them():
    shown = interleave(
        [10.0, 11.0, 12.0, 13.0], [message("q", 11.0), message("a", 12.9), message("b", 12.9)], start_time=10.0
    )
    assert [m["content"] if m["role"] == "user" else m["content"][0]["timestamp"] for m in shown] == [
        0,
        1,
        "q",
        2,
        "a",
        "b",
    ]
    assert all(m["role"] == "stream" and m["content"][0]["type"] == "image" for m in (shown[0], shown[1], shown[3]))
    assert all("time" not in m for m in shown)


def test_only_frames_before_the_last_message_count_and_the_limit_drops_messages():
    messages = [message("q", 1.0), message("a", 2.5)]
    times = [0.0, 1.0, 2.0, 3.0]
    assert select_messages(times, messages) == (messages, 3)
    # Three frames at most: the fourth, at 3 s, is the first that is dropped, and comes after all messages.
    assert select_messages(times, messages, max_frames=3) == (messages, 3)
    assert select_messages(times, messages, max_frames=2) == (messages[:1], 2)
    with pytest.raises(ValueError, match="max_frames as a positive integer, got 0"):
        select_messages(times, messages, max_frames=0)


def test_a_shortened_plan_reads_the_same_frames(clip):
    (planned,) = plan_videos([clip], [VideoOptions(fps=1, max_frames=99)], ["video"])
    short = first_frames(planned, 2)
    assert first_frames(planned, 9) is planned
    assert (short.num_frames, short.timestamps.tolist()) == (2, [0.0, 1.0])
    assert short.metadata.frames_indices == [24, 49]
    assert short.metadata.timestamps == [0.0, 1.0]
    assert planned.metadata.frames_indices == [24, 49, 74, 99, 124]
    assert [read_number(picture) for picture in short.pictures(None, None)] == [24, 49]
    assert first_frames(planned, 2).replan().num_frames == 2


def test_frames_after_the_last_message_are_not_read(processor, clip):
    seen = []
    turns = [{"role": "user", "content": "q", "time": 0.5}, {"role": "assistant", "content": "a", "time": 1.0}]
    encoded = processor.encode_stream(clip, turns, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert encoded.media[0].timestamps.tolist() == [0.0, 1.0]


def test_a_tokenizer_without_the_tokens_of_a_stream_is_refused(clip, monkeypatch):
    """Its words would be learnt as they are written, and when to speak not at all."""
    kept = tuple(token for token in random_checkpoint.SPECIAL_TOKENS if "stream" not in token)
    monkeypatch.setattr(random_checkpoint, "SPECIAL_TOKENS", kept)
    turns = [{"role": "user", "content": "q", "time": 0.5}, {"role": "assistant", "content": "a", "time": 1.0}]
    with pytest.raises(ValueError, match=r"got one without <\|stream_start\|> and <\|stream_end\|>: add them"):
        random_checkpoint.build_random()[1].encode_stream(clip, turns)


def test_media_inside_a_stream_are_refused(processor, clip):
    turns = [{"role": "user", "content": [{"type": "image", "path": "a.png"}], "time": 0.5}]
    with pytest.raises(ValueError, match="messages of a stream with text only, got one with an image or a video"):
        processor.encode_stream(clip, turns)


def test_a_stream_is_written_as_the_template_writes_timed_pictures(processor, clip):
    """The authors' own template, on the tokenizer of an official checkpoint."""
    turns = [{"role": "user", "content": "Tell", "time": 0.0}, {"role": "assistant", "content": "now", "time": 1.0}]
    encoded = processor.encode_stream(clip, turns, use_token_compression=False)
    picture = numbered_picture(0)
    shown = [{"role": "stream", "content": [{"type": "image", "image": picture, "timestamp": t}]} for t in (0.0, 1.0)]
    conversation = [shown[0], turns[0], shown[1], turns[1]]
    conversation = [{key: value for key, value in message.items() if key != "time"} for message in conversation]
    inputs = processor(conversation=conversation, image_merge_size=2)
    expected = [processor.video_token_id if i == processor.image_token_id else i for i in inputs["input_ids"][0]]
    assert encoded.prompt.input_ids == expected


def test_masks_of_the_golden_stream_prompt(processor):
    golden = GoldenCase("stream_role")
    encoded = processor.encode_conversation(golden.conversation, add_generation_prompt=True)
    ids = torch.tensor(encoded.prompt.input_ids)
    placeholder = (ids == processor.image_token_id) | (ids == processor.video_token_id)
    ids[placeholder] = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert torch.equal(ids, golden.tensors["input_ids"].long())
    (spoken,) = np.flatnonzero(encoded.prompt.after_stream_mask).tolist()
    assert encoded.prompt.input_ids[spoken] == processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert len(encoded.prompt.pictures) == 3
    begin, end = encoded.prompt.pictures[1]
    assert processor.tokenizer.decode(encoded.prompt.input_ids[begin:end]) == ",Time 99.0s:" + "<|video_pad|>" * 99
    assert encoded.prompt.pictures[0][0] == 0
