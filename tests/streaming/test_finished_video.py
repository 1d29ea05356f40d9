"""A finished video in a session: the first answer is the offline call's, the second costs its own tokens."""

import numpy as np
import pytest
import torch

from tests.media import write_clip
from tests.streaming.test_session import TOLERANCE, answer_logits
from videollama3.random_checkpoint import build_random
from videollama3.streaming import StreamingSession


@pytest.fixture(scope="module")
def checkpoint():
    return build_random(max_tokens=512)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 260, 25, start=30)


def offline(processor, clip, question, **sampling):
    content = [{"type": "video", "video": clip, **sampling}, {"type": "text", "text": question}]
    return processor(
        conversation=[{"role": "user", "content": content}],
        add_system_prompt=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )


@pytest.mark.parametrize(
    "sampling",
    [{}, {"fps": 2, "max_frames": 7}, {"start_time": 3.5, "end_time": 7}, {"max_visual_tokens": 80}],
)
def test_the_first_answer_is_that_of_the_offline_call(checkpoint, clip, sampling):
    model, processor = checkpoint
    session = StreamingSession(model, processor)
    labels = session.show_video(clip, **sampling)
    assert len(labels) == session.state().num_frames > 0
    inputs = offline(processor, clip, "What?", **sampling)
    with torch.no_grad():
        expected = model(**inputs, logits_to_keep=1).logits[0, -1]
    torch.testing.assert_close(answer_logits(session, "What?"), expected, atol=TOLERANCE, rtol=0)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = "".join(session.ask("What?", max_new_tokens=8))
    assert answer == processor.tokenizer.decode(tokens, skip_special_tokens=True)


def test_the_second_question_costs_its_own_tokens(checkpoint, clip, monkeypatch):
    model, processor = checkpoint
    session = StreamingSession(model, processor)
    session.show_video(clip)
    list(session.ask("What moves?", max_new_tokens=5))
    lengths = []
    forward = model.model.language_model.forward

    def counted(*arguments, **options):
        lengths.append(options["inputs_embeds"].shape[1])
        return forward(*arguments, **options)

    monkeypatch.setattr(model.model.language_model, "forward", counted)
    before = session.state()
    list(session.ask("And then?", max_new_tokens=3))
    # Bytes are tokens here. Before the question: the last word of the answer before, which was generated but not
    # read, its end, and the newline; then <|im_start|>user\n...<|im_end|>\n<|im_start|>assistant\n.
    question = 1 + len("user\nAnd then?") + 1 + len("\n") + 1 + len("assistant\n")
    assert lengths == [1 + 1 + len("\n") + question, 1, 1]
    assert session.state().num_encoded_frames == before.num_encoded_frames


def test_a_video_is_read_again_when_its_packets_did_not_tell_the_truth(checkpoint, clip, monkeypatch):
    from videollama3.processing import planned_media
    from videollama3.processing.video_reading import UnexpectedFrameError

    expected = StreamingSession(*checkpoint).show_video(clip)
    read = planned_media.read_frames
    plans = []

    def lying(plan, *arguments):
        plans.append(plan.by_decoding)
        if not plan.by_decoding:
            raise UnexpectedFrameError("another frame")
        return read(plan, *arguments)

    monkeypatch.setattr(planned_media, "read_frames", lying)
    assert StreamingSession(*checkpoint).show_video(clip) == expected
    assert plans == [False, True]


def test_frames_in_memory_and_progress(checkpoint):
    session = StreamingSession(*checkpoint)
    seen = []
    frames = np.random.default_rng(0).integers(0, 255, (5, 70, 98, 3), dtype=np.uint8)
    labels = session.show_video(frames, timestamps=[1.0, 2.0, 3.0, 5.0, 8.0], progress=lambda *done: seen.append(done))
    assert labels == [1.0, 2.0, 3.0, 5.0, 8.0]
    assert seen == [(n, 5) for n in range(1, 6)]


def test_a_video_without_room_leaves_the_session_as_it_was(checkpoint, clip):
    session = StreamingSession(*checkpoint, max_cache_tokens=200, forget="never")
    before = session.state()
    with pytest.raises(ValueError, match="at most max_cache_tokens=200"):
        session.show_video(clip)
    assert session.state().num_tokens == before.num_tokens
    assert session.messages[-1]["role"] == "system"
    assert "".join(session.ask("What?", max_new_tokens=2, min_new_tokens=2))
