"""What a request costs: the estimate is what comes, the budget holds, and nothing is decoded for either."""

import re

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.media import numbered_picture, write_clip
from videollama3 import VideoLlama3VideoProcessor
from videollama3.processing import video_file, video_reading

FAST = {"preset": "ultrafast", "g": "12"}
SIZES = ((96, 208), (70, 30), (34, 260), (200, 180))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Clips of SIZES and of 0.4 to 3 seconds."""
    folder = tmp_path_factory.mktemp("media")
    found = []
    for i, (height, width) in enumerate(SIZES):
        pictures = [np.roll(numbered_picture(0, height, width), number, axis=1) for number in range(4 + 12 * i)]
        path = folder / f"{i}.mp4"
        found.append(write_clip(path, len(pictures), 10, pictures=pictures, height=height, width=width, options=FAST))
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"fps": 4}, {"fps": 10, "max_frames": 5}, {"start_time": 0.2, "end_time": 0.35}, {"max_visual_tokens": 40}],
)
def test_an_estimate_is_what_comes(clips, options):
    videos = VideoLlama3VideoProcessor()
    for request in (clips[:1], clips[1:], [clips[3], clips[0], clips[3]]):
        estimate = videos.estimate(request, **options)
        features = videos(request, **options)
        grids = features["video_grid_thw"].tolist()
        assert [[e.num_frames, e.height // 14, e.width // 14] for e in estimate.items] == grids
        assert [e.num_patches for e in estimate.items] == [t * h * w for t, h, w in grids]
        assert estimate.num_patches == len(features["pixel_values_videos"])
        assert estimate.num_visual_tokens == len(features["video_compression_mask"])
        assert estimate.num_visual_tokens == sum(e.num_visual_tokens for e in estimate.items)
        assert estimate.pixel_bytes() == features["pixel_values_videos"].nbytes
        raw = videos(request, pixel_dtype="uint8", **options)["pixel_values_videos"]
        assert estimate.pixel_bytes("uint8") == raw.nbytes == estimate.pixel_bytes() // 4
        assert estimate.processor_bytes("uint8") == raw.nbytes
        assert estimate.processor_bytes() == estimate.pixel_bytes() + raw.nbytes


def test_an_estimate_of_a_mixed_conversation(processor, clips):
    content = [
        {"type": "image", "image": numbered_picture(3, 70, 126)},
        {"type": "video", "video": clips[2], "fps": 2},
        {"type": "text", "text": "?"},
    ]
    conversation = [{"role": "user", "content": content}]
    estimate = processor.estimate(conversation, max_visual_tokens=120)
    features = processor(conversation=conversation, max_visual_tokens=120, return_tensors="pt")
    assert [item.kind for item in estimate.items] == ["image", "video"]
    assert estimate.items[0].num_patches == len(features["pixel_values"])
    assert estimate.items[1].num_patches == len(features["pixel_values_videos"])
    assert estimate.num_visual_tokens <= 120


def test_an_estimate_decodes_one_frame_of_each_file(clips, monkeypatch):
    decoded = []
    original = video_file.decode_frames

    def counting(*arguments, **options):
        for frame in original(*arguments, **options):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_file, "decode_frames", counting)
    monkeypatch.setattr(video_reading, "decode_frames", counting)
    monkeypatch.setattr(video_reading, "decode_spans", None)
    VideoLlama3VideoProcessor().estimate(clips, fps=5)
    assert decoded == [0] * len(clips)


requests = st.lists(
    st.tuples(st.integers(0, len(SIZES) - 1), st.sampled_from([0.5, 1, 3, 10]), st.integers(1, 6)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    request_of=requests,
    spare=st.integers(0, 60),
    num_images=st.integers(0, 2),
    min_tokens=st.sampled_from([1, 16]),
    image_merge_size=st.sampled_from([1, 2]),
)
def test_max_visual_tokens_is_a_promise(processor, clips, request_of, spare, num_images, min_tokens, image_merge_size):
    content = [{"type": "image", "image": numbered_picture(i, 60 + 50 * i, 130)} for i in range(num_images)]
    content += [
        {"type": "video", "video": clips[index], "fps": fps, "max_frames": max_frames}
        for index, fps, max_frames in request_of
    ]
    conversation = [{"role": "user", "content": [*content, {"type": "text", "text": "?"}]}]
    # The least that is possible: one token per picture.
    least = processor.estimate(conversation).items
    limit = sum(item.num_frames for item in least) + spare
    options = {"max_visual_tokens": limit, "min_tokens": min_tokens, "images_kwargs": {"merge_size": image_merge_size}}
    features = processor(conversation=conversation, use_token_compression=False, return_tensors="pt", **options)
    ids = features["input_ids"][0].tolist()
    seen = ids.count(processor.image_token_id) + ids.count(processor.video_token_id)
    assert seen <= limit
    tokens = 0
    for kind in ("image", "video"):
        if f"{kind}_grid_thw" in features:
            cells = features[f"{kind}_grid_thw"].prod(dim=1)
            tokens += int((cells // features[f"{kind}_merge_sizes"] ** 2).sum())
    assert tokens == seen
    if "video_grid_thw" in features:
        assert features["video_grid_thw"][:, 0].tolist() == [
            min(item.num_frames, m) for item, (_, _, m) in zip(least[num_images:], request_of, strict=True)
        ]


def test_a_budget_that_cannot_be_kept(clips):
    videos = VideoLlama3VideoProcessor()
    with pytest.raises(ValueError, match=re.escape("max_visual_tokens of at least 16")):
        videos([clips[1]], fps=10, max_visual_tokens=15)
    assert len(videos([clips[1]], fps=10, max_visual_tokens=16)["video_compression_mask"]) == 16


def test_pictures_of_a_file_are_resized_where_they_are_decoded(clips, monkeypatch):
    """Several decoders, or one: the same tensors."""
    monkeypatch.setattr(video_reading, "_num_decoders", lambda source: 3)
    several = VideoLlama3VideoProcessor()([clips[3]], fps=5)
    monkeypatch.setattr(video_reading, "_num_decoders", lambda source: 1)
    one = VideoLlama3VideoProcessor()([clips[3]], fps=5)
    for name in one:
        assert one[name].equal(several[name]), name
    with av.open(clips[3]) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    chosen = VideoLlama3VideoProcessor()([clips[3]], fps=5, return_metadata=True)["video_metadata"][0].frames_indices
    by_hand = VideoLlama3VideoProcessor()([np.stack([frames[i] for i in chosen])])
    assert one["pixel_values_videos"].equal(by_hand["pixel_values_videos"])
