"""Only what chosen frames need is decoded, and it gives the same pixels as decoding everything."""

import dataclasses

import av
import numpy as np
import pytest

from tests.media import numbered_picture, read_number, write_clip
from videollama3.processing import video_reading
from videollama3.processing.frame_decoding import (
    DecodingError,
    PacketTable,
    Span,
    _SpanFrames,
    decode_spans,
    plan_spans,
)
from videollama3.processing.video_file import Deadline
from videollama3.processing.video_reading import plan_video, read_frames


def table(pts, keyframes):
    pts = np.array(pts)
    return PacketTable(pts=pts, dts=np.arange(len(pts)), is_keyframe=np.isin(np.arange(len(pts)), keyframes))


def test_spans_by_hand():
    # I0 P3 B1 B2 | I4 P7 B5 B6 | I8
    packets = table([0, 3, 1, 2, 4, 7, 5, 6, 8], [0, 4, 8])
    assert plan_spans(packets, [2, 7]) == [Span(0, 3, frozenset({2})), Span(4, 5, frozenset({7}))]
    assert plan_spans(packets, [1, 7]) == [Span(0, 2, frozenset({1})), Span(4, 5, frozenset({7}))]
    assert plan_spans(packets, [1, 3]) == [Span(0, 2, frozenset({1, 3}))]  # the same group
    assert plan_spans(packets, [8]) == [Span(8, 8, frozenset({8}))]
    assert plan_spans(packets, [3, 4]) == [Span(0, 1, frozenset({3})), Span(4, 4, frozenset({4}))]


def test_a_frame_shown_before_the_keyframe_that_it_follows_needs_the_group_before():
    # Open group: I0 P2 B1 | I5 B3 B4 P6
    packets = table([0, 2, 1, 5, 3, 4, 6], [0, 3])
    assert plan_spans(packets, [4]) == [Span(0, 5, frozenset({4}))]
    assert plan_spans(packets, [6]) == [Span(3, 6, frozenset({6}))]


def test_a_stream_without_a_keyframe_starts_at_its_first_packet():
    assert plan_spans(table([0, 1, 2], []), [2]) == [Span(0, 2, frozenset({2}))]


CODECS = {
    "h264, long groups, B frames": ("mp4", "libx264", {"g": "40", "bf": "3", "b-pyramid": "normal"}),
    "h264, open groups": ("mkv", "libx264", {"g": "20", "bf": "3", "x264-params": "open-gop=1"}),
    "h264, periodic intra refresh": ("mp4", "libx264", {"g": "30", "x264-params": "intra-refresh=1"}),
    "h264, interlaced": ("mp4", "libx264", {"g": "20", "flags": "+ildct+ilme"}),
    "h264 in mpegts": ("ts", "libx264", {"g": "20", "bf": "2"}),
    "hevc, open groups": ("mp4", "libx265", {"x265-params": "keyint=20:open-gop=1:bframes=4:log-level=none"}),
    "hevc, temporal layers": (
        "mp4",
        "libx265",
        {"x265-params": "keyint=40:bframes=7:b-pyramid=1:temporal-layers=3:log-level=none"},
    ),
    "mpeg4, B frames": ("mp4", "mpeg4", {"g": "20", "bf": "2"}),
    "mpeg2": ("mkv", "mpeg2video", {"g": "15", "bf": "2"}),
    "vp9": ("webm", "libvpx-vp9", {"g": "30", "deadline": "realtime", "auto-alt-ref": "0", "lag-in-frames": "0"}),
    "vp8": ("webm", "libvpx", {"g": "30", "deadline": "realtime"}),
    "av1": ("mp4", "libsvtav1", {"g": "30", "preset": "8", "svtav1-params": "lp=1"}),
}


@pytest.mark.parametrize("case", CODECS)
@pytest.mark.parametrize(("fps", "options"), [(0.5, {}), (3, {}), (1, {"start_time": 4.2}), (5, {"max_frames": 4})])
def test_pixels_equal_decoding_everything(case, fps, options, tmp_path_factory):
    suffix, codec, encoding = CODECS[case]
    path = tmp_path_factory.getbasetemp() / f"{abs(hash(case))}.{suffix}"
    if not path.exists():
        pictures = [numbered_picture(i, 96, 208) for i in range(160)]
        part = path.with_stem("part")
        write_clip(part, 160, 25, codec=codec, options={"crf": "24", **encoding}, pictures=pictures)
        part.rename(path)
    plan = plan_video(str(path), name="video 0", **{"fps": fps, "max_frames": 180, **options})
    with av.open(str(path)) as container:
        everything = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    got = list(read_frames(plan))
    for picture, index in zip(got, plan.sampled.indices, strict=True):
        assert np.array_equal(picture, everything[index]), index
        assert read_number(picture) == index


