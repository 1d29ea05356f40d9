"""Sources that run by themselves: the same frames as the processor's, and nothing lost without being counted."""

import functools
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.media import read_number, write_clip
from videollama3.processing.planned_media import plan_videos
from videollama3.random_checkpoint import build_random
from videollama3.streaming import FeedOptions, StreamingSession

GOP = {"g": "25", "bf": "2"}


@pytest.fixture(scope="module")
def checkpoint():
    return build_random(max_tokens=256)


@pytest.fixture
def session(checkpoint):
    """A session that keeps what it is shown instead of reading it."""
    return Recorder(*checkpoint)


class Recorder(StreamingSession):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.shown = []
        self.seconds_per_tick = 0.0

    def show(self, pictures, timestamps_seconds):
        self.shown += zip(pictures, timestamps_seconds, strict=True)
        time.sleep(self.seconds_per_tick)

    @property
    def labels(self):
        return [seconds for _, seconds in self.shown]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("videollama3")]


@pytest.fixture(scope="module")
def transport_stream(tmp_path_factory):
    """Ten seconds of mpegts with a keyframe in each."""
    folder = tmp_path_factory.mktemp("transport")
    return write_clip(folder / "clip.ts", 250, 25, options=GOP, container_format="mpegts")


def clips(folder):
    steps = np.random.default_rng(5).integers(10, 400, 60)
    yield write_clip(folder / "offset.mp4", 130, 25, start=59, options=GOP)
    yield write_clip(folder / "variable.mkv", 60, 25, pts=np.cumsum(steps), time_base="1/1000", options={"bf": "0"})
    yield write_clip(folder / "ntsc.mp4", 100, 30000 / 1001)
    yield write_clip(folder / "clip.ts", 90, 25, container_format="mpegts", options=GOP)


@pytest.mark.parametrize("fps", [1, 3])
def test_files_give_the_frames_and_labels_of_the_processor(checkpoint, tmp_path, fps):
    model, processor = checkpoint
    for path in clips(tmp_path):
        session = Recorder(model, processor, fps=fps)
        assert list(session.open(path)) == session.labels
        (planned,) = plan_videos([path], [processor.video_processor.options(fps=fps, max_frames=10**4)], ["video"])
        assert session.labels == planned.timestamps.tolist(), path
        for (shown, _), expected in zip(session.shown, planned.pictures(None, None), strict=True):
            assert np.array_equal(shown, expected), path


def test_a_feed_shows_the_model_its_frames(checkpoint, tmp_path):
    model, processor = checkpoint
    session = StreamingSession(model, processor)
    path = write_clip(tmp_path / "clip.mp4", 100, 25)
    with session.open(path) as feed:
        assert list(feed) == [0.0, 1.0, 2.0, 3.0]
    assert [frame.seconds for frame in session.frames] == [0.0, 1.0, 2.0, 3.0]
    assert feed.report.num_ticks == 4


def test_only_frames_that_a_tick_shows_become_rgb_each_once(session, tmp_path):
    path = write_clip(tmp_path / "clip.mkv", 5, 25, pts=[0, 40, 80, 2500, 5010], time_base="1/1000")
    feed = session.open(path)
    converted = []
    reformat = feed._converter.reformat
    feed._converter = type("Counted", (), {"reformat": lambda _, frame, format: count(frame, format)})()

    def count(frame, format):
        converted.append(frame.pts)
        return reformat(frame, format=format)

    assert list(feed) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert converted == [80, 2500]


def test_two_sources_one_after_the_other_go_on_in_time(checkpoint, tmp_path):
    session = StreamingSession(*checkpoint)
    path = write_clip(tmp_path / "clip.mp4", 60, 25, start=50)
    assert list(session.open(path)) == [2.0, 3.0]
    assert list(session.open(path)) == [4.0, 5.0]


def test_realtime_takes_as_long_as_the_clip(session, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 50, 25)
    begun = time.monotonic()
    feed = session.open(path, realtime=True)
    for _ in feed:
        pass
    # The last of 50 frames is due after 49 periods.
    assert time.monotonic() - begun >= 1.9
    assert session.labels == [0.0, 1.0]


