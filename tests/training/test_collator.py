"""Samples -> one row or padded rows: what stands where, and that the model sees the same as one by one."""

import pickle
import re

import pytest
import torch

from tests.modeling.tiny import IMAGE as IMAGE_ID
from tests.modeling.tiny import VIDEO as VIDEO_ID
from tests.modeling.tiny import image_and_video_request, images, videos
from videollama3.training.collator import PackingCollator, PaddingCollator

from .synthetic import IMAGE, MIXED, TEXT, VIDEO, Samples, tiny_model

COLLATOR = PackingCollator(image_token_id=IMAGE_ID, video_token_id=VIDEO_ID)


@pytest.fixture(scope="module")
def model_and_processor():
    return tiny_model()


@pytest.fixture(scope="module")
def samples(model_and_processor):
    dataset = Samples(model_and_processor[1], [TEXT, MIXED, IMAGE, VIDEO, TEXT])
    return [dataset[i] for i in range(len(dataset))]


def _sample(*ids, labels=None, **media):
    ids = torch.tensor(ids)
    return {"input_ids": ids, "labels": ids.clone() if labels is None else torch.tensor(labels), **media}


def test_the_example_of_the_docstring():
    batch = COLLATOR([_sample(1, 2, 3), _sample(4, 5), _sample(6, 7, 8, 9)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5, -100, 7, 8, 9]]
    assert "attention_mask" not in batch


def test_samples_keep_their_labels():
    sample = _sample(1, 2, 3)
    COLLATOR([sample])
    assert sample["labels"].tolist() == [1, 2, 3]


def test_bounds_of_documents():
    collator = PackingCollator(image_token_id=IMAGE_ID, video_token_id=VIDEO_ID, bounds=True)
    batch = collator([_sample(1, 2, 3), _sample(4, 5)])
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 3


def test_padding():
    collator = PaddingCollator(image_token_id=IMAGE_ID, video_token_id=VIDEO_ID, pad_token_id=77)
    batch = collator([_sample(1, 2, 3), _sample(4, 5)])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 77]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


# --- media ---


def test_media_stand_in_order_of_their_tokens():
    """Image, pruned video, second video become one video input; the first video has 2 frames of 6 tokens."""
    request = image_and_video_request()
    ids = request["input_ids"][0]
    batch = COLLATOR([{**request, "input_ids": ids, "labels": ids}])
    assert batch["video_grid_thw"].tolist() == [[1, 3, 4], [2, 4, 6], [3, 2, 4]]
    assert batch["video_merge_sizes"].tolist() == [1, 2, 2]
    expected = torch.cat([request["pixel_values"], request["pixel_values_videos"]])
    assert torch.equal(batch["pixel_values_videos"], expected)
    assert batch["video_compression_mask"][:12].all()
    assert torch.equal(batch["video_compression_mask"][12:], request["video_compression_mask"])
    assert int(batch["video_compression_mask"].sum()) == int((batch["input_ids"] == VIDEO_ID).sum())
    assert not (batch["input_ids"] == IMAGE_ID).any()


def test_a_video_before_an_image():
    sample = _sample(*[VIDEO_ID] * 2, 5, *[IMAGE_ID] * 2, **videos([[1, 2, 4]], [2]), **images([[1, 1, 2]], [1]))
    batch = COLLATOR([sample])
    assert batch["video_grid_thw"].tolist() == [[1, 2, 4], [1, 1, 2]]
    assert torch.equal(batch["pixel_values_videos"][:8], sample["pixel_values_videos"])


def test_an_image_between_the_frames_of_a_video():
    """Frames of one video stand in several messages of a streaming row."""
    ids = [VIDEO_ID, VIDEO_ID, 7, IMAGE_ID, IMAGE_ID, 8, VIDEO_ID]
    mask = torch.tensor([True, True, False, True])
    sample = _sample(*ids, **{**videos([[2, 2, 4]], [2]), "video_compression_mask": mask}, **images([[1, 1, 2]], [1]))
    batch = COLLATOR([sample])
    assert batch["video_grid_thw"].tolist() == [[1, 2, 4], [1, 1, 2], [1, 2, 4]]
    frames = sample["pixel_values_videos"].split(8)
    assert torch.equal(batch["pixel_values_videos"], torch.cat([frames[0], sample["pixel_values"], frames[1]]))
    assert batch["video_compression_mask"].tolist() == [True, True, True, True, False, True]


