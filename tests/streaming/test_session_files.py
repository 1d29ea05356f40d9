"""A saved session goes on as if it had never stopped."""

import itertools
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from tests.streaming.clips import scene
from tests.streaming.test_session import RATE, answer_logits, feed
from videollama3.random_checkpoint import build_random
from videollama3.streaming import StreamingSession
from videollama3.streaming.session_files import read_session, write_session


@pytest.fixture(scope="module")
def checkpoint():
    return build_random(max_tokens=256)


@pytest.fixture(scope="module")
def frames():
    return scene(12 * RATE + 1, still=range(22, 30))


def used_session(checkpoint, frames, **options):
    """A session in the middle of a tick, after a question and after forgetting."""
    session = StreamingSession(*checkpoint, horizon_seconds=8, max_cache_tokens=280, **options)
    feed(session, frames[: 2 * RATE + 1])
    list(session.ask("One?", max_new_tokens=4))
    feed(session, frames[2 * RATE + 1 : 10 * RATE + 2], start=2 * RATE + 1)
    assert session.state().num_forgotten_frames > 0
    return session


@pytest.mark.parametrize("form", ["video", "stream"])
def test_a_loaded_session_goes_on_within_the_tick(checkpoint, frames, tmp_path, form):
    session = used_session(checkpoint, frames, form=form, forget="thin")
    session.save(tmp_path)
    loaded = StreamingSession.load(*checkpoint, tmp_path)
    assert loaded.state() == session.state()
    assert loaded.messages == session.messages
    for one in (session, loaded):
        feed(one, frames[10 * RATE + 2 :], start=10 * RATE + 2)
    assert loaded.state() == session.state()
    # The same numbers go through the same operations.
    assert torch.equal(answer_logits(loaded, "Two?"), answer_logits(session, "Two?"))
    if form == "stream":
        assert loaded.speaking_probability() == session.speaking_probability()


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_answer(checkpoint, frames, tmp_path):
    session = used_session(checkpoint, frames)
    session.save(tmp_path)
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from videollama3.random_checkpoint import build_random\n"
        "from videollama3.streaming import StreamingSession\n"
        "session = StreamingSession.load(*build_random(max_tokens=256), sys.argv[1])\n"
        "ids = []\n"
        "list(session.ask('Two?', max_new_tokens=8))\n"
        "print(list(session._transcript.events[-1].ids))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    list(session.ask("Two?", max_new_tokens=8))
    assert json.loads(done.stdout) == list(session._transcript.events[-1].ids)


def test_an_empty_session_can_be_saved(checkpoint, tmp_path):
    StreamingSession(*checkpoint, system_prompt=False, origin_seconds=0.5).save(tmp_path)
    loaded = StreamingSession.load(*checkpoint, tmp_path)
    assert loaded.messages == []
    assert feed(loaded, scene(RATE + 4)[3:], start=3) == [0.5]


def test_saving_again_leaves_one_session(checkpoint, frames, tmp_path):
    session = used_session(checkpoint, frames)
    session.save(tmp_path)
    first = set(os.listdir(tmp_path))
    assert session.finish(11) == [10.0]
    session.save(tmp_path)
    second = set(os.listdir(tmp_path))
    assert len(first) == len(second) == 2
    assert first & second == {"session.json"}
    assert StreamingSession.load(*checkpoint, tmp_path).state() == session.state()


def test_who_saves_at_the_same_time_loses_nothing(tmp_path):
    """Tensors that another process has just written are left alone, and those of a killed one go some day."""
    young, old = (tmp_path / f"session-{name}.safetensors" for name in ("young", "old"))
    for path in (young, old):
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    write_session(tmp_path, {"number": 0}, {"x": torch.zeros(1)})
    assert young.exists()
    assert not old.exists()


def test_who_reads_while_it_is_saved_gets_a_whole_session(tmp_path):
    write_session(tmp_path, {"number": 0}, {"x": torch.tensor([0])})
    stop = threading.Event()

    def save():
        for number in itertools.count(1):
            if stop.wait(0.002):
                return
            write_session(tmp_path, {"number": number}, {"x": torch.tensor([number])})

    saver = threading.Thread(target=save)
    saver.start()
    try:
        for _ in range(300):
            record, tensors = read_session(tmp_path)
            assert tensors["x"].tolist() == [record["number"]]
    finally:
        stop.set()
        saver.join()


def test_a_save_that_fails_leaves_the_one_before(checkpoint, frames, tmp_path, monkeypatch):
    session = used_session(checkpoint, frames)
    session.save(tmp_path)
    before = session.state()
    feed(session, frames[10 * RATE + 2 :], start=10 * RATE + 2)

    def full(*arguments):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            session.save(tmp_path)
    assert StreamingSession.load(*checkpoint, tmp_path).state() == before


def test_another_model_or_processor_is_refused(checkpoint, frames, tmp_path):
    model, processor = checkpoint
    used_session(checkpoint, frames).save(tmp_path)
    other, _ = build_random(seed=1, max_tokens=256)
    with pytest.raises(ValueError, match=r"got others: the model's weights differs\."):
        StreamingSession.load(other, processor, tmp_path)
    wider, _ = build_random(hidden_size=32)
    with pytest.raises(ValueError, match="the model's configuration, the model's weights differ"):
        StreamingSession.load(wider, processor, tmp_path)
    _, sharper = build_random(max_tokens=512)
    with pytest.raises(ValueError, match="the video processor's settings differs"):
        StreamingSession.load(model, sharper, tmp_path)
    half, _ = build_random()
    with pytest.raises(ValueError, match="the model's dtype"):
        StreamingSession.load(half.to(torch.bfloat16), processor, tmp_path)


def test_one_changed_weight_is_another_model(checkpoint, frames, tmp_path):
    used_session(checkpoint, frames).save(tmp_path)
    tuned, processor = build_random(max_tokens=256)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1 + 1e-3)
    with pytest.raises(ValueError, match="the model's weights"):
        StreamingSession.load(tuned, processor, tmp_path)


def test_damaged_and_missing_files_are_refused(checkpoint, frames, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a folder with a saved session"):
        StreamingSession.load(*checkpoint, tmp_path)
    session = used_session(checkpoint, frames)
    session.save(tmp_path)
    (tensors,) = tmp_path.glob("*.safetensors")
    assert all(not tensor.is_floating_point() or tensor.isfinite().all() for tensor in load_file(tensors).values())
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="a whole session in"):
        StreamingSession.load(*checkpoint, tmp_path)
    (tmp_path / "session.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="it has format 99, this version reads 1"):
        StreamingSession.load(*checkpoint, tmp_path)
    (tmp_path / "session.json").write_text("[")
    with pytest.raises(ValueError, match="a whole session in"):
        StreamingSession.load(*checkpoint, tmp_path)