def test_a_slow_model_blocks_the_source_and_loses_nothing(checkpoint, tmp_path):
    session = Recorder(*checkpoint, fps=25)
    session.seconds_per_tick = 0.005
    path = write_clip(tmp_path / "clip.mp4", 60, 25)
    feed = session.open(path, queue_ticks=2)
    for _ in feed:
        assert feed._queue.qsize() <= 2
    assert [read_number(picture) for picture, _ in session.shown] == list(range(60))
    assert feed.report.num_dropped_ticks == 0


def test_a_slow_model_drops_ticks_and_says_which(checkpoint, tmp_path):
    session = Recorder(*checkpoint, fps=25)
    session.seconds_per_tick = 0.03
    path = write_clip(tmp_path / "clip.mp4", 100, 25)
    feed = session.open(path, queue_ticks=2, when_behind="drop")
    for _ in feed:
        assert feed._queue.qsize() <= 2
    report = feed.report
    assert report.num_dropped_ticks == len(report.dropped_seconds) > 0
    assert len(session.labels) == report.num_ticks == 100 - report.num_dropped_ticks
    assert sorted([*session.labels, *report.dropped_seconds]) == pytest.approx([n / 25 for n in range(100)])
    # What is dropped is the oldest: the last tick is there.
    assert session.labels[-1] == pytest.approx(99 / 25)


def test_dropped_labels_are_bounded_in_number():
    from videollama3.streaming.feed import FeedReport

    assert FeedReport().dropped_seconds.maxlen == 10_000


# ---------------------------------------------------------------------- damage


