"""A cache that grows in place holds what transformers' own holds, and forks never see each other's tokens."""

import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from tests.streaming.clips import scene
from videollama3.random_checkpoint import build_random
from videollama3.streaming import StreamingSession
from videollama3.streaming.growing_cache import GrowingCache

HEADS, WIDTH = 2, 3


def new_tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, HEADS, count, WIDTH, generator=generator).unbind()


def held(cache):
    return [(layer.keys, layer.values) for layer in cache.layers]


def assert_same(cache, expected):
    for layer, (keys, values) in zip(cache.layers, expected, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_forks_that_append_and_take_back_hold_what_copies_would(data):
    """Each fork beside plain tensors that are copied at every step."""
    pairs = [(GrowingCache(2, max_tokens=40), [(torch.zeros(1, HEADS, 0, WIDTH),) * 2] * 2)]
    for seed in range(data.draw(st.integers(1, 25))):
        number = data.draw(st.integers(0, len(pairs) - 1))
        cache, plain = pairs[number]
        step = data.draw(st.sampled_from(["append", "append", "keep", "fork", "forget"]))
        if step == "append":
            keys, values = new_tokens(data.draw(st.integers(1, 30)), seed)
            for layer in range(2):
                given_back = cache.update(keys + layer, values - layer, layer)
                assert all(map(torch.equal, given_back, held(cache)[layer]))
            plain = [
                (torch.cat([k, keys + layer], -2), torch.cat([v, values - layer], -2))
                for layer, (k, v) in enumerate(plain)
            ]
            pairs[number] = (cache, plain)
        elif step == "keep":
            count = data.draw(st.integers(0, plain[0][0].shape[-2]))
            cache.keep(count)
            pairs[number] = (cache, [(k[..., :count, :], v[..., :count, :]) for k, v in plain])
        elif step == "fork":
            pairs.append((cache.fork(), plain))
        elif len(pairs) > 1:
            del pairs[number]
        for each, expected in pairs:
            assert each.get_seq_length() == expected[0][0].shape[-2]
            if each.layers[0].is_initialized:
                assert_same(each, expected)


def test_room_doubles_up_to_the_limit_and_tokens_stay_in_place():
    cache = GrowingCache(1, max_tokens=900)
    places, rooms = [], []
    for seed in range(60):
        cache.update(*new_tokens(15, seed), 0)
        places.append(cache.layers[0].keys.data_ptr())
        rooms.append(cache.allocated_bytes // (2 * HEADS * WIDTH * 4))
    assert sorted(set(rooms)) == [256, 510, 900]
    # While it grows both are held, so the places differ; a place freed two steps ago may come again.
    moved, grown = ([a != b for a, b in itertools.pairwise(values)] for values in (places, rooms))
    assert moved == grown
    assert cache.used_bytes == cache.allocated_bytes == 2 * HEADS * WIDTH * 4 * 900


def test_a_fork_copies_nothing_until_both_go_on():
    cache = GrowingCache(1, max_tokens=1000)
    cache.update(*new_tokens(100, 0), 0)
    place = cache.layers[0].keys.data_ptr()
    fork = cache.fork()
    fork.update(*new_tokens(5, 1), 0)
    assert fork.layers[0].keys.data_ptr() == place
    before = [tensor.clone() for tensor in held(fork)[0]]
    cache.update(*new_tokens(5, 2), 0)
    assert cache.layers[0].keys.data_ptr() != place
    assert_same(fork, [before])
    # A fork that is gone is in nobody's way.
    other = GrowingCache(1, max_tokens=1000)
    other.update(*new_tokens(100, 0), 0)
    place = other.layers[0].keys.data_ptr()
    aside = other.fork()
    aside.update(*new_tokens(5, 1), 0)
    del aside
    other.update(*new_tokens(5, 2), 0)
    assert other.layers[0].keys.data_ptr() == place


def test_tensors_that_transformers_sets_are_taken_over():
    cache, plain = GrowingCache(1, max_tokens=100), DynamicCache()
    for one in (cache, plain):
        one.update(*(tensor.expand(2, -1, -1, -1) for tensor in new_tokens(4, 0)), 0)
        one.reorder_cache(torch.tensor([1, 0]))
        one.batch_select_indices(torch.tensor([1]))
        one.update(*new_tokens(3, 1), 0)
        one.crop(-2)
        one.update(*new_tokens(1, 2), 0)
    assert_same(cache, held(plain))
    cache.reset()
    assert cache.get_seq_length() == 0
    cache.update(*new_tokens(3, 1), 0)
    assert cache.get_seq_length() == 3


def test_it_is_written_in_and_out_of_inference_mode():
    cache = GrowingCache(1, max_tokens=100)
    with torch.inference_mode():
        cache.update(*new_tokens(4, 0), 0)
    with torch.no_grad():
        cache.update(*new_tokens(4, 1), 0)
    assert cache.get_seq_length() == 8


def test_forks_in_threads_do_not_write_into_each_other():
    start = GrowingCache(1, max_tokens=4000)
    start.update(*new_tokens(10, 0), 0)
    forks = [start.fork() for _ in range(4)]

    def append(fork, value):
        for _ in range(200):
            fork.update(torch.full((1, HEADS, 1, WIDTH), value), torch.full((1, HEADS, 1, WIDTH), -value), 0)

    threads = [threading.Thread(target=append, args=(fork, float(n))) for n, fork in enumerate(forks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, fork in enumerate(forks):
        assert fork.get_seq_length() == 210
        assert (fork.layers[0].keys[..., 10:, :] == number).all()
        assert (fork.layers[0].values[..., 10:, :] == -number).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ticks_and_questions_append_in_place(attention):
    model, processor = build_random(max_tokens=256)
    model.set_attn_implementation(attention)
    session = StreamingSession(model, processor, max_cache_tokens=1000)
    buffers = []
    for number, picture in enumerate(scene(8)):
        session.show([picture], [float(number)])
        buffers.append([layer._buffer for layer in session._cache.kv.layers])
        with session.fork() as aside:
            list(aside.ask("What?", max_new_tokens=3))
        list(session.ask("What?", remember=False, max_new_tokens=3))
    # The first room, for 256 tokens, is used up once.
    assert len({id(layers[0]) for layers in buffers}) == len({id(layers[-1]) for layers in buffers}) == 2
    state = session.state()
    text = model.config.text_config
    width = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    assert state.cache_bytes == 2 * text.num_hidden_layers * width * 4 * state.num_tokens
    assert state.cache_bytes < state.allocated_cache_bytes < 2.2 * state.cache_bytes
