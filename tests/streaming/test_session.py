"""A session gives what the offline call gives for the same frames, whatever came in which order."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.streaming.clips import scene
from videollama3.random_checkpoint import build_random
from videollama3.streaming import StreamingSession
from videollama3.streaming.records import Event

RATE = 4
# Seen: 7e-7. Chunks of a prompt sum in another order than the whole; logits are about 0.5. A frame that is missing,
# pruned otherwise or at another position moves them by more than 1e-3.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def checkpoint():
    return build_random(max_tokens=256)


def feed(session, frames, start=0):
    labels = []
    for number, frame in enumerate(frames, start=start):
        labels += session.push(frame, number / RATE)
    return labels


def offline_inputs(processor, frames, question, **options):
    """The offline call on the frames of the ticks that are over."""
    ticks = [frames[n * RATE + RATE - 1] for n in range(len(frames) // RATE)]
    content = [
        {"type": "video", "video": np.stack(ticks), "timestamps": [float(n) for n in range(len(ticks))]},
        {"type": "text", "text": question},
    ]
    return processor(
        conversation=[{"role": "user", "content": content}],
        add_system_prompt=True,
        add_generation_prompt=True,
        return_tensors="pt",
        **options,
    )


def answer_logits(session, text, **options):
    """Logits of the first answer token, by asking in a fork."""
    with session.fork() as twin:
        twin._cache.read(twin._transcript.with_event(Event("question", text)), twin._transcript.frames)
        return twin.model.lm_head(twin._cache.last_hidden)


def test_logits_and_answer_equal_the_offline_call(checkpoint):
    model, processor = checkpoint
    frames = scene(7 * RATE + 1, still=range(9, 18))
    session = StreamingSession(model, processor, horizon_seconds=7)
    assert feed(session, frames) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    inputs = offline_inputs(processor, frames[:-1], "What moves?")
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits[0, -1]
    torch.testing.assert_close(answer_logits(session, "What moves?"), logits, atol=TOLERANCE, rtol=0)
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = "".join(session.ask("What moves?", max_new_tokens=12))
    assert answer == processor.tokenizer.decode(expected, skip_special_tokens=True)
    # Ticks 2 and 3 show the same picture, which is encoded once.
    assert session.state().num_encoded_frames == 6


@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_how_frames_come_and_what_was_asked_between_does_not_matter(checkpoint, data):
    model, processor = checkpoint
    frames = scene(6 * RATE + 1)
    labels = [float(n) for n in range(6)]
    ticks = [frames[n * RATE + RATE - 1] for n in range(6)]
    plain = StreamingSession(model, processor, horizon_seconds=6)
    plain.show(ticks, labels)
    other = StreamingSession(model, processor, horizon_seconds=6)
    position = 0
    while position < 6:
        count = data.draw(st.integers(1, 6 - position))
        other.show(ticks[position : position + count], labels[position : position + count])
        position += count
        if data.draw(st.booleans()):
            list(other.ask("And now?", remember=False, max_new_tokens=data.draw(st.integers(1, 3))))
    assert other.state().num_tokens == plain.state().num_tokens
    torch.testing.assert_close(answer_logits(other, "What?"), answer_logits(plain, "What?"), atol=TOLERANCE, rtol=0)


def test_remembered_turns_equal_one_prompt_of_the_same_tokens(checkpoint):
    model, processor = checkpoint
    frames = scene(8 * RATE + 1)
    session = StreamingSession(model, processor, horizon_seconds=8)
    feed(session, frames[: 4 * RATE + 1])
    first = "".join(session.ask("One?", max_new_tokens=5))
    feed(session, frames[4 * RATE + 1 :], start=4 * RATE + 1)
    list(session.ask("Two?", max_new_tokens=3, remember=False))
    logits = answer_logits(session, "Two?")
    # The same prompt written by hand, all frames one video, read at once.
    ticks = np.stack([frames[n * RATE + RATE - 1] for n in range(8)])
    video = processor.video_processor([ticks], timestamps=[float(n) for n in range(8)])
    kept = video["video_compression_mask"].view(8, -1).sum(dim=1).tolist()
    tokenizer = processor.tokenizer
    shown = [f"Time {n}.0s:" + "<|video_pad|>" * count for n, count in enumerate(kept)]
    system = processor.apply_chat_template([{"role": "user", "content": ""}], add_system_prompt=True)
    system = system[: system.index("<|im_start|>user")]
    text = (
        f"{system}<|im_start|>user\n{','.join(shown[:4])}\nOne?<|im_end|>\n<|im_start|>assistant\n"
        f"{{answer}}<|im_end|>\n<|im_start|>user\n{','.join(shown[4:])}\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    )
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split("{answer}"))
    said = next(list(event.ids) for event in session._transcript.events if event.kind == "answer")
    assert tokenizer.decode(said, skip_special_tokens=True) == first
    ids = torch.tensor([before + said + after])
    with torch.no_grad():
        expected = model(input_ids=ids, **video, logits_to_keep=1).logits[0, -1]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_stream_form_equals_encode_stream(checkpoint):
    model, processor = checkpoint
    ticks = scene(5 * RATE)[RATE - 1 :: RATE]
    session = StreamingSession(model, processor, form="stream", horizon_seconds=5)
    session.show(ticks, [float(n) for n in range(5)])
    encoded = processor.encode_stream(
        np.stack(ticks),
        [{"role": "user", "content": "Now?", "time": 4.5}],
        timestamps=[float(n) for n in range(5)],
        add_system_prompt=True,
        add_generation_prompt=True,
    ).tensors()
    inputs = {"input_ids": encoded.pop("input_ids").unsqueeze(0), **encoded}
    with torch.no_grad():
        expected = model(**inputs, logits_to_keep=1).logits[0, -1]
    torch.testing.assert_close(answer_logits(session, "Now?"), expected, atol=TOLERANCE, rtol=0)


def test_asking_without_remembering_leaves_nothing(checkpoint):
    model, processor = checkpoint
    session = StreamingSession(model, processor)
    feed(session, scene(9))
    before = session.state()
    first = "".join(session.ask("What?", remember=False, max_new_tokens=6))
    assert session.state() == before
    assert "".join(session.ask("What?", remember=False, max_new_tokens=6)) == first
    assert [message["role"] for message in session.messages] == ["system", "user"]


def test_an_answer_that_is_broken_off_is_not_remembered(checkpoint):
    model, processor = checkpoint
    session = StreamingSession(model, processor)
    feed(session, scene(9))
    before = session.state()
    answer = session.ask("What?", max_new_tokens=400, min_new_tokens=400)
    next(answer)
    with pytest.raises(RuntimeError, match="answer before"):
        session.push(scene(1)[0], 9.0)
    answer.close()
    one, other = (session.ask("What?", max_new_tokens=400, min_new_tokens=400) for _ in range(2))
    next(one)
    with pytest.raises(RuntimeError, match="answer before"):
        next(other)
    one.close()
    assert session.state() == before
    assert feed(session, scene(4), start=12) == [2.0]


def test_an_error_of_generate_reaches_the_caller_and_leaves_the_session_as_it_was(checkpoint):
    model, processor = checkpoint
    session = StreamingSession(model, processor)
    feed(session, scene(9))
    before = session.state()
    with pytest.raises(ValueError, match="no_such_option"):
        list(session.ask("What?", no_such_option=1))
    assert session.state() == before


def test_a_fork_goes_its_own_way(checkpoint):
    model, processor = checkpoint
    session = StreamingSession(model, processor, horizon_seconds=8)
    feed(session, scene(4 * RATE + 1))
    expected = answer_logits(session, "What?")
    twin = session.fork()
    list(twin.ask("Something else?", max_new_tokens=4))
    feed(twin, scene(8 * RATE)[4 * RATE + 1 :], start=4 * RATE + 1)
    assert torch.equal(answer_logits(session, "What?"), expected)
    assert twin.state().num_frames == 7
    assert session.state().num_frames == 4
    list(session.ask("What?", max_new_tokens=2))


@pytest.mark.parametrize("policy", ["oldest", "thin"])
def test_forgetting_equals_replaying_what_remains(checkpoint, policy):
    model, processor = checkpoint
    session = StreamingSession(model, processor, horizon_seconds=8, max_cache_tokens=420, forget=policy)
    feed(session, scene(3 * RATE + 1))
    list(session.ask("Keep this?", max_new_tokens=3))
    feed(session, scene(24 * RATE + 1)[3 * RATE + 1 :], start=3 * RATE + 1)
    state = session.state()
    assert state.num_forgotten_frames > 0
    assert state.num_tokens <= 420
    assert "Keep this?" in [message["content"] for message in session.messages]
    # A new session is handed the tokens that remain, with their original masks.
    replay = session.fork()
    replay._cache.clear()
    logits = answer_logits(session, "What?")
    torch.testing.assert_close(logits, answer_logits(replay, "What?"), atol=TOLERANCE, rtol=0)
    seconds = [t for message in session.messages for t in message.get("timestamps_seconds", [])]
    assert seconds == sorted(seconds)
    assert seconds[-1] == 23.0
    assert (0.0 in seconds) == (policy == "thin")


def test_a_full_session_that_must_not_forget_says_so(checkpoint):
    model, processor = checkpoint
    session = StreamingSession(model, processor, max_cache_tokens=300, forget="never")
    with pytest.raises(ValueError, match=r"at most max_cache_tokens=300 tokens, got \d+ with \d+ frames left"):
        feed(session, scene(60 * RATE))


def test_watch_speaks_at_the_threshold_and_goes_on(checkpoint):
    model, processor = checkpoint
    frames = [(frame, number / RATE) for number, frame in enumerate(scene(6 * RATE + 1))]
    session = StreamingSession(model, processor, form="stream")
    messages = list(session.watch("Tell me.", frames, threshold=0.0, max_new_tokens=2))
    assert [message.seconds for message in messages] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert all(0 < message.probability < 1 for message in messages)
    roles = [message["role"] for message in session.messages]
    assert roles == ["system", "user", *["stream", "assistant"] * 6]
    silent = StreamingSession(model, processor, form="stream")
    assert list(silent.watch("Tell me.", frames, threshold=1.0)) == []
    assert silent.state().num_frames == 6


def test_bad_use_is_refused(checkpoint):
    model, processor = checkpoint
    session = StreamingSession(model, processor)
    with pytest.raises(ValueError, match="to watch, got form 'video'"):
        next(session.watch("x", []))
    with pytest.raises(ValueError, match="one answer from this session's cache, got num_beams"):
        session.ask("x", num_beams=2)
    with pytest.raises(ValueError, match="between 1 and the model's context, 32768, got 40000"):
        StreamingSession(model, processor, max_cache_tokens=40000)
    with pytest.raises(ValueError, match="'video' or 'stream', got 'text'"):
        StreamingSession(model, processor, form="text")
    session.close()
    with pytest.raises(RuntimeError, match="got a closed one"):
        session.push(scene(1)[0], 0.0)


def test_an_array_that_is_filled_again_is_not_the_picture_that_was_pushed(checkpoint):
    model, processor = checkpoint
    frames = scene(2 * RATE + 1)
    plain, reused = (StreamingSession(model, processor) for _ in range(2))
    feed(plain, frames)
    buffer = np.empty_like(frames[0])
    for number, frame in enumerate(frames):
        buffer[:] = frame
        reused.push(torch.from_numpy(buffer).permute(2, 0, 1), number / RATE)
        buffer[:] = 0
    assert torch.equal(answer_logits(reused, "What?"), answer_logits(plain, "What?"))


def test_frames_without_room_are_as_if_never_shown(checkpoint):
    model, processor = checkpoint
    ticks = scene(12)
    session = StreamingSession(model, processor, max_cache_tokens=250, forget="never")
    plain = StreamingSession(model, processor)
    fitting = 0
    with pytest.raises(ValueError, match="at most max_cache_tokens=250"):  # noqa: PT012 - which one is counted
        for fitting, tick in enumerate(ticks):
            session.show([tick], [float(fitting)])
    assert 0 < fitting < 11
    plain.show(ticks[:fitting], [float(n) for n in range(fitting)])
    assert session.state().num_tokens == plain.state().num_tokens <= 250
    assert session.messages == plain.messages
    with pytest.raises(ValueError, match="ask for shorter answers"):
        list(session.ask("What?", max_new_tokens=200))
    torch.testing.assert_close(answer_logits(session, "?"), answer_logits(plain, "?"), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("generation", "length"),
    [({}, 75), ({"max_new_tokens": None}, 75), ({"max_new_tokens": 9}, 9), ({"max_length": 220}, None)],
)
def test_an_answer_has_a_limit_that_the_cache_has_room_for(checkpoint, generation, length):
    model, processor = checkpoint
    session = StreamingSession(model, processor, max_cache_tokens=300)
    feed(session, scene(2 * RATE + 1))
    prompt = session._transcript.num_tokens + session._transcript.cost(Event("question", "What?"))
    # Nothing ends it before.
    list(session.ask("What?", eos_token_id=-1, suppress_tokens=[model.generation_config.eos_token_id], **generation))
    assert len(session._transcript.events[-1].ids) == (220 - prompt if length is None else length)
    assert session.state().num_tokens <= 300


def test_pictures_that_may_not_be_resized_must_fit(checkpoint):
    model, _ = checkpoint
    _, processor = build_random(max_tokens=256)
    processor.video_processor.do_resize = False
    session = StreamingSession(model, processor)
    with pytest.raises(ValueError, match="multiples of 28 pixels, since do_resize is off, got 96 x 128"):
        session.show(scene(1), [0.0])
    session.show(scene(1, height=112, width=56), [0.0])
    assert session.state().num_kept_tokens == 8


def test_a_source_of_another_session_is_refused(checkpoint):
    model, processor = checkpoint
    one, other = (StreamingSession(model, processor, form="stream") for _ in range(2))
    with pytest.raises(ValueError, match="a source that this session opened"):
        next(one.watch("Tell me.", other.open("clip.mp4")))
