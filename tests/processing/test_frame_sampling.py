"""The sampling rule: against the authors' loader, against a slow reference, and by hand."""

import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.conftest import GOLDEN
from videollama3.processing.frame_sampling import FrameTimes, SampledFrames, as_rate, sample_frames
from videollama3.processing.video_reading import plan_video

OFFICIAL = json.loads((GOLDEN / "sampling_official.json").read_text())

# Where ours differs on purpose, with what it gives (see tests/golden/README.md for the authors' frames).
ON_PURPOSE = {
    # Windows of a file whose video starts at 2.36 s count from the time on the label, not from the file's start.
    ("d_vfr_start.mp4", (("end_time", 6.5), ("start_time", 3))): ([40, 65, 90], [3.0, 4.0, 5.0]),
    ("d_vfr_start.mp4", (("end_time", 12), ("start_time", 5))): (
        [90, 101, 105, 108, 112, 115, 117],
        [5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0],
    ),
    ("d_vfr_start.mkv", (("end_time", 12), ("start_time", 5))): (
        [90, 101, 105, 108, 112, 115, 117],
        [5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0],
    ),
    ("d_vfr_start.mp4", (("end_time", 8),)): (
        [24, 49, 74, 99, 102],
        [2.36, 3.36, 4.359999999999999, 5.359999999999999, 6.359999999999999],
    ),
    ("d_vfr_start.mp4", (("end_time", 8), ("start_time", 1))): (
        [24, 49, 74, 99, 102],
        [2.36, 3.36, 4.359999999999999, 5.359999999999999, 6.359999999999999],
    ),
    # A trim of mpegts works.
    ("i_ts.ts", (("end_time", 6), ("start_time", 3))): ([62, 87, 112], [3.0, 4.0, 5.0]),
    # A clip without one complete second shows its middle.
    ("e_short08.mp4", ()): ([10], [0.4]),
    # There is no `precise_time`: a window is always precise.
    ("a_testsrc2.mp4", (("end_time", 5.2), ("precise_time", True), ("start_time", 3.1))): ([102, 127], [3.1, 4.1]),
}


def _key(entry):
    return entry["file"], tuple(sorted(entry["kwargs"].items()))


@pytest.mark.parametrize("entry", OFFICIAL, ids=lambda entry: f"{entry['file']}-{entry['kwargs']}")
def test_official_sampling(entry):
    options = {"fps": 1, "max_frames": 180, **entry["kwargs"]}
    options.pop("precise_time", None)
    sampled = plan_video(str(GOLDEN / "media" / entry["file"]), name="video 0", **options).sampled
    indices, timestamps = ON_PURPOSE.get(_key(entry), (entry["index"], entry["timestamps"]))
    assert sampled.indices.tolist() == indices
    assert sampled.timestamps.tolist() == timestamps


def test_every_exception_is_in_the_official_list_and_differs_from_it():
    official = {_key(entry): (entry["index"], entry["timestamps"]) for entry in OFFICIAL}
    assert len(official) == 34
    assert set(ON_PURPOSE) <= set(official)
    assert [key for key, ours in ON_PURPOSE.items() if official[key] == ours] == []


def sampled(times, **options):
    result = sample_frames(times, **{"fps": 1, "max_frames": 180, **options})
    return result.indices.tolist(), result.timestamps.tolist()


def irregular(pts, end, time_base=Fraction(1, 100), rate=25, container_start_us=0, video_start_us=None):
    start = int(pts[0] * time_base * 1_000_000) if video_start_us is None else video_start_us
    return FrameTimes(
        pts=np.array(pts, dtype=np.int64),
        end=end,
        time_base=time_base,
        container_start_us=container_start_us,
        video_start_us=start,
        average_rate=Fraction(rate),
    )


def test_each_complete_second_shows_its_last_frame():
    assert sampled(FrameTimes.regular(90, 25)) == ([24, 49, 74], [0.0, 1.0, 2.0])


def test_an_incomplete_last_second_is_dropped():
    assert sampled(FrameTimes.regular(99, 25)) == ([24, 49, 74], [0.0, 1.0, 2.0])
    assert sampled(FrameTimes.regular(100, 25)) == ([24, 49, 74, 99], [0.0, 1.0, 2.0, 3.0])


def test_a_gap_repeats_the_frame_before():
    times = irregular([0, 50, 120, 450], end=500)
    assert sampled(times) == ([1, 2, 2, 2, 3], [0.0, 1.0, 2.0, 3.0, 4.0])


