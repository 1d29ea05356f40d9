"""Reading real files: the frame number read from the pixels is the one the rule expects, bit for bit.

Every clip is encoded here, its frames numbered in their pixels; golden clips carry the authors' checksums.
"""

import hashlib
import io
import json
import re
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.conftest import GOLDEN, GOLDEN_CASES
from tests.media import numbered_picture, read_number, write_clip
from videollama3.processing.video_reading import UnexpectedFrameError, plan_video, read_frames

FAST = {"preset": "ultrafast"}
VP9 = {"deadline": "realtime", "cpu-used": "8"}
NTSC_FILM, NTSC = Fraction(24000, 1001), Fraction(30000, 1001)


@pytest.fixture(autouse=True)
def _quiet_av1(monkeypatch):
    monkeypatch.setenv("SVT_LOG", "1")


def needs_encoder(codec):
    try:
        av.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this build of PyAV has no encoder {codec}")


def plan(path, **options):
    return plan_video(path, **{"name": "video 0", "fps": 1, "max_frames": 180, **options})


def numbers(path, **options):
    return [read_number(picture) for picture in read_frames(plan(path, **options))]


def decode_everything(path):
    """All frames of a file, in the order shown: (time in seconds, RGB)."""
    with av.open(path) as container:
        frames = [
            (frame.pts * frame.time_base, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)
        ]
    return sorted(frames, key=lambda item: item[0])


def last_of_each_second(times, first=Fraction(0)):
    """Indices by the rule, for frame times in seconds at a constant rate."""
    end = times[-1] + (times[-1] - times[0]) / (len(times) - 1)
    count = int(end - first + Fraction(1, 1000))
    return [max(i for i, time in enumerate(times) if time < first + n + 1 - Fraction(1, 1000)) for n in range(count)]


