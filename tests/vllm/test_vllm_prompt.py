"""Prompts as vLLM tokenizes them, expanded: the ids have to be those of our processor."""

import numpy as np
import pytest

from tests.media import numbered_picture
from videollama3.serving.vllm_media import Medium, RequestMedia
from videollama3.serving.vllm_prompt import PromptExpander

CLIP = np.stack([numbered_picture(i) for i in (0, 0, 9)])
PICTURE = numbered_picture(4, 64, 90)


def unexpanded(processor, text):
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


# The tokenizer joins letters over the border between what a user wrote and "Time 0.0s:".
@pytest.mark.parametrize("before", ["", "\n", "look: ", "in ", "T", "<|im_end|>", "<image>"])
def test_the_ids_are_those_of_the_processor(processor, before):
    text = f"<|im_start|>user\n{before}<|video_pad|>\nand <|image_pad|>\n{before}<|video_pad|>\nwhy?<|im_end|>\n"
    if before == "<image>":
        text = text.replace("<image>", "<|image_pad|>")
    images = [PICTURE] * (3 if before == "<image>" else 1)
    expected = processor(text=text, images=images, videos=[CLIP, CLIP], max_frames=8)["input_ids"][0]
    media = [*(Medium("image", PICTURE) for _ in images), Medium("video", CLIP), Medium("video", CLIP)]
    request = RequestMedia(processor, media, {})
    prompt = PromptExpander(processor)
    encoded = [request.encode(i) for i in range(len(media))]
    expansions = {
        kind: [prompt.expansion(item) for item in encoded if item.kind == kind] for kind in ("image", "video")
    }
    ids, places = prompt.expand(unexpanded(processor, text), expansions)
    assert ids == expected
    assert [kind for kind, _, _ in places] == [
        "image" if token == processor.image_token_id else "video"
        for token in unexpanded(processor, text)
        if token in (processor.image_token_id, processor.video_token_id)
    ]
    for kind, begin, tokens in places:
        assert tokens[0] == ids[begin] == prompt.placeholder_ids[kind]
        assert ids[begin : begin + len(tokens)] == tokens


def test_tokens_of_the_clients_own_are_left_alone(processor):
    prompt = PromptExpander(processor)
    # Two tokens where the tokenizer would write one.
    letters = [unexpanded(processor, letter)[0] for letter in "Time"]
    assert unexpanded(processor, "Time") != letters
    label = unexpanded(processor, "Time 0.0s:")
    ids, _ = prompt.expand(
        [*letters, processor.video_token_id], {"video": [[*label, processor.video_token_id, processor.video_token_id]]}
    )
    assert ids == [*letters, *label, processor.video_token_id, processor.video_token_id]


def test_placeholders_and_media_must_match(processor):
    prompt = PromptExpander(processor)
    with pytest.raises(ValueError, match=r"one video for each placeholder .*got 1 placeholder\(s\) and 2 video\(s\)"):
        prompt.expand([processor.video_token_id], {"video": [[processor.video_token_id]] * 2})
    with pytest.raises(ValueError, match=r"one image for each placeholder .*got 2 placeholder\(s\) and 0 image\(s\)"):
        prompt.expand([processor.image_token_id] * 2, {})
