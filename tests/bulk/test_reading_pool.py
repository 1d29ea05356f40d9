"""Real processes that read ahead: order, bounds, threads, and what becomes of errors and crashes."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.media import numbered_picture, write_clip
from videollama3.bulk.input_rows import RowDefaults, open_input
from videollama3.bulk.reading_pool import ReadingPool, _work
from videollama3.bulk.row_reader import FailedRow, ReadRow, RowReader
from videollama3.processing import video_reading
from videollama3.processing.read_ahead import ReadAhead


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for i in range(6):
        pictures = [numbered_picture(11 * i + k) for k in range(100)]
        write_clip(folder / f"{i}.mp4", 25 + 10 * i, pictures=pictures, options={"preset": "ultrafast", "g": "5"})
    (folder / "2.mp4").write_bytes((folder / "2.mp4").read_bytes()[:500])
    return open_input(str(folder), RowDefaults(prompt="What?"))


def read_all(reader, rows, *, num_workers=2, ahead=4):
    return list(ReadingPool(reader, num_workers=num_workers, ahead=ahead).read(iter(rows)))


def test_rows_come_in_order_as_the_processor_gives_them(processor, clips):
    reader = RowReader(processor)
    items = read_all(reader, clips)
    assert [item.row.index for item in items] == list(range(6))
    assert [type(item) for item in items] == [ReadRow, ReadRow, FailedRow, ReadRow, ReadRow, ReadRow]
    assert "whole video file" in items[2].reason
    for item, row in zip(items, clips, strict=True):
        if isinstance(item, FailedRow):
            continue
        here = reader.read(row).prompt.tensors()
        there = item.prompt.tensors()
        assert there["pixel_values_videos"].dtype == torch.uint8
        assert here.keys() == there.keys()
        for name in here:
            assert torch.equal(here[name], there[name]), name


@dataclasses.dataclass(frozen=True)
class Odd(RowReader):
    """Does what no medium at hand does to a decoder, on row 2."""

    what: str = ""
    folder: str = ""

    def read(self, row):
        if row.index == 2:
            if self.what == "error":
                raise KeyError("no such thing")
            if self.what == "memory":
                raise MemoryError("full")
            if self.what == "slow":
                # Until the other process has read all the rest; the tests' own limit of time ends it.
                while not all((Path(self.folder) / str(number)).exists() for number in (3, 4, 5)):
                    time.sleep(0.01)
            elif self.what:
                os.kill(os.getpid(), signal.Signals[self.what])
        if self.folder:
            (Path(self.folder) / str(row.index)).touch()
        return FailedRow(row, str(os.getpid()))


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT"])
def test_a_crash_while_reading_fails_that_row_only(processor, clips, name):
    items = read_all(Odd(processor, what=name), clips)
    assert [item.row.index for item in items] == list(range(6))
    assert items[2].reason == f"The decoding process crashed ({name}) while it read this row."
    assert len({item.reason for item in items}) <= 4


def test_a_process_killed_from_outside_stops_the_run(processor, clips):
    with pytest.raises(RuntimeError, match=r"row 2 \(2.mp4\) ended with exit status -9. If memory ran out"):
        read_all(Odd(processor, what="SIGKILL"), clips)


@pytest.mark.parametrize(
    ("what", "message"), [("error", "KeyError: 'no such thing'"), ("memory", "MemoryError: full")]
)
def test_errors_that_are_no_fault_of_a_medium_stop_the_run(processor, clips, what, message):
    with pytest.raises(RuntimeError, match=rf"Reading row 2 \(2.mp4\) failed: {message}") as caught:
        read_all(Odd(processor, what=what), clips)
    assert "Traceback" in str(caught.value.__cause__)


def test_a_slow_row_does_not_lose_the_order(processor, clips, tmp_path):
    items = read_all(Odd(processor, what="slow", folder=str(tmp_path)), clips, num_workers=2, ahead=6)
    assert [item.row.index for item in items] == list(range(6))
    (other,) = {item.reason for item in items[3:]}
    assert other != items[2].reason


def test_not_more_than_asked_for_are_read_ahead(processor, clips):
    taken = []

    def rows():
        for row in clips:
            taken.append(row.index)
            yield row

    items = ReadingPool(Odd(processor), num_workers=2, ahead=3).read(rows())
    next(items)
    # One is out, three wait, and the next is at hand.
    assert len(taken) <= 5
    items.close()


def test_closing_from_another_thread_ends_it_soon(processor, clips):
    pool = ReadingPool(RowReader(processor), num_workers=1, ahead=1)
    ahead = ReadAhead(pool.read(iter(clips)), depth=1)
    next(ahead)
    start = time.monotonic()
    pool.close()
    ahead.close()
    assert time.monotonic() - start < 5
    assert not any(thread.name == "videollama3-read-ahead" for thread in threading.enumerate())


@dataclasses.dataclass(frozen=True)
class Threads(RowReader):
    """Says what its process would use of the machine."""

    def read(self, row):
        # PyTorch's own is one in every test: OMP_NUM_THREADS says so.
        path = row.messages[0]["content"][0]["video"]
        return FailedRow(row, f"{torch.get_num_threads()} {video_reading._num_decoders(path)}")


def test_a_process_whose_answer_nobody_reads_ends_quietly(processor, clips):
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(theirs, Odd(processor)))
    process.start()
    theirs.close()
    ours.send(clips[0])
    assert ours.poll(60)
    # It waits for the next row by then, or soon.
    ours.close()
    process.join(60)
    assert process.exitcode == 0


def test_threads_do_not_multiply_by_processes(processor, clips):
    assert {item.reason for item in read_all(Threads(processor), clips)} == {"1 1"}


def test_a_process_that_reads_uses_one_thread():
    code = (
        "import torch; torch.set_num_threads(3); from videollama3.bulk.row_reader import use_one_thread; "
        "use_one_thread(); print(torch.get_num_threads())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "1"


def test_limit_decoders(clips, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(5)), raising=False)
    monkeypatch.setattr(video_reading, "_decoder_limit", video_reading._decoder_limit)
    path = clips[0].messages[0]["content"][0]["video"]
    assert video_reading._num_decoders(path) == 5
    video_reading.limit_decoders(3)
    assert video_reading._num_decoders(path) == 3
