"""Media in the forms that vLLM hands over; needs no vLLM."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.media import numbered_picture, write_clip
from videollama3.serving.vllm_media import Medium, RequestMedia, read_images, read_videos
from videollama3.serving.vllm_plugin import EncodedVideoLoader


def with_bytes(media, content):
    """As vLLM wraps what it downloaded."""
    return SimpleNamespace(media=media, original_bytes=content)


def png(pixels, mode):
    stream = io.BytesIO()
    Image.fromarray(pixels, mode).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 75)


def test_a_downloaded_picture_is_read_from_its_file(processor):
    pixels = np.random.default_rng(0).integers(0, 255, (56, 70, 4), dtype=np.uint8)
    white = Image.new("RGB", (70, 56), "white")
    (medium,) = read_images([with_bytes(white, png(pixels, "RGBA"))])
    encoded = RequestMedia(processor, [medium], {}).encode(0)
    expected = processor.image_processor(pixels[..., :3], return_tensors="pt")["pixel_values"]
    assert (encoded.patches == expected.numpy()).all()


def test_a_file_from_the_loader_is_sampled_as_the_processor_does(processor, clip):
    content = Path(clip).read_bytes()
    frames, options = EncodedVideoLoader.load_bytes(content, num_frames=32, fps=2, max_frames=5)
    assert frames.ndim == 1
    (medium,) = read_videos([with_bytes((frames, options), content)])
    assert (medium.source, medium.options) == (content, {"fps": 2, "max_frames": 5})
    encoded = RequestMedia(processor, [medium], {}).encode(0)
    expected = processor.video_processor(clip, fps=2, max_frames=5, return_tensors="pt")
    assert encoded.timestamps.tolist() == [0.0, 0.5, 1.0, 1.5, 2.5]
    assert (encoded.patches == expected["pixel_values_videos"].numpy()).all()
    assert (encoded.keep == expected["video_compression_mask"].numpy()).all()


def test_the_loader_knows_its_options():
    with pytest.raises(ValueError, match=r"Expected media_io_kwargs of a video among fps, max_frames.*got num_frames"):
        EncodedVideoLoader.load_bytes(b"", num_frames=8)
    with pytest.raises(ValueError, match=r"got backend, seek"):
        EncodedVideoLoader.load_bytes(b"", seek=1, backend="opencv")


def test_frames_keep_their_times(processor):
    frames = np.stack([numbered_picture(i) for i in range(4)])
    (medium,) = read_videos((frames, {"fps": 10.0, "frames_indices": [5, 15, 25, 35], "do_sample_frames": False}))
    assert RequestMedia(processor, [medium], {}).encode(0).timestamps.tolist() == [0.5, 1.5, 2.5, 3.5]


def test_one_video_or_a_list():
    picture = np.zeros((4, 6, 3), np.uint8)
    clip = np.zeros((2, 4, 6, 3), np.uint8)
    assert [len(read_videos(data)) for data in (clip, [picture, picture], [clip, clip], (clip, {}), "a.mp4")] == [
        1,
        1,
        2,
        1,
        1,
    ]
    assert read_videos([None]) == [None]
    assert [len(read_images(data)) for data in (picture, [picture, None], np.zeros((3, 4, 6, 3)))] == [1, 2, 3]


def test_identity_tells_content_and_sampling_apart(clip, tmp_path):
    other = write_clip(tmp_path / "other.mp4", 74)
    media = [
        Medium("video", clip),
        Medium("video", other),
        Medium("video", clip, {"fps": 2}),
        Medium("video", b"1"),
        Medium("image", b"1"),
    ]
    assert len({repr(medium.identity()) for medium in media}) == len(media)
    assert Medium("video", clip).identity() == Medium("video", clip, {}).identity()


def test_companions_that_change_an_items_size_are_seen(processor):
    small, large = numbered_picture(1, 56, 70), numbered_picture(2, 700, 980)
    alone = RequestMedia(processor, [Medium("image", large)], {"max_visual_tokens": 400})
    assert alone.changed_sizes == [None]
    beside_small = RequestMedia(processor, [Medium("image", small), Medium("image", small)], {})
    assert beside_small.changed_sizes == [None, None]
    together = RequestMedia(processor, [Medium("image", large)] * 2, {"max_visual_tokens": 400})
    first, second = together.changed_sizes
    assert first == second
    assert first is not None
    assert together.encode(1).grid_thw == (1, first[0] // 14, first[1] // 14)
    assert len(together.encode(0).keep) + len(together.encode(1).keep) <= 400 < 2 * len(alone.encode(0).keep)


def test_errors_name_the_item(processor, clip):
    media = [Medium("image", numbered_picture(1)), Medium("video", clip), Medium("video", b"no video")]
    with pytest.raises(ValueError, match="Expected video 1 as a whole video file"):
        RequestMedia(processor, media, {}).encode(1)
    with pytest.raises(ValueError, match="no such file"):
        RequestMedia(processor, [Medium("video", "/nowhere.mp4")], {}).encode(0)
    with pytest.raises(ValueError, match=r"Expected options among .*got frames"):
        RequestMedia(processor, [], {"frames": 3})
