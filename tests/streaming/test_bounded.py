"""A stream without end: memory and the cost of a tick stay where they are."""

import gc
import time

import numpy as np
import pytest

from tests.streaming.clips import scene
from videollama3.random_checkpoint import build_random
from videollama3.streaming import StreamingSession


@pytest.fixture(scope="module")
def checkpoint():
    return build_random(hidden_size=32, num_hidden_layers=1, max_tokens=256)


def resident_mib():
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS:"))


def sizes(session):
    """Lengths of everything in a session that could grow."""
    return (
        len(session._transcript.events),
        len(session._transcript.frames),
        len(session._transcript.frame_costs),
        len(session._transcript.writer.chunks),
        sum(len(chunk.ids) for chunk in session._transcript.writer.chunks),
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("forget", "thousands"), [("oldest", 10), ("thin", 4)])
def test_ten_thousand_frames(checkpoint, forget, thousands):
    # A tokenizer remembers the first 10,000 words that it meets, labels among them: not the session's growth.
    for number in range(11_000):
        checkpoint[1].tokenizer(f"word {number}")
    session = StreamingSession(*checkpoint, max_cache_tokens=600, forget=forget)
    pictures = scene(97, height=70, width=98)
    memory, seconds, largest = [], [], (0,) * 5
    for thousand in range(thousands):
        costs = []
        for number in range(1000 * thousand, 1000 * thousand + 1000):
            begun = time.process_time()
            session.show([pictures[number % 97]], [float(number)])
            costs.append(time.process_time() - begun)
            if thousand == 0:
                largest = tuple(map(max, largest, sizes(session)))
        gc.collect()
        memory.append(resident_mib())
        seconds.append(sum(costs))
        # A rebuild more or less: what the first thousand reached is not passed by more than one frame's share.
        assert all(now <= 1.1 * most + 5 for now, most in zip(sizes(session), largest, strict=True))
    state = session.state()
    assert state.num_tokens <= 600
    assert state.num_forgotten_frames + state.num_frames == 1000 * thousands
    # Measured: less than 1 MiB of change. Keeping every frame's features would be 30 MiB, its events 5.
    assert max(memory[1:]) - memory[0] < 3, memory
    # The last thousands cost what the second did; the margin is that of a busy machine.
    assert np.median(seconds[thousands // 2 :]) < 1.5 * np.median(seconds[1 : thousands // 2]), seconds
    # Every token that enters is read again at most three times.
    entered = 1000 * thousands * (state.num_kept_tokens / state.num_frames + 12)
    assert state.num_rebuilt_tokens < 3 * entered


@pytest.mark.parametrize("forget", ["oldest", "thin"])
def test_a_watch_without_end_forgets_what_it_said(checkpoint, forget):
    session = StreamingSession(*checkpoint, form="stream", max_cache_tokens=500, forget=forget)
    pictures = scene(97, height=70, width=98)
    frames = ((pictures[number % 97], float(number)) for number in range(80))
    largest = (0,) * 5
    for message in session.watch("Tell me.", frames, threshold=0.0, max_new_tokens=3):
        if message.seconds < 40:
            largest = tuple(map(max, largest, sizes(session)))
        assert session.state().num_tokens <= 500
        assert all(now <= 1.1 * most + 5 for now, most in zip(sizes(session), largest, strict=True))
    roles = [message["role"] for message in session.messages]
    assert roles[:2] == ["system", "user"]
    held = session.state()
    assert held.num_frames < 40
    # As many remarks as frames that are held: each goes with its frame.
    assert roles.count("assistant") == held.num_frames


def test_rebuilt_tokens_are_those_that_were_read_before(checkpoint):
    model, _ = checkpoint
    session = StreamingSession(*checkpoint, max_cache_tokens=600)
    pictures = scene(97, height=70, width=98)
    read = 0
    forward = model.model.language_model.forward

    def counted(*arguments, **options):
        nonlocal read
        read += options["inputs_embeds"].shape[1]
        return forward(*arguments, **options)

    model.model.language_model.forward = counted
    try:
        # The system message is read with the first frame.
        entered = session.state().num_tokens
        for number in range(60):
            before = session.state()
            session.show([pictures[number]], [float(number)])
            after = session.state()
            if after.num_forgotten_frames == before.num_forgotten_frames:
                entered += after.num_tokens - before.num_tokens
            else:
                # Of the frame that made the session forget, its own tokens are new.
                entered += session._transcript.frame_costs[number]
    finally:
        del model.model.language_model.forward
    state = session.state()
    assert state.num_forgotten_frames > 0
    assert state.num_rebuilt_tokens == read - entered > 300