def test_few_frames_are_decoded(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", 500, 25, options={"g": "50", "preset": "ultrafast"})
    plan = plan_video(path, name="video 0", fps=0.1, max_frames=180)
    assert plan.sampled.indices.tolist() == [249, 499]
    spans = plan_spans(plan.packets, plan.times.pts[plan.sampled.indices].tolist())
    assert [(span.first, span.last) for span in spans] == [(200, 249), (450, 499)]
    monkeypatch.setattr(video_reading, "_decode_linearly", None)  # nothing else is needed
    assert [read_number(picture) for picture in read_frames(plan)] == [249, 499]


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_decoding_starts_at_idr_frames_only(tmp_path, suffix):
    options = {"g": "30", "preset": "ultrafast"}
    closed = write_clip(tmp_path / f"closed.{suffix}", 90, 25, options=options)
    plan = plan_video(closed, name="video 0", fps=1, max_frames=9)
    assert np.flatnonzero(plan.packets.is_keyframe).tolist() == [0, 30, 60]
    refreshed = write_clip(
        tmp_path / f"refresh.{suffix}", 90, 25, options={**options, "x264-params": "intra-refresh=1"}
    )
    plan = plan_video(refreshed, name="video 0", fps=1, max_frames=9)
    assert np.flatnonzero(plan.packets.is_keyframe).tolist() == [0]


def test_broken_seeking_falls_back_to_decoding_from_the_start(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", 500, 25, options={"g": "50", "preset": "ultrafast"})
    plan = plan_video(path, name="video 0", fps=0.1, max_frames=180)

    class Elsewhere:
        """A container whose seeking lands too late, as in files with a wrong index."""

        def __init__(self, container):
            self.container = container

        def demux(self, stream):
            return self.container.demux(stream)

        def seek(self, offset, **options):
            self.container.seek(offset + 10**6, **options)

    packets = plan.packets
    spans = plan_spans(packets, plan.times.pts[plan.sampled.indices].tolist())
    with av.open(path) as container, pytest.raises(DecodingError, match=r"packet \d+ came where packet 200|not there"):
        list(
            decode_spans(
                Elsewhere(container), container.streams.video[0], packets, spans, deadline=Deadline(60, "video 0")
            )
        )

    def broken(container, stream, table, spans, deadline):
        for frame in decode_spans(container, stream, table, spans, deadline=deadline):
            if frame.pts == plan.times.pts[499]:
                raise DecodingError("as if the second seek had gone wrong")
            yield frame

    monkeypatch.setattr(video_reading, "decode_spans", broken)
    assert [read_number(picture) for picture in read_frames(plan)] == [249, 499]


@dataclasses.dataclass
class Shown:
    """What is looked at of a decoded frame."""

    pts: int | None
    is_corrupt: bool = False
    key_frame: bool = False


def test_a_frame_waits_for_what_it_may_refer_to():
    # I0 P8 B4 B2: 2 comes out first, and is right only if 4 and 8 are.
    frames = _SpanFrames(table([0, 8, 4, 2], [0]), Span(0, 3, frozenset({0, 2})))
    frames.add([Shown(0, key_frame=True)])
    assert [frame.pts for frame in frames.ready()] == [0]
    frames.add([Shown(2), Shown(4)])
    assert list(frames.ready()) == []
    with pytest.raises(DecodingError, match=r"^the frame at 8 came out damaged$"):
        frames.add([Shown(8, is_corrupt=True)])
    assert list(frames.ready()) == []


def test_frames_that_wait_come_at_the_end():
    frames = _SpanFrames(table([0, 8, 4, 2], [0]), Span(0, 3, frozenset({2, 8})))
    frames.add([Shown(0), Shown(2), Shown(8)])  # 4 was not asked for
    assert [frame.pts for frame in frames.ready()] == [2, 8]
    frames = _SpanFrames(table([0, 8, 4, 2], [0]), Span(0, 3, frozenset({2, 8})))
    frames.add([Shown(0), Shown(2)])
    with pytest.raises(DecodingError, match=r"^the frame at 8 did not come out of its group of pictures$"):
        list(frames.all())


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ([Shown(4), Shown(2)], "a frame of time 2 came after one of time 4"),
        ([Shown(None)], "a frame of time None came after one of time -inf"),
        ([Shown(3, is_corrupt=True)], "the frame at 3 came out damaged"),
        ([Shown(5, key_frame=False)], "the frame at 5 is no keyframe"),
    ],
)
def test_frames_that_a_span_cannot_give(shown, message):
    packets = table([0, 2, 1, 5, 7, 6], [0, 3])
    with pytest.raises(DecodingError, match=f"^{message}$"):
        _SpanFrames(packets, Span(3, 5, frozenset({6}))).add(shown)


def test_a_container_that_calls_another_frame_a_keyframe(tmp_path):
    """Decoding does not begin there; the frames are right all the same."""
    pictures = [numbered_picture(i) for i in range(60)]
    path = write_clip(tmp_path / "clip.mp4", 60, 25, codec="mpeg4", pictures=pictures, options={"g": "40", "bf": "0"})
    plan = plan_video(path, name="video 0", fps=25, max_frames=60, start_time=1, end_time=2)
    is_keyframe = plan.packets.is_keyframe.copy()
    is_keyframe[20] = True
    lying = dataclasses.replace(plan, packets=dataclasses.replace(plan.packets, is_keyframe=is_keyframe))
    for picture, other in zip(read_frames(lying), read_frames(plan), strict=True):
        assert np.array_equal(picture, other)
