"""A producer in a thread: same items, same errors, and no thread left behind."""

import threading
import time

import pytest

from videollama3.processing.read_ahead import ReadAhead


def running():
    return [thread for thread in threading.enumerate() if thread.name == "videollama3-read-ahead"]


class Producer:
    """Counts what it has produced, and says in which thread it was closed."""

    def __init__(self, count, error=None):
        self.count, self.error = count, error
        self.produced = 0
        self.closed_in = None

    def items(self):
        try:
            for number in range(self.count):
                self.produced += 1
                yield number
            if self.error:
                raise self.error
        finally:
            self.closed_in = threading.current_thread().name


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_items_come_in_order_and_the_thread_ends(depth):
    producer = Producer(20)
    assert list(ReadAhead(producer.items(), depth=depth)) == list(range(20))
    assert producer.closed_in == "videollama3-read-ahead"
    assert running() == []


def test_any_iterable():
    ahead = ReadAhead([3, 1, 2], depth=1)
    assert list(ahead) == [3, 1, 2]
    assert list(ahead) == []  # and stays exhausted
    assert list(ReadAhead([], depth=1)) == []


def test_the_thread_starts_at_once_and_stays_few_items_ahead():
    producer = Producer(100)
    ahead = ReadAhead(producer.items(), depth=3)
    deadline = time.monotonic() + 5
    while producer.produced < 4 and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.02)
    # Three wait, the fourth cannot be handed over yet.
    assert producer.produced == 4
    assert next(ahead) == 0
    ahead.close()
    assert producer.produced <= 6
    assert running() == []


def test_an_error_comes_in_its_place():
    ahead = ReadAhead(Producer(2, ValueError("the third")).items(), depth=5)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(ValueError, match=r"^the third$"):
        next(ahead)
    assert list(ahead) == []
    assert running() == []


@pytest.mark.parametrize("taken", [0, 1, 9])
def test_stopping_early_closes_the_producer_in_its_thread(taken):
    producer = Producer(10_000)
    ahead = ReadAhead(producer.items(), depth=2)
    assert [next(ahead) for _ in range(taken)] == list(range(taken))
    ahead.close()
    ahead.close()
    assert producer.closed_in == "videollama3-read-ahead"
    assert producer.produced < 20
    assert running() == []


def test_closing_while_the_producer_fails():
    for _ in range(50):
        ahead = ReadAhead(Producer(1, ValueError("nobody hears it")).items(), depth=1)
        ahead.close()
    assert running() == []
