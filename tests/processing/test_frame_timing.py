"""Frame times from packets equal those from decoded frames, and packets that cannot tell are not believed."""

from fractions import Fraction

import numpy as np
import pytest

from tests.media import write_clip
from videollama3.processing.frame_timing import _BestEffortTime, _groups_follow, times_by_decoding, times_by_demuxing
from videollama3.processing.video_file import Deadline, ReadingLimits, open_video

DEADLINE = Deadline(3600, "video 0")
NTSC = Fraction(30000, 1001)


def both(path):
    """Times by demuxing (None where they cannot be trusted) and by decoding."""
    with open_video(path, name="video 0", limits=ReadingLimits()) as (container, stream):
        demuxed = times_by_demuxing(container, stream, name="video 0", deadline=DEADLINE)
    with open_video(path, name="video 0", limits=ReadingLimits()) as (container, stream):
        return demuxed, times_by_decoding(container, stream, name="video 0", deadline=DEADLINE)


@pytest.mark.parametrize(
    ("suffix", "codec", "rate", "options"),
    [
        ("mp4", "libx264", 25, {"bf": "3", "g": "12"}),
        ("mp4", "libx264", NTSC, {"x264-params": "open-gop=1:keyint=10:bframes=3"}),
        ("mkv", "libx264", NTSC, {"bf": "2"}),
        ("ts", "libx264", 50, {"bf": "2", "g": "12"}),
        ("ts", "mpeg2video", 25, {"bf": "2"}),
        ("webm", "libvpx-vp9", 10, {"deadline": "realtime", "cpu-used": "8"}),
        ("mp4", "libx265", 25, {"x265-params": "keyint=10:open-gop=1:bframes=4:log-level=none"}),
        ("avi", "mpeg4", 25, {}),
    ],
)
def test_both_ways_agree(tmp_path, suffix, codec, rate, options):
    path = write_clip(tmp_path / f"clip.{suffix}", 45, rate, codec=codec, options=options, start=3)
    (times, packets), decoded = both(path)
    assert times.pts.tolist() == decoded.pts.tolist()
    assert len(times.pts) == 45
    assert times.time_base == decoded.time_base
    assert (times.video_start_us, times.container_start_us) == (decoded.video_start_us, decoded.container_start_us)
    assert times.average_rate == decoded.average_rate
    # The last frame's end: stored by mp4, else one period.
    period = 1 / (Fraction(rate).limit_denominator(1001) * times.time_base)
    assert times.end - times.pts[-1] == pytest.approx(float(period), abs=1)
    assert sorted(packets.pts.tolist()) == times.pts.tolist()
    assert packets.is_keyframe[0]


def test_packets_without_times_are_not_believed(tmp_path):
    demuxed, decoded = both(write_clip(tmp_path / "clip.h264", 30, 25, codec="libx264", options={"bf": "0"}))
    assert demuxed is None
    # Counted at the rate that the stream states.
    assert np.diff(decoded.pts * decoded.time_base).tolist() == [Fraction(1, 25)] * 29


def rows(groups):
    """Columns of packets: groups of presentation times, the first of each a keyframe."""
    return np.array([(pts, 0, i == 0, 1, 1) for group in groups for i, pts in enumerate(group)], dtype=np.int64)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([[0, 3, 1, 2], [4, 7, 5, 6]], True),
        ([[0, 2, 1], [5, 3, 4, 6]], True),  # open group: 3 and 4 are shown before their keyframe
        ([[0, 2, 1], [5, 1, 4, 6]], True),
        ([[2, 1, 3], [5, 1, 4, 6]], False),  # shown before the keyframe before
        ([[0, 5, 1], [4, 6]], False),  # shown after the next keyframe
        ([[0, 1], [9, 10], [4, 5]], False),  # groups in another order
    ],
)
def test_groups_are_stored_in_the_order_in_which_they_are_shown(groups, expected):
    assert _groups_follow(rows(groups)) is expected


def test_packets_before_the_first_keyframe_are_a_group_too():
    columns = rows([[0, 1, 2], [5, 4, 6]])
    columns[0, 2] = 0
    assert _groups_follow(columns)
    columns[1, 0] = 6
    assert not _groups_follow(columns)
    columns[:, 2] = 0
    assert _groups_follow(columns)


def test_ffmpegs_choice_between_the_two_times():
    guess = _BestEffortTime()
    assert [guess.next(pts, dts) for pts, dts in [(0, 0), (3, 1), (6, 2)]] == [0, 3, 6]
    # Presentation times that run back and forth lose against decoding times that do not.
    guess = _BestEffortTime()
    assert [guess.next(pts, dts) for pts, dts in [(2, 0), (1, 1), (4, 2), (3, 3)]] == [2, 1, 2, 3]
    guess = _BestEffortTime()
    assert [guess.next(None, 5), guess.next(7, None), guess.next(None, None)] == [5, 7, None]
