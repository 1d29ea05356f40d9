"""Every form of a video brought to one plan, and what is said about those that are none."""

import base64
import functools
import http.server
import io
import re
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from tests.media import numbered_picture, read_number, write_clip
from videollama3.processing.media_requests import PixelSettings, encode_request, estimate_request
from videollama3.processing.planned_media import (
    SampledVideoMetadata,
    VideoOptions,
    is_frame,
    is_frame_list,
    plan_image,
    plan_videos,
)

FAST = {"preset": "ultrafast"}
SETTINGS = PixelSettings(
    patch_size=14,
    merge_size=2,
    min_tokens=1,
    max_tokens=16384,
    do_resize=True,
    resample=3,
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    use_token_compression=True,
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """60 numbered frames, 25 per second."""
    return Path(write_clip(tmp_path_factory.mktemp("media") / "clip.mp4", 60, 25, options=FAST))


def options(**given):
    return VideoOptions(**{"fps": 1, "max_frames": 180, "fps_given": "fps" in given, **given})


def plan(source, name="video 0", **given):
    (planned,) = plan_videos([source], [options(**given)], [name])
    return planned


def numbers(planned):
    return [read_number(picture) for picture in planned.pictures(None, None)]


def numbered(count):
    return np.stack([numbered_picture(i) for i in range(count)])


@pytest.mark.parametrize(
    "form",
    [
        str,
        lambda path: path,
        lambda path: path.read_bytes(),
        lambda path: io.BytesIO(path.read_bytes()),
        lambda path: path.as_uri(),
        lambda path: "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode(),
    ],
    ids=["str", "path", "bytes", "bytesio", "file-url", "data-url"],
)
def test_forms_of_a_file(clip, form):
    planned = plan(form(clip))
    assert (planned.kind, planned.num_frames, planned.height, planned.width) == ("video", 2, 96, 208)
    assert planned.timestamps.tolist() == [0.0, 1.0]
    assert numbers(planned) == [24, 49]
    # A plan may be read again.
    assert numbers(planned) == [24, 49]


def test_an_open_file(clip):
    with clip.open("rb") as file:
        assert numbers(plan(file)) == [24, 49]


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_http(clip):
    handler = functools.partial(_QuietHandler, directory=str(clip.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            assert numbers(plan(f"{url}/clip.mp4")) == [24, 49]
            with pytest.raises(
                FileNotFoundError, match=r"Expected video 0 at a URL that answers, got '.*/none.mp4': 404"
            ):
                plan(f"{url}/none.mp4")
        finally:
            server.shutdown()
            thread.join()


def test_metadata_of_a_file(clip):
    metadata = plan(clip).metadata
    assert isinstance(metadata, VideoMetadata)
    assert (metadata.total_num_frames, metadata.fps, metadata.width, metadata.height) == (60, 25.0, 208, 96)
    assert metadata.duration == pytest.approx(2.4)
    assert metadata.frames_indices == [24, 49]
    assert metadata.timestamps == [0.0, 1.0]
    assert metadata.video_backend == "pyav"


IN_MEMORY = {
    "numpy": numbered,
    "numpy channels first": lambda count: numbered(count).transpose(0, 3, 1, 2),
    "torch": lambda count: torch.from_numpy(numbered(count)).permute(0, 3, 1, 2),
    "torch float": lambda count: torch.from_numpy(numbered(count)).permute(0, 3, 1, 2) / 255,
    "list of numpy": lambda count: list(numbered(count)),
    "tuple of PIL": lambda count: tuple(Image.fromarray(picture) for picture in numbered(count)),
    "list of torch": lambda count: list(torch.from_numpy(numbered(count)).permute(0, 3, 1, 2)),
}


@pytest.mark.parametrize("form", IN_MEMORY)
def test_frames_in_memory_are_taken_as_sampled(form):
    planned = plan(IN_MEMORY[form](5))
    assert (planned.num_frames, planned.height, planned.width) == (5, 96, 208)
    assert planned.timestamps.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert numbers(planned) == [0, 1, 2, 3, 4]
    assert planned.metadata.video_backend == "frames"


def test_labels_of_frames_in_memory():
    frames = numbered(4)
    assert plan(frames, fps=2).timestamps.tolist() == [0.0, 0.5, 1.0, 1.5]
    assert plan(frames, timestamps=[0.5, 3, 3.25, 9]).timestamps.tolist() == [0.5, 3.0, 3.25, 9.0]
    assert plan(frames, timestamps=np.array([1, 2, 3, 4])).timestamps.tolist() == [1.0, 2.0, 3.0, 4.0]
    by_index = VideoMetadata(total_num_frames=100, fps=10, frames_indices=[9, 19, 29, 99])
    assert plan(frames, metadata=by_index).timestamps.tolist() == [0.9, 1.9, 2.9, 9.9]
    by_label = SampledVideoMetadata(
        total_num_frames=100, fps=10, frames_indices=[9, 19, 29, 99], timestamps_seconds=[0.0, 1.0, 2.0, 9.0]
    )
    assert plan(frames, metadata=by_label).timestamps.tolist() == [0.0, 1.0, 2.0, 9.0]


def test_windows_and_caps_of_frames_in_memory():
    frames = numbered(10)
    assert numbers(plan(frames, start_time=2, end_time=5)) == [2, 3, 4, 5]
    assert numbers(plan(frames, fps=2, start_time=2)) == [4, 5, 6, 7, 8, 9]
    assert numbers(plan(frames, max_frames=4)) == [0, 3, 6, 9]
    assert numbers(plan(frames, max_frames=2, end_time=4)) == [0, 4]


def test_frames_in_memory_sampled_by_their_own_rate():
    planned = plan(numbered(50), metadata={"fps": 20}, do_sample_frames=True)
    assert numbers(planned) == [19, 39]
    assert planned.timestamps.tolist() == [0.0, 1.0]
    assert numbers(plan(numbered(50), metadata={"fps": 20}, do_sample_frames=True, fps=2)) == [9, 19, 29, 39, 49]


@pytest.fixture
def folder(tmp_path):
    """12 numbered pictures whose names have no leading zeros, and a file that is none."""
    for i in range(12):
        Image.fromarray(numbered_picture(i)).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("hello")
    return tmp_path


def test_a_folder_of_pictures_counts_as_three_per_second(folder):
    for source in (folder, str(folder)):
        planned = plan(source)
        assert numbers(planned) == [1, 4, 7, 10]
        assert planned.timestamps.tolist() == [1 / 3, 4 / 3, 7 / 3, 10 / 3]
    assert numbers(plan(folder, fps=3)) == list(range(12))
    assert numbers(plan(folder, max_frames=2)) == [0, 11]


def test_windows_of_a_folder(folder):
    # first = int(1 * 3) - 1 = 2, last = int(3 * 3) - 1 = 8
    assert numbers(plan(folder, start_time=1, end_time=3)) == [3, 6]
    assert numbers(plan(folder, start_time=2)) == [7, 10]
    assert numbers(plan(folder, end_time=2)) == [1, 4]
    with pytest.raises(ValueError, match=r"got start_time=4, end_time=None for 12 frames at 3 per second"):
        plan(folder, start_time=4)


def test_a_folder_with_timestamps(folder):
    planned = plan(folder, timestamps=[i * 0.5 for i in range(12)], end_time=1)
    assert numbers(planned) == [0, 1, 2]
    assert planned.timestamps.tolist() == [0.0, 0.5, 1.0]


def test_a_list_of_picture_files(folder):
    planned = plan([str(folder / "frame3.png"), folder / "frame1.png"], fps=4)
    assert numbers(planned) == [3, 1]
    assert planned.timestamps.tolist() == [0.0, 0.25]


def test_gif(tmp_path):
    path = write_clip(tmp_path / "clip.gif", 60, 10, codec="gif", pix_fmt="rgb8")
    assert numbers(plan(path)) == [12, 37]
    assert numbers(plan(path, start_time=1)) == [37]
    with pytest.raises(
        ValueError, match=r"video 0: Expected a window inside the video, got start_time=50, end_time=None"
    ):
        plan(path, start_time=50)


def test_a_window_keeps_the_frames_whose_labels_lie_in_it(clip):
    assert plan(clip, start_time=0.4).timestamps.tolist() == [0.4, 1.4]
    assert plan(clip, end_time=2).timestamps.tolist() == [0.0, 1.0]
    # Nothing is labelled inside this window; it still shows something.
    assert numbers(plan(clip, start_time=1.0, end_time=1.03)) == [24]


@pytest.mark.parametrize("form", [str, Path])
def test_a_file_named_twice_is_sampled_once_over_both_windows(clip, form):
    windows = [options(start_time=0, end_time=1), options(start_time=0.6, end_time=2.4)]
    first, second = plan_videos([form(clip)] * 2, windows, ["video 0", "video 1"])
    # One grid from 0 s: the second window takes its labels, and does not start a grid at 0.6 s.
    assert first.timestamps.tolist() == [0.0, 1.0]
    assert second.timestamps.tolist() == [1.0]
    assert numbers(second) == [49]
    apart = [windows[0], options(start_time=0.6, end_time=2.4, fps=2)]
    assert plan_videos([form(clip)] * 2, apart, ["video 0", "video 1"])[1].timestamps.tolist() == pytest.approx(
        [0.6, 1.1, 1.6]
    )


def test_a_second_window_between_the_shared_labels_is_sampled_alone(clip):
    windows = [options(start_time=0, end_time=1), options(start_time=0.2, end_time=0.7)]
    _, second = plan_videos([str(clip)] * 2, windows, ["video 0", "video 1"])
    assert len(numbers(second)) == 1
    assert 0.2 <= second.timestamps[0] <= 0.7


def test_frames_with_timestamps_named_twice(folder):
    labels = np.arange(12) * 0.5
    one, two = plan_videos([str(folder)] * 2, [options(timestamps=labels), options(timestamps=labels + 1)], ["a", "b"])
    assert (one.timestamps[0], two.timestamps[0]) == (0.0, 1.0)


def test_images():
    planned = plan_image(numbered_picture(9), name="image 0")
    assert (planned.kind, planned.num_frames, planned.height, planned.width) == ("image", 1, 96, 208)
    assert planned.timestamps is None
    assert numbers(planned) == [9]


def test_what_is_a_frame():
    picture = numbered_picture(0)
    assert is_frame(picture)
    assert is_frame(Image.fromarray(picture))
    assert is_frame(torch.zeros(4, 5))
    assert not is_frame(picture[None])
    assert not is_frame("a.png")
    assert is_frame_list([picture, picture])
    assert is_frame_list(["a.png", "b.JPG"])
    assert not is_frame_list(["a.png"])
    assert not is_frame_list(["a.png", "b.mp4"])
    assert not is_frame_list([])
    assert not is_frame_list(picture)


# Bad input: one exception of a fitting type, that names the item, what was expected and what came.


def write_audio(path, codec):
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=16000)
        stream.layout = "mono"
        data, sample_format = (np.float32, "fltp") if codec == "aac" else (np.int16, "s16")
        for i in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=data), format=sample_format, layout="mono")
            frame.sample_rate, frame.pts = 16000, i * 1024
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