def test_media_and_placeholders_that_disagree():
    message = f"Expected as many video placeholders (id {VIDEO_ID}) as kept visual tokens, got 3 and 2"
    with pytest.raises(ValueError, match=re.escape(message)):
        COLLATOR([_sample(*[VIDEO_ID] * 3, **videos([[1, 2, 4]], [2]))])
    with pytest.raises(ValueError, match=re.escape("Expected pixel_values for 2 image placeholders, got none.")):
        COLLATOR([_sample(1, IMAGE_ID, IMAGE_ID)])


def test_labels_of_another_length():
    with pytest.raises(ValueError, match=re.escape("Expected one label per input id, got (2,) labels and (3,) ids.")):
        COLLATOR([_sample(1, 2, 3, labels=[1, 2])])


def test_skipped_samples_are_left_out():
    assert COLLATOR([None, _sample(1, 2)])["input_ids"].tolist() == [[1, 2]]
    with pytest.raises(
        ValueError, match=re.escape("Expected at least one sample that could be read, got 2 that were")
    ):
        COLLATOR([None, None])


# --- what the model makes of it ---


def _losses_and_gradients(model, batches, num_items):
    model.zero_grad()
    total = sum(model(**batch, use_cache=False, num_items_in_batch=num_items).loss for batch in batches)
    total.backward()
    return total.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def _targets(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_and_gradients_equal_unpacked_ones(model_and_processor, samples, attention):
    model, processor = model_and_processor
    model.set_attn_implementation(attention)
    collator = PackingCollator.for_processor(processor)
    packed, single = collator(samples), [_as_one_request(sample) for sample in samples]
    num_items = _targets(packed)
    assert num_items == sum(map(_targets, single)) == sum(int((s["labels"] != -100).sum()) for s in samples)
    loss, gradients = _losses_and_gradients(model, [packed], num_items)
    expected, expected_gradients = _losses_and_gradients(model, single, num_items)
    # Measured worst case 0 of 5.6; one label too many is off by 7e-4, documents that see others by 0.02.
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    for name, gradient in gradients.items():
        # Measured worst case 1.2e-7 of 0.54; documents that see others are off by 0.35.
        torch.testing.assert_close(gradient, expected_gradients[name], atol=2e-6, rtol=0, msg=name)


def _as_one_request(sample):
    """The sample alone as the processor gives it, images as images."""
    return {**sample, "input_ids": sample["input_ids"][None], "labels": sample["labels"][None]}


def test_padded_loss_and_gradients_equal_packed_ones(model_and_processor, samples):
    model, processor = model_and_processor
    model.set_attn_implementation("sdpa")
    packed = PackingCollator.for_processor(processor)(samples)
    padded = PaddingCollator.for_processor(processor)(samples)
    assert _targets(packed) == _targets(padded)
    loss, gradients = _losses_and_gradients(model, [packed], _targets(packed))
    expected, expected_gradients = _losses_and_gradients(model, [padded], _targets(padded))
    # Measured as above.
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=2e-6, rtol=0, msg=name)


def test_the_pruned_frame_runs_the_encoder_and_changes_nothing(model_and_processor, samples):
    model, processor = model_and_processor
    text = [samples[0], samples[4]]
    with_frame = PackingCollator.for_processor(processor)(text)
    without = PackingCollator.for_processor(processor, dummy_frame=False)(text)
    assert len(with_frame["pixel_values_videos"]) == 4
    assert "pixel_values_videos" not in without
    loss, gradients = _losses_and_gradients(model, [with_frame], 7)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0 or "vision_model" in name or "projector" in name, name
        assert "vision_model" not in name or not gradient.any(), name
    model.zero_grad()
    expected = model(**without, use_cache=False, num_items_in_batch=7).loss
    expected.backward()
    assert torch.equal(loss, expected.detach())
    assert model.model.projector.readout[0].weight.grad is None


def test_collators_travel_to_workers(model_and_processor):
    for kind in (PackingCollator, PaddingCollator):
        collator = kind.for_processor(model_and_processor[1])
        assert pickle.loads(pickle.dumps(collator)) == collator
