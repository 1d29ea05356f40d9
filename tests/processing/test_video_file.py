"""Hostile and broken input: limits hold, no other file or host is reached, and nothing is left behind."""

import contextlib
import functools
import gc
import http.server
import os
import re
import socket
import tempfile
import threading
import time
from pathlib import Path

import av
import pytest

from tests.media import write_clip
from videollama3 import VideoLlama3VideoProcessor
from videollama3.processing import frame_decoding, video_file
from videollama3.processing.video_file import Deadline, ReadingLimits, open_video
from videollama3.processing.video_reading import plan_video, read_frames

FAST = {"preset": "ultrafast", "g": "12"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("media") / "clip.mp4", 60, 25, options=FAST)


@pytest.fixture(scope="module")
def videos():
    return VideoLlama3VideoProcessor()


def open_files():
    files = set()
    for entry in os.scandir("/proc/self/fd"):
        # Closed meanwhile, by another thread or by the end of the scan.
        with contextlib.suppress(FileNotFoundError):
            files.add(os.readlink(entry.path))
    return files


class _Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests.append(self.path)
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to?"))
            self.end_headers()
        else:
            super().do_GET()


@pytest.fixture
def server(tmp_path):
    """Serves `tmp_path`, and remembers who asked for what."""
    handler = functools.partial(_Server, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.requests = []
        running.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


# Limits.


def test_a_deadline():
    Deadline(60, "video 3").check()
    with pytest.raises(
        TimeoutError,
        match=re.escape(
            "Expected to read video 3 within 1e-09 seconds, which are over: the file is damaged, or the limit "
            "(`max_read_seconds`) too low for it."
        ),
    ):
        Deadline(1e-9, "video 3").check()


def test_reading_stops_at_its_time_limit(videos, clip):
    message = re.escape("Expected to read video 0 within 0.0001 seconds, which are over")
    with pytest.raises(TimeoutError, match=message):
        videos([clip], max_read_seconds=0.0001)
    with pytest.raises(TimeoutError, match=message):
        VideoLlama3VideoProcessor(max_read_seconds=0.0001)([clip])
    assert videos([clip])["video_grid_thw"][0, 0] == 2


def _sleepy(function, seconds=0.05):
    def slower(*arguments, **options):
        for item in function(*arguments, **options):
            time.sleep(seconds)
            yield item

    return slower


@pytest.mark.parametrize("by_decoding", [False, True])
def test_decoding_stops_at_its_time_limit_too(clip, monkeypatch, by_decoding):
    plan = plan_video(
        clip, name="video 0", fps=1, max_frames=9, by_decoding=by_decoding, limits=ReadingLimits(max_seconds=0.3)
    )
    monkeypatch.setattr(frame_decoding, "read_packets", _sleepy(video_file.read_packets))
    monkeypatch.setattr(video_file, "read_packets", _sleepy(video_file.read_packets))
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^Expected to read video 0 within 0\.3 seconds"):
        list(read_frames(plan))
    assert time.monotonic() - start < 3
    assert threading.active_count() == 1 or not any("read-ahead" in t.name for t in threading.enumerate())


def test_demuxing_stops_at_its_time_limit(clip, monkeypatch):
    monkeypatch.setattr(video_file, "read_packets", _sleepy(video_file.read_packets))
    with pytest.raises(TimeoutError, match=r"^Expected to read video 0 within 0\.3 seconds"):
        plan_video(clip, name="video 0", fps=1, max_frames=9, limits=ReadingLimits(max_seconds=0.3))


def test_pixels_of_a_frame(clip):
    assert VideoLlama3VideoProcessor(max_frame_pixels=208 * 96)([clip])["video_grid_thw"][0, 0] == 2
    with pytest.raises(ValueError, match=r"^Expected video 0 with at most 19967 pixels per frame, got 208 x 96\.$"):
        VideoLlama3VideoProcessor(max_frame_pixels=208 * 96 - 1)([clip])


def test_pixels_of_a_frame_that_grows_on_the_way(tmp_path):
    """Two H.264 streams in a row: the size stands in the frames, not in the container."""
    small = write_clip(tmp_path / "small.h264", 30, 25, container_format="h264", options=FAST)
    large = write_clip(tmp_path / "large.h264", 30, 25, container_format="h264", options=FAST, height=480, width=640)
    both = tmp_path / "both.h264"
    both.write_bytes(Path(small).read_bytes() + Path(large).read_bytes())
    with pytest.raises(ValueError, match=r"^Expected video 0 with at most 40000 pixels per frame, got 640 x 480\.$"):
        VideoLlama3VideoProcessor(max_frame_pixels=200 * 200)([str(both)])
    # What would take much memory is not even decoded.
    write_clip(large, 2, 25, container_format="h264", options=FAST, height=2176, width=3840)
    both.write_bytes(Path(small).read_bytes() + Path(large).read_bytes())
    with pytest.raises(ValueError, match=r"^Expected video 0 as a whole video file, but decoding failed: "):
        VideoLlama3VideoProcessor(max_frame_pixels=200 * 200)([str(both)])


def test_duration(clip):
    assert VideoLlama3VideoProcessor(max_duration_seconds=2.4)([clip])["video_grid_thw"][0, 0] == 2
    with pytest.raises(ValueError, match=r"^Expected video 0 of at most 2\.3 seconds, got 2\.$"):
        VideoLlama3VideoProcessor(max_duration_seconds=2.3)([clip])


# What is no file.


@pytest.mark.timeout(20)
def test_pipes_devices_and_sockets_are_refused_without_waiting(videos, tmp_path):
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    for path in (
        pipe,
        Path("/dev/zero"),
        Path("/dev/stdin").resolve() if Path("/dev/stdin").is_char_device() else pipe,
    ):
        with pytest.raises(
            ValueError,
            match=re.escape(
                f"Expected video 0 as a file or a folder, got {str(path)!r}, which is a device or a pipe."
            ),
        ):
            videos([path])
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as unix:
        unix.bind(str(tmp_path / "socket"))
        with pytest.raises(ValueError, match="which is a device or a pipe"):
            videos([tmp_path / "socket"])


# Files that name other files.

PLAYLISTS = {
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{target}\n#EXT-X-ENDLIST\n",
    "ffconcat": "ffconcat version 1.0\nfile '{target}'\n",
    "mpd": (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT2S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
        'bandwidth="1"><BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>'
    ),
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("ending", PLAYLISTS)
@pytest.mark.parametrize("reach", ["file", "http"])
@pytest.mark.parametrize("form", ["path", "disguised", "bytes", "url"])
def test_playlists_are_refused_and_reach_nothing(videos, server, tmp_path, clip, monkeypatch, ending, reach, form):
    secret = tmp_path / "secret.ts"
    write_clip(secret, 30, 25, options=FAST)
    target = secret.as_uri() if reach == "file" else f"{server.url}/secret.ts"
    if ending == "ffconcat" and reach == "file":
        target = secret.name  # a name beside it: the only kind that the concat demuxer finds safe
    text = PLAYLISTS[ending].format(target=target)
    path = tmp_path / f"list.{ending if form != 'disguised' else 'mp4'}"
    path.write_text(text)
    before = secret.stat().st_atime_ns
    os.utime(secret, ns=(before - 10**12, before))
    before = secret.stat().st_atime_ns
    source = {"bytes": text.encode(), "url": f"{server.url}/{path.name}"}.get(form, path)
    with pytest.raises(ValueError, match=r"^Expected video 0 (as a|in a format|with a) "):
        videos([source])
    asked = [request for request in server.requests if "secret" in request]
    assert asked == []
    assert secret.stat().st_atime_ns == before


def test_only_the_protocol_of_the_file_itself_is_open(clip, server):
    with open_video(clip, name="video 0", limits=ReadingLimits()) as (container, _):
        assert container.format.name.startswith("mov")
    assert server.requests == []
    # libav itself would follow a URL; a path that looks like one is a file that is not there.
    for name in (f"{server.url}/clip.mp4", "concat:a|b", "subfile,,start,0,end,9,,:clip.mp4", "data:video/mp4,x"):
        with (
            pytest.raises(
                ValueError, match=r"^Expected video 0 as a whole video file, got .* could not be opened: No such"
            ),
            open_video(name, name="video 0", limits=ReadingLimits()),
        ):
            pass
    assert server.requests == []


# Downloads.


@pytest.mark.parametrize(
    "target", ["file://{secret}", "ftp://127.0.0.1:9/x", "data:video/mp4;base64,AAAA", "gopher://x/"]
)
def test_a_redirect_leads_to_http_only(videos, server, tmp_path, clip, target):
    secret = tmp_path / "clip.mp4"
    secret.write_bytes(Path(clip).read_bytes())
    url = f"{server.url}/to?" + target.format(secret=secret)
    with pytest.raises(ValueError, match=r"^Expected video 0 at a URL that answers, got 'http://127.*'"):
        videos([url])
    assert [request[:4] for request in server.requests] == ["/to?"]
    # The same file, reached through http, is read.
    assert videos([f"{server.url}/to?/clip.mp4"])["video_grid_thw"][0, 0] == 2


def test_a_download_is_gone_after_use(videos, server, tmp_path, clip, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(Path(clip).read_bytes())
    (tmp_path / "broken.mp4").write_bytes(Path(clip).read_bytes()[:3000])
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = open_files()
    assert videos([f"{server.url}/clip.mp4"])["video_grid_thw"][0, 0] == 2
    with pytest.raises(ValueError, match=r"^Expected video 0 as a whole video file"):
        videos([f"{server.url}/broken.mp4"])
    with pytest.raises(FileNotFoundError, match="404"):
        videos([f"{server.url}/nothing.mp4"])
    gc.collect()  # the error's traceback holds the plan
    assert list(temporary.iterdir()) == []
    # Warnings are errors in this suite: an unclosed file would show here.
    assert {name for name in open_files() - before if "socket" not in name} == set()


def test_files_are_closed_after_errors_and_early_ends(tmp_path, clip, videos):
    broken = tmp_path / "broken.mp4"
    data = bytearray(Path(clip).read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    broken.write_bytes(data)
    frames = read_frames(plan_video(clip, name="video 0", fps=5, max_frames=20))
    next(frames)
    frames.close()
    with contextlib.suppress(ValueError):
        videos([broken])
    assert not [name for name in open_files() if name.endswith((".mp4", "clip.mp4"))]


# PyAV's own faults.


def test_streams_that_appear_on_the_way_end_the_reading(clip, monkeypatch):
    class Container:
        def __init__(self, container):
            self.container = container

        def demux(self, stream):
            yield from (packet for packet in self.container.demux(stream) if packet.size)
            # What PyAV does when a stream was added since the file was opened.
            raise IndexError("list index out of range")

    with av.open(clip) as container:
        stream = container.streams.video[0]
        assert len(list(video_file.read_packets(Container(container), stream))) == 60


def test_titles_that_are_no_text(tmp_path, videos):
    path = write_clip(tmp_path / "clip.mp4", 60, 25, options=FAST)
    data = Path(path).read_bytes()
    assert b"Lavf" in data
    Path(path).write_bytes(data.replace(b"Lavf", b"\xc2\xff\xfeX"))
    assert videos([path])["video_grid_thw"][0, 0] == 2