def test_a_video_that_begins_after_its_audio_shows_its_first_tick_before_too():
    times = irregular([150, 190, 250, 300, 350], end=400)
    assert sampled(times) == ([1, 1, 2, 4], [1.5, 2.5, 3.5, 4.5])


def test_the_cap_spreads_over_all_ticks():
    assert sampled(FrameTimes.regular(300, 25), max_frames=4) == ([24, 99, 199, 299], [0.0, 3.0, 7.0, 11.0])
    assert sampled(FrameTimes.regular(300, 25), max_frames=1) == ([24], [0.0])


def test_a_cap_bounds_memory_whatever_the_number_of_ticks():
    # 10^13 ticks, for a picture shown for two months, would take 80 TB.
    times = irregular([0, 500_000_000], end=1_000_000_000)
    indices, timestamps = sampled(times, fps=1_000_000, max_frames=3)
    assert indices == [0, 0, 1]
    assert timestamps == pytest.approx([0, 5e6, 1e7])


def test_windows():
    times = FrameTimes.regular(300, 25)
    assert sampled(times, start_time=10) == ([274, 299], [10.0, 11.0])
    assert sampled(times, end_time=2) == ([24, 49], [0.0, 1.0])
    assert sampled(times, start_time=0, end_time=99) == sampled(times)
    assert sampled(times, start_time=2.5, end_time=4) == ([87], [2.5])


def test_a_window_from_before_the_video_reaches_its_end():
    # The container's duration counts from the first frame (mpegts), so it must not end the window.
    times = irregular(range(40, 360, 4), end=360)
    assert sampled(times, start_time=0)[1] == sampled(times)[1] == [0.4, 1.4, 2.4]


def test_a_window_in_which_nothing_new_is_shown_keeps_the_frame_on_the_screen():
    slides = irregular([0, 4000, 10000], end=12000, rate=1)
    assert sampled(slides, start_time=50, end_time=53) == ([1, 1, 1], [50.0, 51.0, 52.0])
    assert sampled(slides, start_time=50, end_time=50.5) == ([1], [50.0])
    assert sampled(slides, start_time=110, end_time=112) == ([2, 2], [110.0, 111.0])


def test_a_window_without_a_complete_tick_shows_its_middle():
    times = FrameTimes.regular(300, 25)
    assert sampled(times, fps=0.25, start_time=2, end_time=4) == ([75], [3.0])
    assert sampled(times, start_time=11.5) == ([294], [11.76])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # first = int(3 * 25) - 1 = 74, last = int(3.5 * 25) - 1 = 86, 13 frames, the middle of 13
        ({"start_time": 3.0, "end_time": 3.5}, ([80], [3.2])),
        ({"start_time": 0, "end_time": 0.04}, ([0], [0.0])),
        # 24 frames, every 5th from the 2nd
        ({"start_time": 1.0, "end_time": 1.96, "fps": 5}, ([26, 31, 36, 41, 46], [1.04, 1.24, 1.44, 1.64, 1.84])),
        # 11.5 * 25 - 1 = 286 to the last frame, 299
        ({"start_time": 11.5, "end_time": 12.4}, ([293], [11.72])),
        ({"start_time": 1.0, "end_time": 1.96, "fps": 5, "max_frames": 2}, ([26, 46], [1.04, 1.84])),
    ],
)
def test_a_window_of_less_than_a_second_counts_frames(options, expected):
    assert sampled(FrameTimes.regular(300, 25), **options) == expected


def test_a_short_window_of_a_variable_rate_goes_by_time():
    # Counting at 25 frames per second would look for frame 36 and find no such frame.
    times = irregular([0, 4, 8, 12, 40, 44, 48, 160, 164, 168, 400, 404], end=408)
    assert sampled(times, start_time=1.5, end_time=1.9) == ([8], [1.6400000000000001])
    assert sampled(times, start_time=3.0, end_time=3.5) == ([9], [3.0])
    assert sampled(times, start_time=0.0, end_time=0.5, fps=4) == ([1, 5], [0.04, 0.44])


def test_counted_sources():
    pictures = FrameTimes.regular(12, 3)
    assert sampled(pictures, by_index=True) == ([1, 4, 7, 10], [1 / 3, 4 / 3, 7 / 3, 10 / 3])
    # first = int(1 * 3) - 1 = 2, last = int(3 * 3) - 1 = 8
    assert sampled(pictures, by_index=True, start_time=1, end_time=3) == ([3, 6], [1.0, 2.0])
    # One end alone does not move the grid, but drops frames.
    assert sampled(pictures, by_index=True, start_time=2) == ([7, 10], [7 / 3, 10 / 3])
    assert sampled(pictures, by_index=True, end_time=2) == ([1, 4], [1 / 3, 4 / 3])
    assert sampled(pictures, by_index=True, start_time=3.9) == ([10], [10 / 3])
    assert sampled(pictures, by_index=True, end_time=0.1) == ([1], [1 / 3])