@pytest.mark.parametrize("seed", range(6))
def test_damage_in_the_middle_is_counted_and_passed_over(session, transport_stream, tmp_path, seed):
    data = bytearray(Path(transport_stream).read_bytes())
    rng = np.random.default_rng(seed)
    for position in rng.integers(len(data) * 2 // 5, len(data) * 3 // 5, 60):
        data[position] ^= 1 << int(rng.integers(8))
    path = tmp_path / "damaged.ts"
    path.write_bytes(data)
    feed = session.open(path)
    labels = list(feed)
    assert feed.report.num_corrupt > 0
    # Times that the damage hit are repaired; not a tick is missing in between.
    assert labels == pytest.approx([labels[0] + n for n in range(10)])
    # Beyond the damage, from the next keyframe on, pictures and their times are right.
    beyond = [(read_number(picture), seconds) for picture, seconds in session.shown[-3:]]
    assert [number for number, _ in beyond] == [round(25 * (seconds - labels[0])) + 24 for _, seconds in beyond]


def test_a_file_that_breaks_off_gives_what_it_has_and_counts_the_rest(session, tmp_path):
    whole = write_clip(tmp_path / "clip.mp4", 250, 25, options=GOP, container_options={"movflags": "faststart"})
    data = Path(whole).read_bytes()
    path = tmp_path / "short.mp4"
    path.write_bytes(data[: len(data) * 3 // 5])
    feed = session.open(path)
    labels = list(feed)
    assert labels == [float(n) for n in range(len(labels))]
    assert 3 <= len(labels) <= 7
    assert feed.report.num_corrupt > 0


# ---------------------------------------------------------------------- sources that go away


def serve(parts):
    """A server on this machine whose n-th answer promises the whole of `parts` and sends the n-th of them."""
    answers = iter(parts)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            part = next(answers, None)
            if part is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(sum(map(len, parts))))
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=functools.partial(server.serve_forever, 0.02), daemon=True).start()
    return server


def test_a_connection_that_breaks_off_is_opened_again(session, transport_stream):
    data = Path(transport_stream).read_bytes()
    middle = len(data) // 188 // 2 * 188
    server = serve([data[:middle], data[middle:]])
    try:
        feed = session.open(
            f"http://127.0.0.1:{server.server_port}/live.ts", reconnect_attempts=2, reconnect_seconds=0.05
        )
        with pytest.raises(ValueError, match="a source that can be read"):
            list(feed)
    finally:
        server.shutdown()
        server.server_close()
    assert feed.report.num_reconnects >= 1
    # Time goes on by the clock: the pause of 0.05 seconds is no new tick.
    assert session.labels == [float(n) for n in range(len(session.labels))]
    assert len(session.labels) >= 8
    numbers = [read_number(picture) for picture, _ in session.shown]
    assert numbers == sorted(numbers)
    assert numbers[-1] >= 220


def test_the_end_of_a_live_source_is_an_end_where_nobody_asks_for_more(session, transport_stream):
    listener = socket.create_server(("127.0.0.1", 0))

    def send():
        connection, _ = listener.accept()
        with connection:
            connection.sendall(Path(transport_stream).read_bytes())

    sender = threading.Thread(target=send)
    sender.start()
    # Its clock begins at 1.44 seconds, as mpegts does; a live source's labels at zero.
    labels = list(session.open(f"tcp://127.0.0.1:{listener.getsockname()[1]}"))
    sender.join()
    listener.close()
    assert labels == [float(n) for n in range(10)]


def test_a_file_that_appears_later(session, tmp_path):
    source = tmp_path / "later.mp4"
    ready = write_clip(tmp_path / "ready.mp4", 60, 25)
    # Late enough that it is missed at first, on a busy machine too.
    timer = threading.Timer(2.0, os.replace, (ready, source))
    timer.start()
    feed = session.open(source, reconnect_attempts=2000, reconnect_seconds=0.02)
    assert list(feed) == [0.0, 1.0]
    assert feed.report.num_reconnects == 1
    timer.join()


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("no.mp4", FileNotFoundError, "the source at an existing path, got 'no.mp4'"),
        ("http://127.0.0.1:9/x", ValueError, "can be read, got 'http://127.0.0.1:9/x': it could not be opened"),
        ("/dev/video99", ValueError, "can be read, got '/dev/video99': it could not be opened"),
        ("list.m3u8", ValueError, "as a whole video file, got .list.m3u8., which could not be opened"),
        (".", ValueError, "use show_video"),
    ],
)
def test_what_cannot_be_read_is_one_clear_error(session, tmp_path, monkeypatch, source, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    with pytest.raises(error, match=message):
        list(session.open(source))


# ---------------------------------------------------------------------- ends


def test_a_feed_can_be_left_and_ends_when_asked(session, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 250, 25)
    feed = session.open(path, queue_ticks=1)
    for seconds in feed:
        if seconds == 2.0:
            break
    feed.close()
    assert session.labels == [0.0, 1.0, 2.0]
    with pytest.raises(RuntimeError, match="not iterated before"):
        list(feed)
    assert list(Recorder(session.model, session.processor).open(path, stop_after_seconds=4)) == [0.0, 1.0, 2.0, 3.0]


def test_closing_wakes_who_waits(session, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 250, 25)
    feed = session.open(path, realtime=True)
    timer = threading.Timer(0.2, feed.close)
    timer.start()
    begun = time.monotonic()
    assert list(feed) == []
    assert time.monotonic() - begun < 5
    timer.join()


def test_bad_options_are_refused():
    for option, value, message in (
        ("when_behind", "wait", "'block' or 'drop', got 'wait'"),
        ("queue_ticks", 0, "queue_ticks of at least 1, got 0"),
        ("stop_after_seconds", 0, "above zero, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            FeedOptions(**{option: value})


# A child of a job in the background inherits that Ctrl-C is ignored.
WATCH = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from videollama3.cli import main; sys.exit(main())"
)


@pytest.mark.slow
def test_ctrl_c_ends_a_watch_cleanly(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 1500, 25, options={"preset": "ultrafast"})
    command = [sys.executable, "-c", WATCH, "watch", path, "Tell me.", "--realtime", "--threshold", "0"]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline().startswith("[0.0s]")
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "watched " in errors
    assert errors.rstrip().endswith("interrupted")
