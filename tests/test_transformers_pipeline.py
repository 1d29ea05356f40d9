"""`pipeline("image-text-to-text")` answers about images and videos."""

import pytest
from transformers import pipeline

from tests.conftest import GOLDEN
from tests.media import write_clip


@pytest.fixture(scope="module")
def pipe():
    return pipeline("image-text-to-text", model=str(GOLDEN / "ckpt"), dtype="float32", device="cpu")


def user(*content):
    return [{"role": "user", "content": list(content)}]


@pytest.mark.parametrize("kind", ["image", "video", "both", "text"])
def test_answers(pipe, processor, model, tmp_path, kind):
    image = {"type": "image", "url": str(GOLDEN / "media" / "img3_40x30.png")}
    video = {"type": "video", "path": write_clip(tmp_path / "clip.mp4", 50, 25)}
    media = {"image": [image], "video": [video], "both": [video, image], "text": []}[kind]
    conversation = user(*media, {"type": "text", "text": "What?"})
    (result,) = pipe(text=conversation, max_new_tokens=5, do_sample=False, return_full_text=False)
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    new = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert result["generated_text"] == processor.tokenizer.decode(new, skip_special_tokens=True)


def test_a_batch_answers_as_one_by_one(pipe, tmp_path):
    clip = {"type": "video", "path": write_clip(tmp_path / "clip.mp4", 50, 25)}
    rows = [user(clip, {"type": "text", "text": text}) for text in ("What is it, and what does it do?", "Why?")]
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    alone = [pipe(text=row, **options)[0]["generated_text"] for row in rows]
    assert [answer["generated_text"] for (answer,) in pipe(text=rows, batch_size=2, **options)] == alone


def test_image_and_text_outside_a_chat(pipe):
    (result,) = pipe(
        images=[str(GOLDEN / "media" / "img3_40x30.png")],
        text="<|image_pad|>\nWhat?",
        max_new_tokens=3,
        return_full_text=False,
    )
    assert isinstance(result["generated_text"], str)
