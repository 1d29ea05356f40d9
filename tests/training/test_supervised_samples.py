"""Labels against sequences written out by hand: what is learnt stands between double brackets."""

import re

import numpy as np
import pytest
import torch

from tests.media import numbered_picture, write_clip
from videollama3.random_checkpoint import build_random
from videollama3.training.dataset_rows import read_row
from videollama3.training.supervised_samples import (
    IGNORED,
    SampleOptions,
    SampleTooLongError,
    balanced_positions,
    build_sample,
    is_pruned,
)
from videollama3.training.training_dataset import TrainingDataset

LOSSLESS = {"crf": "0", "preset": "ultrafast"}


@pytest.fixture(scope="module")
def tiny():
    """A processor with one token per byte: what is written by hand is what stands in the sequence."""
    return build_random()[1]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Five seconds; the picture changes at 2 seconds and then stands still."""
    pictures = [numbered_picture(i // 25 if i < 75 else 2) for i in range(125)]
    return write_clip(tmp_path_factory.mktemp("media") / "clip.mp4", 125, 25, pictures=pictures, options=LOSSLESS)


def sample(row, processor, *, seed=(0, 0), **options):
    return build_sample(read_row(row), processor, options=SampleOptions(**options), seed=seed)


def by_hand(processor, text):
    """Ids and labels of a text in which `[[...]]` is learnt and `<v*3>` stands for three tokens of a video."""
    ids, labels = [], []
    text = re.sub(r"<(v|i)\*(\d+)>", lambda m: f"<|{'video' if m[1] == 'v' else 'image'}_pad|>" * int(m[2]), text)
    for i, part in enumerate(re.split(r"\[\[|\]\]", text)):
        piece = processor.tokenizer(part, add_special_tokens=False)["input_ids"]
        ids += piece
        labels += piece if i % 2 else [IGNORED] * len(piece)
    return ids, labels


def check(got, processor, text):
    ids, labels = by_hand(processor, text)
    assert processor.tokenizer.decode(got["input_ids"]) == processor.tokenizer.decode(ids)
    assert got["input_ids"].tolist() == ids
    assert got["labels"].tolist() == labels


def messages(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def stream(clip, *turns, start=0, end=5):
    conversation = [{"role": role, "content": content, "time": time} for role, content, time in turns]
    return {"stream": True, "video": [clip], "start_time": start, "end_time": end, "conversation": conversation}


def test_plain(tiny):
    got = sample(messages(("user", "Q"), ("assistant", "A b")), tiny)
    assert set(got) == {"input_ids", "labels"}
    assert got["input_ids"].dtype == got["labels"].dtype == torch.int64
    check(got, tiny, "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n[[A b<|im_end|>]]\n")


def test_several_turns(tiny):
    got = sample(messages(("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")), tiny)
    check(
        got,
        tiny,
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n[[A<|im_end|>]]\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n[[B<|im_end|>]]\n",
    )


def test_system_and_the_released_system_prompt(tiny):
    turns = (("system", "S"), ("user", "assistant\nQ"), ("assistant", "assistant\nA"))
    text = (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nassistant\nQ<|im_end|>\n"
        "<|im_start|>assistant\n[[assistant\nA<|im_end|>]]\n"
    )
    check(sample(messages(*turns), tiny), tiny, text)
    check(sample(messages(*turns), tiny, add_system_prompt=True), tiny, text)
    with_prompt = sample(messages(*turns[1:]), tiny, add_system_prompt=True)
    shown = tiny.tokenizer.decode(with_prompt["input_ids"])
    assert shown.startswith("<|im_start|>system\nYou are VideoLLaMA3 created by Alibaba DAMO Academy")
    learnt = with_prompt["labels"][with_prompt["labels"] != IGNORED]
    assert tiny.tokenizer.decode(learnt) == "assistant\nA<|im_end|>"


def test_pruned_video_in_the_authors_form(tiny, clip):
    row = {
        "video": [clip],
        "conversations": [{"from": "human", "value": "<video>\nWhich?"}, {"from": "gpt", "value": "A."}],
    }
    got = sample(row, tiny)
    # 208 x 96 pixels come to 7 x 3 tokens. At 1 and 2 s the picture is a new one, at 3 and 4 s the same again.
    kept = got["video_compression_mask"].view(5, 21).sum(1).tolist()
    assert kept[0] == 21
    assert kept[3:] == [1, 1]
    assert 1 < kept[1] <= 21
    frames = ",".join(f"Time {i}.0s:<v*{count}>" for i, count in enumerate(kept))
    check(got, tiny, f"<|im_start|>user\n{frames}\nWhich?<|im_end|>\n<|im_start|>assistant\n[[A.<|im_end|>]]\n")
    assert got["pixel_values_videos"].dtype == torch.uint8
    assert got["pixel_values_videos"].shape == (5 * 84, 588)
    assert got["video_grid_thw"].tolist() == [[5, 6, 14]]
    assert got["video_merge_sizes"].tolist() == [2]


def test_labels_do_not_depend_on_pruning(tiny, clip):
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "video", "video": clip}]},
            {"role": "assistant", "content": "A."},
        ]
    }
    options = {"use_token_compression": False}
    pruned, whole = sample(row, tiny), sample(row, tiny, processor_options=options)
    assert len(pruned["labels"]) < len(whole["labels"])
    assert pruned["labels"][-30:].tolist() == whole["labels"][-30:].tolist()
    for got in (pruned, whole):
        assert tiny.tokenizer.decode(got["labels"][got["labels"] != IGNORED]) == "A.<|im_end|>"


def test_some_rows_keep_all_tokens(tiny, clip):
    """Which ones depends on the row alone; about the share that was asked for."""
    row = {"video": [clip], "conversations": [{"from": "human", "value": "<video>\nQ"}, {"from": "gpt", "value": "A"}]}
    pruned, whole = (sample(row, tiny, unpruned_share=share) for share in (0.0, 1.0))
    assert pruned["video_compression_mask"].sum() < len(pruned["video_compression_mask"])
    assert whole["video_compression_mask"].all()
    assert len(whole["input_ids"]) > len(pruned["input_ids"])
    kept = [is_pruned(0.25, seed=(3, number)) for number in range(2000)]
    assert 0.7 < np.mean(kept) < 0.8
    assert kept[:20] == [is_pruned(0.25, seed=(3, number)) for number in range(20)]
    assert kept != [is_pruned(0.25, seed=(4, number)) for number in range(2000)]
    number = kept.index(False)
    assert sample(row, tiny, seed=(3, number), unpruned_share=0.25)["video_compression_mask"].all()
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        TrainingDataset([row], tiny, unpruned_share=1.5)


def test_two_images(tiny, tmp_path):
    from PIL import Image

    paths = []
    for i, (width, height) in enumerate([(84, 70), (56, 98)]):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(numbered_picture(i, height, 208)[:, :width]).save(paths[-1])
    row = {
        "image": paths,
        "conversations": [{"from": "human", "value": "<image>\nA\n<image>\nB"}, {"from": "gpt", "value": "C"}],
    }
    got = sample(row, tiny)
    check(got, tiny, "<|im_start|>user\n<i*30>\nA<i*28>\nB<|im_end|>\n<|im_start|>assistant\n[[C<|im_end|>]]\n")
    assert got["image_grid_thw"].tolist() == [[1, 5, 6], [1, 7, 4]]
    merged = sample(row, tiny, processor_options={"image_merge_size": 2})
    assert merged["image_merge_sizes"].tolist() == [2, 2]


def test_too_long_raises_with_the_count_after_pruning(tiny, clip):
    row = {"video": [clip], "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    length = len(sample(row, tiny)["input_ids"])
    assert len(sample(row, tiny, max_length=length)["input_ids"]) == length
    with pytest.raises(
        SampleTooLongError,
        match=rf"at most max_length={length - 1} tokens after pruning, got {length}: lower max_frames",
    ):
        sample(row, tiny, max_length=length - 1)


def two_videos(clip):
    video = {"type": "video", "video": clip}
    return messages(
        ("user", [video, "Q"]), ("assistant", "A"), ("user", ["R", {**video, "fps": 2}]), ("assistant", "B")
    )


def test_truncation_keeps_whole_frames_and_their_tensors(tiny, clip):
    row = two_videos(clip)
    whole = sample(row, tiny)
    kept = whole["video_compression_mask"].view(-1, 21).sum(1).tolist()
    assert len(kept) == 15
    first = ",".join(f"Time {i}.0s:<v*{count}>" for i, count in enumerate(kept[:5]))
    opening = f"<|im_start|>user\n{first}\nQ<|im_end|>\n<|im_start|>assistant\n[[A<|im_end|>]]\n<|im_start|>user\nR"
    start = len(by_hand(tiny, opening)[0])
    frame = f"Time 0.0s:<v*{kept[5]}>"
    length = len(by_hand(tiny, frame)[0])
    # One token short of the frame, and anywhere inside its time: it goes with its time.
    for limit in (start, start + 1, start + 10, start + length - 1):
        got = sample(row, tiny, max_length=limit, overflow="truncate")
        check(got, tiny, opening)
        assert got["video_grid_thw"].tolist() == [[5, 6, 14]]
    got = sample(row, tiny, max_length=start + length, overflow="truncate")
    check(got, tiny, opening + frame)
    second = f",Time 0.5s:<v*{kept[6]}>"
    for limit in (start + length + 1, start + length + len(by_hand(tiny, second)[0]) - 1):
        check(sample(row, tiny, max_length=limit, overflow="truncate"), tiny, opening + frame)
    got = sample(row, tiny, max_length=start + length + len(by_hand(tiny, second)[0]), overflow="truncate")
    check(got, tiny, opening + frame + second)
    assert got["video_grid_thw"].tolist() == [[5, 6, 14], [2, 6, 14]]
    assert torch.equal(got["pixel_values_videos"], whole["pixel_values_videos"][: 7 * 84])
    assert torch.equal(got["video_compression_mask"], whole["video_compression_mask"][: 7 * 21])
    assert int(got["video_compression_mask"].sum()) == int((got["input_ids"] == tiny.video_token_id).sum())


def test_truncation_inside_text(tiny):
    got = sample(messages(("user", "Q"), ("assistant", "answer")), tiny, max_length=21, overflow="truncate")
    check(got, tiny, "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n[[a]]")
    with pytest.raises(ValueError, match="an answer to learn within the first 20 of 28 tokens, got none"):
        sample(messages(("user", "Q"), ("assistant", "answer")), tiny, max_length=20, overflow="truncate")


def test_stream_row_with_balancing(tiny, clip):
    row = stream(clip, ("user", "Tell", 1.0), ("assistant", "now", 3.0), ("assistant", "end", 3.5), start=0)
    got = sample(row, tiny)
    kept = got["video_compression_mask"].view(4, 21).sum(1).tolist()
    frames = [f"stream\nTime {i}.0s: <v*{count}>\n<|stream_end|>" for i, count in enumerate(kept)]

    # After frames 0 and 2 the model stays silent, after 1 and 3 it speaks: two and two, all are learnt. What
    # follows the assistant is no choice after a frame.
    text = (
        f"<|stream_start|>{frames[0]}[[<|stream_start|>]]{frames[1]}[[<|im_start|>]]user\nTell<|im_end|>\n"
        f"<|stream_start|>{frames[2]}[[<|stream_start|>]]{frames[3]}[[<|im_start|>]]assistant\n[[now<|im_end|>]]\n"
        "<|im_start|>assistant\n[[end<|im_end|>]]\n"
    )
    check(got, tiny, text)
    assert got["video_grid_thw"].tolist() == [[4, 6, 14]]
    # Pruned against the frame before it, across the message between them.
    assert kept[3] == 1


def test_stream_row_drops_positions_of_the_commoner_token(tiny, clip):
    row = stream(clip, ("assistant", "now", 4.0))
    starts = {"silent": "<|stream_start|>", "speak": "<|im_start|>"}
    ids = {name: tiny.tokenizer.convert_tokens_to_ids(token) for name, token in starts.items()}
    chosen = set()
    for seed in range(12):
        got = sample(row, tiny, seed=(seed, 3))
        assert torch.equal(got["labels"], sample(row, tiny, seed=(seed, 3))["labels"])
        silent = [i for i, label in enumerate(got["labels"].tolist()) if label == ids["silent"]]
        assert len(silent) == 1
        assert got["labels"].tolist().count(ids["speak"]) == 1
        chosen.update(silent)
        # A choice of four: after frames 0 to 3; the first token of all is none.
        possible = [i for i, token in enumerate(got["input_ids"].tolist()) if token == ids["silent"]][1:]
        assert len(possible) == 4
        assert set(silent) <= set(possible)
    assert len(chosen) > 2


def test_a_stream_that_is_silent_throughout_keeps_its_targets(tiny, clip):
    row = stream(clip, ("user", "Tell", 0.0), ("assistant", "Yes", 0.0), ("user", "Bye", 3.0))
    got = sample(row, tiny)
    silent = tiny.tokenizer.convert_tokens_to_ids("<|stream_start|>")
    # Two silent (after frames 1 and 2), two to speak (after frames 0 and 3).
    assert got["labels"].tolist().count(silent) == 2
    positions, ids = np.array([3, 9, 14]), np.array([7, 7, 7])
    assert balanced_positions(positions, ids, seed=(0, 0)).tolist() == [3, 9, 14]
    assert balanced_positions(positions[:0], ids[:0], seed=(0, 0)).tolist() == []
    mixed = balanced_positions(np.arange(10), np.array([1, 2, 1, 1, 1, 2, 1, 1, 1, 1]), seed=(0, 0)).tolist()
    assert {1, 5} < set(mixed)
    assert len(mixed) == 4
    assert mixed == sorted(mixed)


def test_stream_windows_and_limits(tiny, clip):
    turns = [("user", "a", 2.0), ("assistant", "b", 3.0), ("assistant", "c", 4.0)]
    got = sample(stream(clip, *turns, start=2), tiny)
    # Times count from the window's start.
    assert re.findall(r"Time (.*?)s: ", tiny.tokenizer.decode(got["input_ids"])) == ["0.0", "1.0", "2.0"]
    few = sample(stream(clip, *turns, start=2), tiny, stream_max_frames=1)
    # The second frame, at 3 s, is dropped, and with it what is said from then on.
    shown = tiny.tokenizer.decode(few["input_ids"])
    assert shown.endswith("<|stream_end|><|im_start|>user\na<|im_end|>\n")
    assert few["video_grid_thw"].tolist() == [[1, 6, 14]]
    truncated = sample(stream(clip, *turns, start=2), tiny, max_length=len(few["input_ids"]) + 19, overflow="truncate")
    # A frame that does not fit goes with its whole message.
    assert torch.equal(truncated["input_ids"], few["input_ids"])
    assert truncated["video_grid_thw"].tolist() == [[1, 6, 14]]


@pytest.mark.parametrize(
    ("turns", "options", "error", "message"),
    [
        ([("assistant", "a", None)], {}, TypeError, "message 0 as a dict with its `time` in seconds"),
        ([("user", "a", 3.0), ("assistant", "b", 2.0)], {}, ValueError, r"message 1 at 2.0 s after 3.0 s"),
        (
            [("assistant", "a", 1.0)],
            {"start": 2},
            ValueError,
            r"at or after the first frame, at 2.0 s, got the last at 1.0 s",
        ),
        ([("assistant", "a", 1.0)], {"limit": 1}, ValueError, r"a message before frame 1 of the stream, at 1.0 s"),
    ],
)
def test_bad_streams(tiny, clip, turns, options, error, message):
    row = stream(clip, *turns, start=options.get("start", 0))
    with pytest.raises(error, match=message):
        sample(row, tiny, stream_max_frames=options.get("limit", 400))
