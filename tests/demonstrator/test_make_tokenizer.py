"""The small tokenizer: whole words of the generated language, any other text by bytes."""

import pytest
from demonstrator.make_tokenizer import VOCABULARY_SIZE, make_tokenizer
from transformers import AutoTokenizer

from videollama3.random_checkpoint import SPECIAL_TOKENS


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(num_scenes=1200)


def test_size_and_special_tokens(tokenizer):
    assert len(tokenizer) == VOCABULARY_SIZE
    for token in SPECIAL_TOKENS:
        assert tokenizer.tokenize(token) == [token]


@pytest.mark.parametrize(
    "text",
    [
        "Which way does the shape move?",
        "WHAT COLOUR IS IT",
        "Größe? 漢字 \U0001f600\n\ttabs",
        "At 3.5 seconds.",
        "<image>",
    ],
)
def test_every_text_survives(tokenizer, text):
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_a_frame_header_is_three_tokens_and_shares_its_number_with_answers(tokenizer):
    header = tokenizer.tokenize(",Time 3.0s:")
    assert len(header) == 3
    assert header[1] in tokenizer.tokenize("At 3.0 seconds.")


def test_questions_are_a_few_words(tokenizer):
    assert len(tokenizer.tokenize("What color is the shape?")) == 6


def test_it_is_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "user\nTime 0.0s:<|video_pad|>,Time 1.0s:"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.eos_token == "<|im_end|>"