def test_between_keeps_both_ends():
    frames = SampledFrames(np.array([3, 5, 7, 9]), np.array([0.0, 1.0, 2.0, 3.0]))
    assert frames.between(1.0, 2.0).indices.tolist() == [5, 7]
    assert frames.between(None, 0.5).indices.tolist() == [3]
    assert frames.between(2.5, None).timestamps.tolist() == [3.0]
    assert frames.between(4.0, None).indices.tolist() == []


@pytest.mark.parametrize(
    ("fps", "message"),
    [
        (math.nan, "Expected fps as a positive finite number (frames per second), got nan."),
        (math.inf, "Expected fps as a positive finite number (frames per second), got inf."),
        (0, "Expected fps as a positive finite number (frames per second), got 0."),
        (-2.5, "Expected fps as a positive finite number (frames per second), got -2.5."),
        ("2", "Expected fps as a positive number (frames per second), got '2'."),
        (True, "Expected fps as a positive number (frames per second), got True."),
        (None, "Expected fps as a positive number (frames per second), got None."),
        (1e-9, "Expected fps between 1e-05 and 1e+06 frames per second, got 1e-09."),
        (1e9, "Expected fps between 1e-05 and 1e+06 frames per second, got 1000000000.0."),
    ],
)
def test_fps_out_of_range(fps, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sampled(FrameTimes.regular(50, 25), fps=fps)


@pytest.mark.parametrize("max_frames", [0, -3, 2.5, True, None, "4"])
def test_max_frames_out_of_range(max_frames):
    message = f"Expected max_frames as a positive integer, got {max_frames!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sampled(FrameTimes.regular(50, 25), max_frames=max_frames)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ({"start_time": 3, "end_time": 2}, "Expected start_time < end_time, got 3 and 2 (seconds)."),
        ({"start_time": 3, "end_time": 3}, "Expected start_time < end_time, got 3 and 3 (seconds)."),
        ({"start_time": -1}, "Expected start_time in seconds, zero or more, got -1."),
        ({"end_time": -0.5}, "Expected end_time in seconds, zero or more, got -0.5."),
        ({"start_time": math.nan}, "Expected start_time in seconds, zero or more, got nan."),
        ({"end_time": math.inf}, "Expected end_time in seconds, zero or more, got inf."),
        ({"start_time": "1"}, "Expected start_time in seconds, zero or more, got '1'."),
        (
            {"start_time": 2},
            "Expected a window inside the video, got start_time=2, end_time=None for frames from 0.000 to 2.000 seconds.",
        ),
        (
            {"start_time": 7, "end_time": 9},
            "Expected a window inside the video, got start_time=7, end_time=9 for frames from 0.000 to 2.000 seconds.",
        ),
        (
            {"start_time": 2, "end_time": 2.5},
            "Expected a window inside the video, got start_time=2, end_time=2.5 for 50 frames at 25 per second, "
            "from 0.000 to 2.000 seconds.",
        ),
        (
            {"start_time": 2, "by_index": True},
            "Expected a window inside the video, got start_time=2, end_time=None for 50 frames at 25 per second, "
            "from 0.000 to 2.000 seconds.",
        ),
    ],
)
def test_windows_out_of_range(window, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sampled(FrameTimes.regular(50, 25), **window)


def test_a_window_before_the_video():
    late = irregular(range(150, 400, 4), end=400)
    message = "got start_time=0, end_time=1 for frames from 1.500 to 4.000 seconds"
    with pytest.raises(ValueError, match=re.escape(message)):
        sampled(late, start_time=0, end_time=1)
    with pytest.raises(ValueError, match=re.escape("got start_time=0, end_time=0.5 for 63 frames at 25 per second")):
        sampled(late, start_time=0, end_time=0.5)


def test_a_video_without_frames():
    with pytest.raises(ValueError, match=re.escape("Expected a video with at least one frame, got none.")):
        sampled(FrameTimes.regular(0, 25))


def test_rates_are_read_as_fractions():
    assert as_rate(29.97) == Fraction(2997, 100)
    assert as_rate(np.float32(0.5)) == Fraction(1, 2)
    assert as_rate(Fraction(30000, 1001)) == Fraction(30000, 1001)


# A slow reference, straight from the words of the rule, in exact fractions of a second.


def reference(pts, end, time_base, container_start, video_start, fps, max_frames, start, end_time):
    def ticks(seconds):
        exact = Fraction(seconds) / time_base
        return math.floor(abs(exact) + Fraction(1, 2)) * (1 if exact >= 0 else -1)

    trimmed = start is not None or end_time is not None
    begin = container_start if not trimmed else max(video_start, video_start if start is None else start)
    label = video_start if not trimmed else begin
    frames = [(i, p - ticks(begin)) for i, p in enumerate(pts)]
    end_of_file = end - ticks(begin)
    if trimmed:
        frames = [(i, rel) for i, rel in frames if rel >= 0]
    if end_time is not None:
        length = ticks(end_time - begin)
        beyond = [rel for _, rel in frames if rel >= frames[0][1] + length]
        end_of_file = beyond[0] if beyond else end_of_file
        frames = [(i, rel) for i, rel in frames if rel < frames[0][1] + length]
    chosen, labels = [], []
    n = 0
    while Fraction(n + 1) <= end_of_file * time_base * fps:
        shown = [i for i, rel in frames if math.floor(rel * time_base * fps) <= n]
        if not shown:
            first_slot = math.floor(frames[0][1] * time_base * fps)
            shown = [i for i, rel in frames if math.floor(rel * time_base * fps) <= first_slot]
        chosen.append(shown[-1])
        labels.append(label + Fraction(n) / fps)
        n += 1
    if len(chosen) > max_frames:
        pick = [int(x) for x in np.linspace(0, len(chosen) - 1, max_frames)]
        chosen, labels = [chosen[i] for i in pick], [labels[i] for i in pick]
    return chosen, labels


@st.composite
def cases(draw):
    time_base = draw(st.sampled_from([Fraction(1, 1000), Fraction(1, 90000), Fraction(1, 12800), Fraction(1, 25)]))
    unit = max(1, round(Fraction(1, 50) / time_base))
    gaps = draw(st.lists(st.integers(1, 60).map(lambda gap: gap * unit), min_size=1, max_size=40))
    first = draw(st.integers(0, 150)) * unit
    pts = np.cumsum([first, *gaps[:-1]]).tolist()
    audio_first = draw(st.booleans())
    fps = draw(st.sampled_from([Fraction(1), Fraction(2), Fraction(1, 2), Fraction(5, 2), Fraction(7)]))
    video_start = Fraction(math.floor(first * time_base * 1_000_000 + Fraction(1, 2)), 1_000_000)
    start = draw(st.none() | st.integers(0, 3000).map(lambda value: Fraction(value, 100)))
    span = draw(st.none() | st.integers(100, 2000).map(lambda value: Fraction(value, 100)))
    end_time = None if span is None else (start or 0) + span
    return {
        "pts": pts,
        "end": pts[-1] + gaps[-1],
        "time_base": time_base,
        "container_start": Fraction(0) if audio_first else video_start,
        "video_start": video_start,
        "fps": fps,
        "max_frames": draw(st.sampled_from([1, 2, 5, 180])),
        "start": start,
        "end_time": end_time,
    }


def _is_plain(case):
    """Whether the window holds a frame and a complete tick (else ours goes its own way, tested above)."""
    begin = case["video_start"]
    if case["start"] is not None:
        begin = max(begin, case["start"])
    window_end = math.inf if case["end_time"] is None else case["end_time"]
    return any(
        begin + case["time_base"] <= p * case["time_base"] < window_end - case["time_base"] for p in case["pts"]
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases())
def test_tick_rule_against_a_slow_reference(case):
    assume(_is_plain(case))
    start, end_time = (None if value is None else float(value) for value in (case["start"], case["end_time"]))
    # 2.51 - 1.51 is less than 1 in floats, and such a window counts frames, as with the authors.
    assume(start is None or end_time is None or end_time - start >= 1)
    chosen, labels = reference(**case)
    assume(chosen)
    times = FrameTimes(
        pts=np.array(case["pts"], dtype=np.int64),
        end=case["end"],
        time_base=case["time_base"],
        container_start_us=int(case["container_start"] * 1_000_000),
        video_start_us=int(case["video_start"] * 1_000_000),
        average_rate=Fraction(25),
    )
    got = sample_frames(times, fps=case["fps"], max_frames=case["max_frames"], start_time=start, end_time=end_time)
    assert got.indices.tolist() == chosen
    # Labels are the authors' float sums: worst seen 2e-14; a label off by a tick is off by 0.14 or more.
    assert np.allclose(got.timestamps, [float(label) for label in labels], rtol=0, atol=1e-10)