@pytest.mark.parametrize(("name", "codec"), [("a.wav", "pcm_s16le"), ("a.mkv", "aac"), ("a.m4a", "aac")])
def test_audio_only(tmp_path, name, codec):
    path = write_audio(tmp_path / name, codec)
    message = f"Expected video 3 with a video stream, got {str(path)!r}, which has audio only."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan(path, name="video 3")


def test_a_cover_picture_is_no_video(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as output:
        audio = output.add_stream("aac", rate=16000)
        audio.layout = "mono"
        cover = output.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        picture.pts = 0
        output.mux([*audio.encode(frame), *audio.encode(), *cover.encode(picture), *cover.encode()])
    with pytest.raises(
        ValueError, match=r"with a video stream, got '.*a\.mp4', which has audio and a cover picture only\.$"
    ):
        plan(path)


def test_a_clip_without_frames(tmp_path):
    path = tmp_path / "none.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        output.start_encoding()
    with pytest.raises(
        ValueError, match=r"^Expected video 0 with (a video stream, got .*|at least one frame, got none\.)$"
    ):
        plan(path)


def test_a_clip_of_half_a_second(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 13, 25, options=FAST)
    assert numbers(plan(path)) == [6]


@pytest.mark.parametrize("in_memory", [False, True])
def test_an_mp4_without_its_end(clip, tmp_path, in_memory):
    data = clip.read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: len(data) * 2 // 3])
    source = path.read_bytes() if in_memory else path
    shown = "<BytesIO>" if in_memory else re.escape(str(path))
    message = f"^Expected video 0 as a whole video file, got '{shown}', which could not be opened: Invalid data found"
    with pytest.raises(ValueError, match=message):
        plan(source)


@pytest.mark.parametrize("b_frames", [0, 3])
def test_a_faststart_mp4_cut_anywhere(tmp_path, b_frames):
    path = write_clip(
        tmp_path / "clip.mp4",
        60,
        25,
        options=FAST | {"bf": str(b_frames)},
        container_options={"movflags": "faststart"},
    )
    data = Path(path).read_bytes()
    with av.open(path) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    between = packets[30][0]
    for length in (len(data) // 2, len(data) * 9 // 10, between, between + 1, len(data) - 1):
        whole = sum(position + size <= length for position, size in packets)
        message = f"Expected video 0 as a whole video file, got {whole} of the 60 frames that it announces: the file is truncated."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            plan(data[:length])


def test_a_fragmented_mp4_cut_inside_a_frame(tmp_path):
    flags = {"movflags": "frag_keyframe+empty_moov"}
    path = write_clip(tmp_path / "clip.mp4", 60, 25, options=FAST | {"g": "10"}, container_options=flags)
    data = Path(path).read_bytes()
    with pytest.raises(ValueError, match=r"Expected video 0 as a whole video file, got .* the file is truncated"):
        plan(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("no/such.mp4", FileNotFoundError, "Expected video 7 at an existing path, got 'no/such.mp4': no such file."),
        (b"", ValueError, "Expected video 7 with content, got <BytesIO>: it is empty."),
        (
            b"hello world" * 99,
            ValueError,
            "Expected video 7 as a whole video file, got '<BytesIO>', which could not be opened: ",
        ),
        (17, TypeError, "Expected video 7 as a path, URL, bytes or binary file object, got int: 17."),
        ([], ValueError, "Expected video 7 with at least one frame, got an empty list."),
        ([1, 2], TypeError, "Expected video 7 as a list of pictures (PIL, array, tensor or path), got [1, 2]."),
        (
            np.zeros((4, 5, 3)),
            ValueError,
            "Expected video 7 as (frames, height, width, channels) or (frames, channels, height, width) with at least one "
            "frame, got shape (4, 5, 3).",
        ),
        (
            np.zeros((0, 4, 5, 3)),
            ValueError,
            "Expected video 7 as (frames, height, width, channels) or (frames, channels, height, width) with at least one "
            "frame, got shape (0, 4, 5, 3).",
        ),
        (
            np.zeros((2, 6, 5, 2)),
            ValueError,
            "Expected frame 0 of video 7 with 1, 3 or 4 channels first or last, got shape (6, 5, 2).",
        ),
        (
            torch.full((2, 3, 4, 5), 200.0),
            ValueError,
            "Expected frame 0 of video 7 as uint8 0..255 or float 0..1, got float32 from 200 to 200.",
        ),
        (
            ["a.png", "no.png"],
            FileNotFoundError,
            "Expected frame 0 of video 7 at an existing path, got 'a.png': no such file.",
        ),
    ],
)
def test_sources_that_are_no_video(source, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        plan(source, name="video 7")


def test_files_and_folders_that_are_no_video(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "notes.txt").write_text("hello\n" * 2000)
    with pytest.raises(ValueError, match=r"^Expected video 0 with content, got '.*empty\.mp4': the file is empty\.$"):
        plan(tmp_path / "empty.mp4")
    with pytest.raises(ValueError, match=r"^Expected video 0 as a video file, got '.*notes\.txt', which is text\.$"):
        plan(tmp_path / "notes.txt")
    with pytest.raises(
        ValueError, match=r"^Expected video 0 as a folder with pictures \(\.png, .*\), got '.*' with none\.$"
    ):
        plan(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"timestamps": [1, 2]}, "Expected one timestamp for each of the 3 frames of video 0, got 2."),
        ({"timestamps": [1, 2, np.nan]}, "Expected finite timestamps in seconds for video 0, got [1.0, 2.0, nan]."),
        ({"timestamps": [1, None, 3]}, "Expected timestamps in seconds for video 0, got [1, None, 3]."),
        (
            {"start_time": 9},
            "Expected a window with frames of video 0, got start_time=9, end_time=None for frames from 0 to 2 seconds.",
        ),
        ({"start_time": 2, "end_time": 1}, "Expected start_time < end_time, got 2 and 1 (seconds)."),
        ({"max_frames": 0}, "Expected max_frames as a positive integer, got 0."),
        ({"fps": 0}, "Expected fps as a positive finite number (frames per second), got 0."),
        (
            {"do_sample_frames": True},
            "Expected video_metadata with the fps of video 0 to sample its frames, got none.",
        ),
    ],
)
def test_options_that_do_not_fit_frames(given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan(numbered(3), **given)


@pytest.mark.parametrize("given", [{"timestamps": [1, 2]}, {"metadata": {"fps": 3}}])
def test_labels_for_a_file(clip, given):
    message = f"Expected timestamps or video_metadata only with frames, got them with the file {str(clip)!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan(clip, **given)


# Requests: plans to tensors.


def encode(items, settings=SETTINGS, **given):
    return encode_request(items, image=settings, video=settings, **given)


def test_a_file_whose_packets_lie_is_read_by_decoding(tmp_path):
    path = write_clip(tmp_path / "clip.avi", 60, 24, codec="libx264", options={"preset": "medium"})
    planned = plan(path)
    (encoded,) = encode([planned], pixel_dtype="uint8")
    assert encoded.metadata.frames_indices == [21, 45]
    assert encoded.grid_thw[0] == 2


def test_progress_of_a_request(clip):
    seen = []
    encode([plan(clip), plan(numbered(3))], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_limits_of_a_request_and_of_one_video(clip):
    free = encode([plan(clip), plan(numbered(3))])
    assert [item.grid_thw for item in free] == [(2, 6, 14), (3, 6, 14)]
    bound = encode([plan(clip), plan(numbered(3))], max_visual_tokens=50)
    assert sum(len(item.keep) for item in bound) <= 50
    one = encode([plan(clip, max_visual_tokens=8), plan(numbered(3))])
    assert len(one[0].keep) <= 8
    assert one[1].grid_thw == (3, 6, 14)


def test_limits_hold_or_raise_without_resizing():
    fixed = PixelSettings(**{**vars(SETTINGS), "do_resize": False})
    frames = np.zeros((3, 56, 84, 3), dtype=np.uint8)
    (item,) = estimate_request([plan(frames)], image=fixed, video=fixed, max_visual_tokens=18).items
    assert (item.height, item.width, item.num_visual_tokens) == (56, 84, 18)
    with pytest.raises(
        ValueError, match=r"^Expected the request within max_visual_tokens=17, got 18 visual tokens: turn do_resize on"
    ):
        encode([plan(frames)], fixed, max_visual_tokens=17)
    with pytest.raises(
        ValueError, match=r"^Expected video 0 within max_visual_tokens=17, got 18 visual tokens: turn do_resize on"
    ):
        encode([plan(frames, max_visual_tokens=17)], fixed)
    with pytest.raises(
        ValueError,
        match=r"^Expected video 0 with sides that are multiples of 28 pixels, since do_resize is off, got 96 x 208",
    ):
        encode([plan(numbered(2))], fixed)


def test_a_still_clip_keeps_one_token_per_frame():
    frames = np.repeat(numbered(1), 3, axis=0)
    (encoded,) = encode([plan(frames)])
    assert encoded.kept_per_frame == [21, 1, 1]
    (image,) = encode([plan_image(frames[0], name="image 0")])
    assert image.kept_per_frame == [21]


def test_pixel_dtypes(clip):
    (floats,) = encode([plan(clip)])
    (raw,) = encode([plan(clip)], pixel_dtype="uint8")
    assert (floats.patches.dtype, raw.patches.dtype) == (np.float32, np.uint8)
    assert np.array_equal(floats.patches, SETTINGS.table[0][raw.patches])
    with pytest.raises(ValueError, match=r"^Expected pixel_dtype 'float32' or 'uint8', got 'int8'\.$"):
        encode([plan(clip)], pixel_dtype="int8")
