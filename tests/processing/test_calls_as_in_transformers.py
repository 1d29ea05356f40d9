"""Calls as users of transformers write them: options by any way, one record per video, numbers 0..1, limits in pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata

from tests.conftest import GOLDEN
from tests.media import write_clip
from videollama3 import VideoLlama3ImageProcessor, VideoLlama3Processor

WITH_TENSORS = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
FRAMES = np.random.default_rng(0).integers(0, 256, (4, 56, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 50, 25)


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(FRAMES[0])


def user(*content):
    return [{"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}]


def video(source):
    return {"type": "video", "video": source}


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 2}, r"Expected options among .*; got num_frames \(here max_frames\)\."),
        ({"max_pixels": 20000}, r"got max_pixels \(here max_tokens\)\."),
        ({"max_frame": 2, "padding": True}, r"got max_frame\."),
    ],
)
@pytest.mark.parametrize("tokenize", [True, False])
def test_the_chat_template_swallows_no_options(processor, clip, options, message, tokenize):
    with pytest.raises(TypeError, match=message):
        processor.apply_chat_template(user(video(clip)), **{**WITH_TENSORS, "tokenize": tokenize}, **options)


def test_settings_of_images_and_videos_by_name(processor, clip, image):
    conversation = user(video(clip), {"type": "image", "image": image})
    changed = processor.apply_chat_template(conversation, **WITH_TENSORS, video_merge_size=1, image_merge_size=2)
    assert changed["video_merge_sizes"].tolist() == [1]
    assert changed["image_merge_sizes"].tolist() == [2]


def test_what_the_template_reads_is_no_option(processor):
    template = "{{ mood }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    text = processor.apply_chat_template([{"role": "user", "content": "b"}], chat_template=template, mood="a")
    assert text == "ab"
    with pytest.raises(TypeError, match=r"got mood\."):
        processor.apply_chat_template([{"role": "user", "content": "b"}], mood="a")


def test_what_is_meant_for_generate_is_passed_over(processor):
    conversation = [{"role": "user", "content": "b"}]
    expected = processor.apply_chat_template(conversation)
    assert processor.apply_chat_template(conversation, do_sample=False, temperature=0.5) == expected


def test_tensors_are_asked_for_among_the_processor_kwargs(processor, image):
    conversation = user({"type": "image", "image": image})
    form = {"tokenize": True, "return_dict": True}
    for options in (
        {"processor_kwargs": {"return_tensors": "pt"}},
        {"processor_kwargs": {"common_kwargs": {"return_tensors": "pt"}}},
        {"return_tensors": "pt", "processor_kwargs": {"return_tensors": None}},
    ):
        assert torch.is_tensor(processor.apply_chat_template(conversation, **form, **options)["input_ids"])
    for options in ({}, {"return_tensors": None, "processor_kwargs": {"return_tensors": "pt"}}):
        assert isinstance(processor.apply_chat_template(conversation, **form, **options)["input_ids"], list)
    mask = {"return_assistant_tokens_mask": True}
    assert "assistant_masks" in processor.apply_chat_template(conversation, **form, processor_kwargs=mask)


def test_none_counts_as_nothing(processor):
    expected = processor(text="hi")["input_ids"]
    assert processor(text="hi", audio=None, num_frames=None)["input_ids"] == expected
    assert processor(text="hi", do_convert_rgb=True)["input_ids"] == expected
    with pytest.raises(TypeError, match=r"got do_convert_rgb\."):
        processor(text="hi", do_convert_rgb=False)


# --- padding and truncation ---


def test_rows_that_go_on_are_padded_on_the_left(processor, image):
    rows = [
        [*user({"type": "image", "image": image}), {"role": "assistant", "content": "It"}],
        [*user(), {"role": "assistant", "content": "It is a longer beginning"}],
    ]
    form = {**WITH_TENSORS, "add_generation_prompt": False, "padding": True, "continue_final_message": True}
    mask = processor.apply_chat_template(rows, **form)["attention_mask"]
    assert mask[:, -1].all()
    assert not mask[:, 0].all()
    with pytest.raises(ValueError, match="either add_generation_prompt or continue_final_message, got both"):
        processor.apply_chat_template(rows, **{**form, "add_generation_prompt": True})


def test_the_loaded_tokenizer_pads_on_the_left_unless_told_otherwise():
    for load in (VideoLlama3Processor.from_pretrained, AutoProcessor.from_pretrained):
        assert load(GOLDEN / "ckpt").tokenizer.padding_side == "left"
        assert load(GOLDEN / "ckpt", padding_side="right").tokenizer.padding_side == "right"


def test_truncation_on_the_side_of_the_tokenizer(image):
    processor = VideoLlama3Processor.from_pretrained(GOLDEN / "ckpt")
    processor.tokenizer.truncation_side = "left"
    text = "What color is the shape?"
    whole = processor(text=text)["input_ids"][0]
    assert processor(text=text, truncation=True, max_length=4)["input_ids"] == [whole[-4:]]
    cut = processor(text=f"{text}<image>", images=[image], truncation=True, max_length=18)["input_ids"][0]
    assert cut == processor(text=f"{text}<image>", images=[image])["input_ids"][0][-18:]
    with pytest.raises(ValueError, match="row 0 to fit max_length=10 without cutting visual tokens"):
        processor(text=f"<image>{text}", images=[image], truncation=True, max_length=10)


# --- pixels ---


@pytest.mark.parametrize("kind", [np.float32, torch.float32, torch.bfloat16], ids=str)
def test_numbers_from_0_to_1_are_rescaled_already(processor, kind):
    """`do_rescale=False` says so in transformers; grey levels stay as they are with it."""
    levels = np.array([0, 51, 255], dtype=np.uint8)[np.random.default_rng(1).integers(0, 3, (2, 56, 56, 3))]
    values = levels / np.float32(255)
    values = values.astype(kind) if kind is np.float32 else torch.from_numpy(values).to(kind).permute(0, 3, 1, 2)
    expected = processor.image_processor(levels[0])["pixel_values"]
    assert torch.equal(processor.image_processor(values[0])["pixel_values"], expected)
    assert torch.equal(processor.image_processor(values[0], do_rescale=False)["pixel_values"], expected)
    assert processor.image_processor(levels[0], do_rescale=False)["pixel_values"].max() == 509.0
    expected = processor.video_processor(levels)
    given = processor.video_processor(values, do_rescale=False)
    assert torch.equal(given["pixel_values_videos"], expected["pixel_values_videos"])
    assert torch.equal(given["video_compression_mask"], expected["video_compression_mask"])
    frames = processor.video_processor([list(values)], do_rescale=False)
    assert torch.equal(frames["pixel_values_videos"], expected["pixel_values_videos"])


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_pixels": 28224}, (16, 144)),
        ({"min_pixels": 3136}, (16, 16384)),
        ({"size": {"shortest_edge": 6272, "longest_edge": 12544}}, (32, 64)),
    ],
)
def test_limits_in_pixels(limits, expected):
    made = VideoLlama3ImageProcessor(**limits)
    assert (made.min_tokens, made.max_tokens) == expected
    loaded = VideoLlama3Processor.from_pretrained(GOLDEN / "ckpt", **limits)
    assert (loaded.image_processor.min_tokens, loaded.image_processor.max_tokens) == expected
    stored = VideoLlama3ImageProcessor.from_dict({**made.to_dict(), "size": {"longest_edge": 3136}})
    assert (stored.min_tokens, stored.max_tokens) == expected, "tokens that are stored win over pixels beside them"


def test_what_the_caller_limits_comes_after_what_is_stored_in_pixels():
    native = {"size": {"shortest_edge": 3136, "longest_edge": 12544}, "patch_size": 14, "merge_size": 1}
    made = [
        VideoLlama3ImageProcessor.from_dict(native, **given)
        for given in ({}, {"max_tokens": 20}, {"max_pixels": 7840})
    ]
    assert [(one.min_tokens, one.max_tokens) for one in made] == [(16, 64), (16, 20), (16, 40)]


def test_frames_are_limited_by_their_number():
    with pytest.raises(TypeError, match="Expected max_frames, got num_frames"):
        VideoLlama3Processor.from_pretrained(GOLDEN / "ckpt", num_frames=2)


# --- videos ---


def test_one_record_per_video_of_a_conversation(processor):
    conversation = user(video(FRAMES), video(FRAMES[:2]))
    form = {**WITH_TENSORS, "return_metadata": True}
    records = [{"total_num_frames": 4, "fps": 2.0}, VideoMetadata(total_num_frames=2, fps=4.0)]
    told = processor.apply_chat_template(conversation, **form, video_metadata=records)["video_metadata"]
    assert [record.timestamps for record in told] == [[0.0, 0.5, 1.0, 1.5], [0.0, 0.25]]
    labels = [[0, 1, 2, 3.5], [7, 8]]
    told = processor.apply_chat_template([conversation], **form, timestamps=labels)["video_metadata"]
    assert [record.timestamps for record in told] == [[0.0, 1.0, 2.0, 3.5], [7.0, 8.0]]
    own = user({**video(FRAMES), "timestamps": [1, 2, 3, 4]}, video(FRAMES[:2]))
    told = processor.apply_chat_template(own, **form, timestamps=labels)["video_metadata"]
    assert [record.timestamps for record in told] == [[1.0, 2.0, 3.0, 4.0], [7.0, 8.0]], "its own come first"
    with pytest.raises(ValueError, match=r"video_metadata for each of 2 video\(s\), got 1"):
        processor.apply_chat_template(conversation, **form, video_metadata=records[:1])
    with pytest.raises(TypeError, match=r"video_metadata of .* as a VideoMetadata or a dict, got str"):
        processor.apply_chat_template(user(video(FRAMES)), **form, video_metadata=["fps"])


def test_a_file_beside_an_array(processor, clip):
    grids = processor.apply_chat_template(user(video(clip), video(FRAMES)), **WITH_TENSORS)["video_grid_thw"]
    assert grids[:, 0].tolist() == [2, 4]


def test_a_file_is_always_sampled(processor, clip):
    with pytest.raises(ValueError, match="do_sample_frames=False only with frames, got it with the file"):
        processor.apply_chat_template(user(video(clip)), **WITH_TENSORS, do_sample_frames=False)
    frames = processor.apply_chat_template(user(video(FRAMES)), **WITH_TENSORS, do_sample_frames=False)
    assert frames["video_grid_thw"][0, 0] == 4


def test_an_animated_webp_is_named(processor, tmp_path):
    path = tmp_path / "clip.webp"
    frames = [Image.fromarray(frame) for frame in FRAMES]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=300)
    with pytest.raises(ValueError, match="animated WebP, which FFmpeg does not decode"):
        processor.apply_chat_template(user({"type": "video", "path": str(path)}), **WITH_TENSORS)