# codec, container, rate, encoder options; between them every codec, container and rate.
TABLE = [
    ("libx264", "mp4", 25, FAST),
    ("libx264", "mp4", 10, {"preset": "medium", "bf": "3"}),
    ("libx264", "mp4", NTSC, {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0"}),
    ("libx264", "mkv", NTSC_FILM, {"preset": "medium", "bf": "3"}),
    ("libx264", "mkv", 50, FAST),
    ("libx264", "mov", 24, {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0"}),
    ("libx265", "mp4", NTSC, FAST | {"x265-params": "log-level=0"}),
    ("libx265", "mkv", 25, FAST | {"x265-params": "log-level=0:open-gop=1:keyint=10:min-keyint=10:bframes=3"}),
    ("libvpx-vp9", "webm", 25, VP9),
    ("libvpx-vp9", "webm", NTSC, {"deadline": "good", "cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    ("libvpx-vp9", "mp4", 10, VP9),
    ("libsvtav1", "mp4", 25, {"preset": "8", "svtav1-params": "lp=1"}),
    ("libsvtav1", "webm", NTSC_FILM, {"preset": "8", "svtav1-params": "lp=1"}),
    ("mpeg4", "mp4", 25, {"bf": "2"}),
    ("mpeg4", "avi", NTSC, {}),
    ("mpeg4", "mkv", 50, {}),
]


@pytest.mark.parametrize(("codec", "container", "rate", "options"), TABLE, ids=lambda value: str(value)[:24])
def test_codecs_containers_and_rates(tmp_path, codec, container, rate, options):
    needs_encoder(codec)
    count = int(rate * Fraction(23, 10))
    path = write_clip(tmp_path / f"clip.{container}", count, rate, codec=codec, options=options)
    expected = last_of_each_second([i / Fraction(rate) for i in range(count)])
    chosen = plan(path)
    assert chosen.sampled.indices.tolist() == expected
    assert chosen.sampled.timestamps.tolist() == [0.0, 1.0]
    assert (chosen.height, chosen.width, len(chosen.times.pts)) == (96, 208, count)
    assert not chosen.by_decoding
    pictures = list(read_frames(chosen))
    assert [read_number(picture) for picture in pictures] == expected
    # Bit for bit what decoding everything and picking gives.
    everything = decode_everything(path)
    for picture, index in zip(pictures, expected, strict=True):
        assert np.array_equal(picture, everything[index][1])


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_mpegts_starts_where_its_first_frame_is(tmp_path, codec):
    path = write_clip(tmp_path / "clip.ts", 60, 25, codec=codec, options={"bf": "2"})
    first = decode_everything(path)[0][0]
    assert first > 0
    assert numbers(path) == [24, 49]
    assert plan(path).sampled.timestamps.tolist() == [float(first), float(first) + 1]


@pytest.mark.parametrize(("codec", "options"), [("mpeg4", {"bf": "2"}), ("libx264", FAST)])
def test_avi_stores_decoding_times_only(tmp_path, codec, options):
    # ffmpeg adds a delay of one frame, and the rule counts in ffmpeg's times.
    path = write_clip(tmp_path / "clip.avi", 60, 25, codec=codec, options=options)
    assert [time for time, _ in decode_everything(path)][:3] == [Fraction(1, 25), Fraction(2, 25), Fraction(3, 25)]
    assert numbers(path) == [23, 48]


def test_avi_whose_packets_do_not_tell_their_times(tmp_path):
    path = write_clip(tmp_path / "clip.avi", 60, 24, codec="libx264", options={"preset": "medium"})
    with pytest.raises(UnexpectedFrameError, match=re.escape("video 0: frame 1 has time 3, its packet said 2.")):
        numbers(path)
    chosen = plan(path, by_decoding=True)
    # Two frames of delay; the frames come in order and none is lost.
    assert chosen.sampled.indices.tolist() == [21, 45]
    assert [read_number(picture) for picture in read_frames(chosen)] == [21, 45]


def test_raw_h264_has_no_times_at_all(tmp_path):
    path = write_clip(tmp_path / "clip.h264", 60, 25, container_format="h264", options=FAST)
    assert numbers(path) == [24, 49]


@pytest.mark.parametrize(
    ("options", "expected", "labels"),
    [
        ({"fps": 2}, [12, 24, 37, 49, 62, 74], [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]),
        ({"fps": 0.5}, [49], [0.0]),
        ({"fps": 25, "max_frames": 3}, [0, 39, 79], [0.0, 1.56, 3.16]),
        ({"start_time": 1.02}, [50, 75], [1.02, 2.02]),
        ({"start_time": 1, "end_time": 3}, [49, 74], [1.0, 2.0]),
        ({"end_time": 2.2, "fps": 2}, [12, 24, 37, 49], [0.0, 0.5, 1.0, 1.5]),
        ({"start_time": 2.0, "end_time": 2.5}, [55], [2.2]),
        ({"fps": 60, "start_time": 1, "end_time": 1.2}, [24, 25, 26, 27, 28, 29], [0.96, 1.0, 1.04, 1.08, 1.12, 1.16]),
    ],
)
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_rates_and_windows(tmp_path_factory, container, options, expected, labels):
    path = _shared_clip(tmp_path_factory, container)
    chosen = plan(path, **options)
    assert [read_number(picture) for picture in read_frames(chosen)] == expected
    assert chosen.sampled.timestamps.tolist() == pytest.approx(labels, abs=1e-12)


_CLIPS = {}


def _shared_clip(tmp_path_factory, container):
    if container not in _CLIPS:
        folder = tmp_path_factory.mktemp("clips")
        _CLIPS[container] = write_clip(folder / f"clip.{container}", 80, 25, options={"preset": "medium", "bf": "3"})
    return _CLIPS[container]


@pytest.mark.parametrize("container", ["mp4", "mov", "mkv", "ts"])
def test_a_video_that_does_not_start_at_zero(tmp_path, container):
    path = write_clip(tmp_path / f"clip.{container}", 80, 25, start=10, options=FAST)
    assert numbers(path) == numbers(path, start_time=0) == [24, 49, 74]
    assert plan(path).sampled.timestamps.tolist() == pytest.approx([0.4, 1.4, 2.4])
    # Frame k is at 0.4 + k / 25: the tick from 1.5 to 2.5 ends before frame 53 (2.52 s).
    assert numbers(path, start_time=1.5) == [52, 77]
    assert numbers(path, start_time=1.5, end_time=2.6) == [52]


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_variable_frame_rate(tmp_path, container):
    pts = [0, 1, 2, 3, 10, 11, 12, 40, 41, 42, 100, 101]
    path = write_clip(tmp_path / f"clip.{container}", 12, 25, pts=pts, time_base=Fraction(1, 25), options=FAST)
    assert numbers(path) == [6, 9, 9, 9]
    assert numbers(path, start_time=1.5, end_time=1.9) == [8]
    assert numbers(path, start_time=2, end_time=3) == [9]
    with pytest.raises(ValueError, match=re.escape("video 0: Expected a window inside the video, got start_time=4.5")):
        plan(path, start_time=4.5)


class _Pipe(io.RawIOBase):
    """A file that can only be written from front to back."""

    def __init__(self):
        self.data = b""

    def write(self, data):
        self.data += bytes(data)
        return len(data)

    def writable(self):
        return True


@pytest.mark.parametrize(
    ("container", "codec", "options"), [("matroska", "libx264", FAST), ("webm", "libvpx-vp9", VP9)]
)
def test_a_live_recording_has_no_duration(tmp_path, container, codec, options):
    path = tmp_path / "clip"
    pipe = _Pipe()
    with av.open(pipe, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 208, 96, "yuv420p"
        for i in range(60):
            frame = av.VideoFrame.from_ndarray(numbered_picture(i), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    path.write_bytes(pipe.data)
    with av.open(str(path)) as check:
        assert not check.duration
    assert numbers(str(path)) == [24, 49]
    assert numbers(str(path), start_time=1, end_time=2.4) == [49]
    assert numbers(str(path), start_time=1.2, end_time=1.6) == [34]


def test_fragmented_mp4(tmp_path):
    options = {"movflags": "frag_keyframe+empty_moov"}
    path = write_clip(tmp_path / "clip.mp4", 60, 25, options=FAST | {"g": "10"}, container_options=options)
    assert numbers(path) == [24, 49]


@pytest.mark.parametrize(
    ("codec", "container", "pix_fmt", "width", "height"),
    [
        ("libvpx-vp9", "webm", "yuv420p", 211, 97),
        ("libx264", "mp4", "yuv444p", 209, 99),
        ("libx264", "mp4", "yuv420p10le", 208, 96),
        ("libx265", "mp4", "yuv420p10le", 208, 96),
        ("libx264", "mp4", "yuv422p", 208, 96),
        ("libx264", "mp4", "yuvj420p", 208, 96),
        ("libx264", "mp4", "gray", 208, 96),
    ],
)
def test_pixel_formats_and_odd_sizes(tmp_path, codec, container, pix_fmt, width, height):
    options = {"libvpx-vp9": VP9, "libx264": FAST, "libx265": FAST | {"x265-params": "log-level=0"}}[codec]
    path = write_clip(
        tmp_path / f"c.{container}", 55, 25, codec=codec, pix_fmt=pix_fmt, width=width, height=height, options=options
    )
    chosen = plan(path)
    assert (chosen.height, chosen.width) == (height, width)
    pictures = list(read_frames(chosen))
    assert [picture.shape for picture in pictures] == [(height, width, 3)] * 2
    assert [picture.dtype for picture in pictures] == [np.uint8] * 2
    assert [read_number(picture) for picture in pictures] == [24, 49]
    assert np.array_equal(pictures[1], decode_everything(path)[49][1])


@pytest.mark.parametrize("color_range", [1, 2], ids=["limited", "full"])
def test_black_is_black_in_either_range(tmp_path, color_range):
    path = tmp_path / "clip.mp4"
    level = {0: (16, 0), 1: (235, 255)}  # black and white as luma, limited and full
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options=FAST | {"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.color_range = color_range
        for i in range(50):
            planes = np.full((48, 64), 128, dtype=np.uint8)
            planes[:32] = level[i >= 25][color_range - 1]
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base, frame.color_range = i, Fraction(1, 25), color_range
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    black, white = read_frames(plan(str(path)))
    assert (black.min(), black.max()) == (0, 0)
    assert (white.min(), white.max()) == (255, 255)


def test_a_rotated_clip_is_upright():
    path = str(GOLDEN / "media" / "o_rot90.mp4")
    chosen = plan(path)
    with av.open(path) as container:
        stored = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        container.seek(0)
        rotation = next(container.decode(video=0)).rotation
    assert abs(rotation) == 90
    assert (chosen.height, chosen.width) == (stored[0].shape[1], stored[0].shape[0])
    for picture, index in zip(read_frames(chosen), chosen.sampled.indices, strict=True):
        # The container's angle is counterclockwise, as numpy's.
        assert np.array_equal(picture, np.rot90(stored[index], rotation // 90))
        assert picture.flags["C_CONTIGUOUS"]


def test_gif_counts_as_25_pictures_per_second(tmp_path):
    path = write_clip(tmp_path / "clip.gif", 60, 10, codec="gif", pix_fmt="rgb8")
    chosen = plan(path)
    assert chosen.sampled.indices.tolist() == [12, 37]
    assert chosen.sampled.timestamps.tolist() == [0.48, 1.48]
    assert numbers(path) == [12, 37]
    # first = int(0.5 * 25) - 1 = 11, last = int(2 * 25) - 1 = 49, every 25th from the 12th
    assert numbers(path, start_time=0.5, end_time=2) == [23, 48]
    assert numbers(path, start_time=1) == [37]
    assert numbers(path, end_time=1) == [12]


def test_a_clip_of_half_a_second(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 13, 25, options=FAST)
    chosen = plan(path)
    assert [read_number(picture) for picture in read_frames(chosen)] == [6]
    assert chosen.sampled.timestamps.tolist() == [0.24]


def test_a_clip_of_one_frame(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 1, 25, options=FAST)
    assert numbers(path) == [0]


def _with_edit_list(path, target, seconds, skip_seconds=0):
    """A copy whose edit list shows only a part: what trimming without encoding anew leaves."""
    data = bytearray(Path(path).read_bytes())
    at = data.index(b"elst") + 12
    (media_time,) = struct.unpack(">I", data[at + 4 : at + 8])
    data[at : at + 8] = struct.pack(">II", int(seconds * 1000), media_time + int(skip_seconds * 12800))
    target.write_bytes(data)
    return str(target)


def test_an_mp4_trimmed_by_its_edit_list(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 100, 25, options={"preset": "medium", "g": "20"})
    ends_early = _with_edit_list(path, tmp_path / "end.mp4", 2)
    assert numbers(ends_early) == [24, 49]
    starts_late = _with_edit_list(path, tmp_path / "start.mp4", 2.5, skip_seconds=1)
    assert numbers(starts_late) == [49, 74]
    # Packets tell the truth, so nothing is decoded twice.
    assert not plan(ends_early).by_decoding
    assert not plan(starts_late).by_decoding


def test_every_file_form_gives_the_same_frames(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 55, 25, options=FAST)
    expected = list(read_frames(plan(path)))
    stream = io.BytesIO(Path(path).read_bytes())
    stream.seek(100)
    for picture, other in zip(read_frames(plan(stream)), expected, strict=True):
        assert np.array_equal(picture, other)


@pytest.mark.parametrize("name", ["12:30.mp4", "-dash.mp4", "x%03d.mp4", "ü #?.mp4", "no_ending", "wrong.avi"])
def test_odd_file_names(tmp_path, monkeypatch, name):
    write_clip(tmp_path / "clip.mp4", 30, 25, options=FAST)
    (tmp_path / "clip.mp4").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert numbers(name) == [24]


def test_repeated_frames_are_the_same_array(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 4, 2, options=FAST)
    pictures = list(read_frames(plan(path, fps=4)))
    assert [read_number(picture) for picture in pictures] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert pictures[0] is pictures[1]
    assert pictures[1] is not pictures[2]


def test_progress_counts_frames(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 80, 25, options=FAST)
    seen = []
    for _ in read_frames(plan(path), lambda done, total: seen.append((done, total))):
        pass
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_leaving_early_closes_the_file(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 80, 25, options=FAST)
    frames = read_frames(plan(path))
    assert read_number(next(frames)) == 24
    frames.close()
    (tmp_path / "clip.mp4").unlink()


def test_a_plan_whose_times_are_not_the_files_own(tmp_path):
    one = write_clip(tmp_path / "one.mkv", 80, 25, options=FAST)
    write_clip(tmp_path / "other.mkv", 60, 20, options=FAST)
    chosen = plan(one)
    (tmp_path / "other.mkv").replace(one)
    with pytest.raises(UnexpectedFrameError, match=r"video 0: frame 1 has time 50, its packet said 40\."):
        list(read_frames(chosen))


def test_metadata_of_the_file(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", 60, 24, start=12, options=FAST)
    chosen = plan(path)
    assert float(chosen.times.average_rate) == 24
    # mkv counts milliseconds: 60 frames of 41.67 ms.
    assert chosen.duration_seconds == pytest.approx(2.5, abs=0.002)


# Against the authors' loader: pixels by checksum.


def _videos_of_golden_cases():
    found = []
    for name in GOLDEN_CASES:
        record = json.loads((GOLDEN / "cases" / f"{name}.json").read_text())
        # Frames of a file named twice come from one reading over the union of the windows.
        found += [(name, i, video) for i, video in enumerate(record.get("videos", []))]
    # Ours starts this window at the right time: tests/processing/test_frame_sampling.py.
    return [item for item in found if item[0] != "video_d_trim3_6p5"]


@pytest.mark.parametrize(("case", "number", "video"), _videos_of_golden_cases(), ids=lambda value: str(value)[:30])
def test_golden_frames(case, number, video):
    options = dict(video["kwargs"])
    path = str(GOLDEN / options.pop("video_path"))
    chosen = plan(path, **options)
    assert chosen.sampled.indices.tolist() == video["source_index"]
    assert chosen.sampled.timestamps.tolist() == video["timestamps"]
    got = [hashlib.md5(picture.tobytes(), usedforsecurity=False).hexdigest() for picture in read_frames(chosen)]
    assert got == video["frame_md5"]
    assert [chosen.height, chosen.width] == video["shape"][1:]
