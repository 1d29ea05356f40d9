"""The datasets: every source, names of bad rows, skipping, workers and ranks."""

import csv
import json
import logging
import pickle

import pytest
import torch

from tests.media import write_clip
from videollama3.random_checkpoint import build_random
from videollama3.training.training_dataset import StreamingTrainingDataset, TrainingDataset


@pytest.fixture(scope="module")
def tiny():
    return build_random()[1]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("media") / "clip.mp4", 50, 25)


def qa(answer, **media):
    return {**media, "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": answer}]}


def write_lines(path, rows):
    path.write_text("\n\n".join(json.dumps(row) if isinstance(row, dict) else row for row in rows) + "\n")
    return str(path)


def answer(sample, processor):
    learnt = sample["labels"][sample["labels"] != -100]
    return processor.tokenizer.decode(learnt).removesuffix("<|im_end|>")


def test_json_lines_and_arrays_and_lists_of_them(tiny, tmp_path, clip):
    lines = write_lines(tmp_path / "a.jsonl", [qa("é1"), qa("2")])
    (tmp_path / "b.json").write_text(json.dumps([qa("3", video="clip.mp4"), qa("4")]))
    (tmp_path / "clip.mp4").symlink_to(clip)
    # Relative paths start from the folder of the rows.
    dataset = TrainingDataset([lines, tmp_path / "b.json"], tiny)
    assert len(dataset) == 4
    assert [answer(dataset[i], tiny) for i in range(4)] == ["é1", "2", "3", "4"]
    assert [dataset.name(i) for i in range(4)] == ["a.jsonl row 0", "a.jsonl row 1", "b.json row 0", "b.json row 1"]
    assert dataset[2]["video_grid_thw"].tolist() == [[2, 6, 14]]
    assert dataset.check_rows() == []
    with pytest.raises(IndexError, match="a row from 0 to 3, got 4"):
        dataset[4]


def test_rows_of_mixed_forms_in_memory(tiny, clip):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": [{"type": "text", "text": "1"}]},
            ]
        },
        qa("2", video=clip),
        {
            "stream": True,
            "video": clip,
            "start_time": 0,
            "end_time": 2,
            "conversation": [{"role": "assistant", "content": "3", "time": 1}],
        },
    ]
    dataset = TrainingDataset(rows, tiny)
    assert [dataset.row(i).kind for i in range(3)] == ["text", "video", "stream"]
    assert set(dataset[1]) == {
        "input_ids",
        "labels",
        "pixel_values_videos",
        "video_grid_thw",
        "video_merge_sizes",
        "video_compression_mask",
    }
    copy = pickle.loads(pickle.dumps(dataset))
    for i in range(3):
        assert all(torch.equal(value, copy[i][key]) for key, value in dataset[i].items())


BAD = [
    (qa("A", image="no.png"), "existing path"),
    ("{broken", "the row as JSON, got something else: Expecting property name"),
    (qa(""), "an answer in message 1, got an empty one"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_raises_with_file_number_and_reason(tiny, tmp_path, row, reason):
    dataset = TrainingDataset(write_lines(tmp_path / "train.jsonl", [qa("A"), row]), tiny)
    assert answer(dataset[0], tiny) == "A"
    with pytest.raises(ValueError, match=rf"^train.jsonl row 1: .*{reason}"):
        dataset[1]
    with pytest.raises(ValueError, match=r"good rows only, got 1 bad of 2: train.jsonl row 1: .*on_error='skip'"):
        dataset.check_rows()


def test_skipping_counts(tiny, tmp_path, caplog):
    rows = [qa("A"), *(row for row, _ in BAD), qa("B")]
    path = write_lines(tmp_path / "train.jsonl", rows)
    dataset = TrainingDataset(path, tiny, on_error="skip")
    with caplog.at_level(logging.WARNING):
        samples = [dataset[i] for i in range(5)]
    assert [sample is None for sample in samples] == [False, True, True, True, False]
    assert [row.name for row in dataset.skipped] == [f"train.jsonl row {i}" for i in (1, 2, 3)]
    assert caplog.messages == [f"skipped {row}" for row in dataset.skipped]
    assert [row.name for row in dataset.check_rows()] == [row.name for row in dataset.skipped]
    streamed = StreamingTrainingDataset(path, tiny, on_error="skip")
    assert [answer(sample, tiny) for sample in streamed] == ["A", "B"]
    assert len(streamed.skipped) == 3
    with pytest.raises(ValueError, match=r"^train.jsonl row 1: "):
        list(StreamingTrainingDataset(path, tiny))


def test_long_samples(tiny):
    rows = [qa("short"), qa("long" * 30)]
    with pytest.raises(ValueError, match=r"^rows row 1: .*at most max_length=60 tokens"):
        TrainingDataset(rows, tiny, max_length=60)[1]
    skipping = TrainingDataset(rows, tiny, max_length=60, overflow="skip")
    assert [skipping[i] is None for i in range(2)] == [False, True]
    assert "max_length=60" in skipping.skipped[0].reason
    cut = TrainingDataset(rows, tiny, max_length=60, overflow="truncate")
    assert len(cut[1]["input_ids"]) == 60


def test_wrong_options_show_at_once(tiny):
    with pytest.raises(TypeError, match="got max_frame"):
        TrainingDataset([qa("A")], tiny, on_error="skip", max_frame=3)
    with pytest.raises(ValueError, match="on_error 'raise' or 'skip', got 'ignore'"):
        TrainingDataset([qa("A")], tiny, on_error="ignore")
    with pytest.raises(ValueError, match="overflow 'raise', 'truncate' or 'skip', got 'cut'"):
        TrainingDataset([qa("A")], tiny, overflow="cut")
    with pytest.raises(FileNotFoundError, match=r"rows in 'no.jsonl', got no such file"):
        TrainingDataset("no.jsonl", tiny)
    with pytest.raises(TypeError, match="got generator: a streamed dataset goes to StreamingTrainingDataset"):
        TrainingDataset((row for row in []), tiny)


def test_wrong_files(tiny, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"rows in empty.jsonl, got none"):
        TrainingDataset(tmp_path / "empty.jsonl", tiny)
    (tmp_path / "dict.json").write_text("{}")
    with pytest.raises(ValueError, match=r"dict.json' as a list of rows, got dict: use .jsonl"):
        TrainingDataset(tmp_path / "dict.json", tiny)
    (tmp_path / "rows.txt").write_text("a,b\n")
    expected = r"ends in .json, .jsonl, .parquet, .csv, a folder or a Hub id, got the file '.*rows.txt'"
    with pytest.raises(ValueError, match=expected):
        TrainingDataset(tmp_path / "rows.txt", tiny)
    with pytest.raises(FileNotFoundError, match=r"Expected rows in '.*no.parquet', got no such file"):
        TrainingDataset(tmp_path / "no.parquet", tiny)


def test_the_fingerprint_changes_with_what_a_sample_depends_on(tiny, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [qa("A")])
    first = TrainingDataset(path, tiny).fingerprint()
    assert TrainingDataset(path, tiny).fingerprint() == first
    others = [
        TrainingDataset(path, tiny, max_frames=4).fingerprint(),
        TrainingDataset(path, tiny, seed=1).fingerprint(),
        TrainingDataset(path, tiny, image_merge_size=2).fingerprint(),
        TrainingDataset([qa("A")], tiny).fingerprint(),
        TrainingDataset([qa("B")], tiny).fingerprint(),
    ]
    other_processor = build_random()[1]
    other_processor.video_processor.fps = 2
    others.append(TrainingDataset(path, other_processor).fingerprint())
    write_lines(tmp_path / "a.jsonl", [qa("AB")])
    others.append(TrainingDataset(path, tiny).fingerprint())
    assert len({first, *others}) == len(others) + 1


def test_streaming_shares_rows_out_among_ranks_and_workers(tiny, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [qa(str(i)) for i in range(11)])
    seen = []
    for rank in range(2):
        dataset = StreamingTrainingDataset(path, tiny, rank=rank, world_size=2)
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
        own = [answer(sample, tiny) for sample in loader]
        seen.append(own)
    assert sorted(int(text) for own in seen for text in own) == list(range(11))
    assert all(len(own) >= 5 for own in seen)


def test_loaded_and_streamed_datasets(tiny, tmp_path, clip, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    conversation = qa("1")["conversations"]
    table = datasets.Dataset.from_list(
        [{"image": None, "video": [clip], "conversations": conversation}, {"conversations": qa("2")["conversations"]}]
    )
    loaded = TrainingDataset(table, tiny)
    assert [answer(loaded[i], tiny) for i in range(2)] == ["1", "2"]
    assert loaded[0]["video_grid_thw"].tolist() == [[2, 6, 14]]
    assert "video_grid_thw" not in loaded[1]
    assert loaded.fingerprint() == TrainingDataset(table, tiny).fingerprint()
    (tmp_path / "rows").mkdir()
    table.to_parquet(str(tmp_path / "rows" / "train.parquet"))
    folder = TrainingDataset(tmp_path / "rows", tiny)
    assert [answer(folder[i], tiny) for i in range(2)] == ["1", "2"]
    streamed = StreamingTrainingDataset(tmp_path / "rows", tiny)
    assert [answer(sample, tiny) for sample in streamed] == ["1", "2"]
    workers = StreamingTrainingDataset(table.to_iterable_dataset(num_shards=2), tiny)
    loader = torch.utils.data.DataLoader(workers, batch_size=None, num_workers=2)
    assert sorted(answer(sample, tiny) for sample in loader) == ["1", "2"]
    for rank in range(2):
        iterable = table.to_iterable_dataset()
        part = StreamingTrainingDataset(iterable, tiny, rank=rank, world_size=2)
        assert [answer(sample, tiny) for sample in part] == [str(rank + 1)]


def test_small_files_are_shared_out_together(tiny, tmp_path):
    """Of files with fewer rows than processes, each alone would leave the same ones without any."""
    paths = [write_lines(tmp_path / f"{i}.jsonl", [qa(str(3 * i + j)) for j in range(3)]) for i in range(4)]
    seen = [
        [answer(sample, tiny) for sample in StreamingTrainingDataset(paths, tiny, rank=rank, world_size=6)]
        for rank in range(6)
    ]
    assert [len(own) for own in seen] == [2] * 6
    assert sorted(int(text) for own in seen for text in own) == list(range(12))


def test_several_sources_are_streamed_one_after_the_other(tiny, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, texts in (("a", "12"), ("b", "34")):
        (tmp_path / name).mkdir()
        table = datasets.Dataset.from_list([{"conversations": qa(text)["conversations"]} for text in texts])
        table.to_parquet(str(tmp_path / name / "train.parquet"))
    path = write_lines(tmp_path / "c.jsonl", [qa("5")])
    # A table that is loaded whole would be read from a cache.
    monkeypatch.setattr(datasets.Dataset, "__getitem__", None)
    streamed = StreamingTrainingDataset([tmp_path / "a", path, tmp_path / "b"], tiny)
    assert [answer(sample, tiny) for sample in streamed] == ["1", "2", "5", "3", "4"]
    # A file of parquet is one shard, and a second worker would get nothing of it.
    assert streamed.max_workers() == 1
    # Of one row, too.
    assert StreamingTrainingDataset(path, tiny).max_workers() == 1
    three = write_lines(tmp_path / "d.jsonl", [qa(text) for text in "678"])
    assert StreamingTrainingDataset(three, tiny).max_workers() == 3
    assert StreamingTrainingDataset(three, tiny, rank=1, world_size=2).max_workers() == 1


def test_tables_and_folders_have_their_media_beside_them(tiny, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "rows"
    folder.mkdir()
    Image.new("RGB", (56, 42), "red").save(folder / "a.png")
    row = {"image": ["a.png"], "conversations": qa("A")["conversations"]}
    datasets.Dataset.from_list([row]).to_parquet(str(folder / "train.parquet"))
    for source in (folder, folder / "train.parquet"):
        assert TrainingDataset(source, tiny)[0]["image_grid_thw"].tolist() == [[1, 4, 5]]
        (streamed,) = StreamingTrainingDataset(source, tiny)
        assert streamed["image_grid_thw"].tolist() == [[1, 4, 5]]


def test_another_split_and_configuration(tiny, tmp_path, monkeypatch):
    """A folder laid out as a repository of the Hub, its configurations in the head of its README."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    head = ["---", "configs:"]
    for config_name in ("short", "long"):
        head += [f"- config_name: {config_name}", "  data_files:"]
        for split in ("train", "validation"):
            path = f"{config_name}-{split}.parquet"
            table = datasets.Dataset.from_list([{"conversations": qa(f"{config_name} {split}")["conversations"]}])
            table.to_parquet(str(folder / path))
            head += [f"  - split: {split}", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join([*head, "---", ""]))
    for config_name in ("short", "long"):
        for split in ("train", "validation"):
            choice = {"split": split, "config_name": config_name}
            assert answer(TrainingDataset(folder, tiny, **choice)[0], tiny) == f"{config_name} {split}"
            (streamed,) = StreamingTrainingDataset(folder, tiny, **choice)
            assert answer(streamed, tiny) == f"{config_name} {split}"


def test_picture_columns_are_not_decoded_by_datasets(tiny, tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    Image.new("RGB", (56, 42), "red").save(tmp_path / "a.png")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
        }
    )
    row = {"image": str(tmp_path / "a.png"), "conversations": qa("A")["conversations"]}
    table = datasets.Dataset.from_list([row], features=features)
    sample = TrainingDataset(table, tiny)[0]
    assert sample["image_grid_thw"].tolist() == [[1, 4, 5]]


def test_json_under_the_other_suffix(tiny, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps([qa("A"), qa("B")], indent=1))
    with pytest.raises(ValueError, match=r"in each line of '.*a.jsonl', got a list: name it .json"):
        TrainingDataset(tmp_path / "a.jsonl", tiny)
    (tmp_path / "b.json").write_text(f"{json.dumps(qa('A'))}\n{json.dumps(qa('B'))}\n")
    with pytest.raises(ValueError, match=r"Extra data: .*: one row a line is a .jsonl file"):
        TrainingDataset(tmp_path / "b.json", tiny)


def test_rows_of_a_csv_file(tiny, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["conversations", "id"])
        writer.writeheader()
        writer.writerows({"conversations": json.dumps(qa(text)["conversations"]), "id": text} for text in "AB")
    rows = TrainingDataset(tmp_path / "rows.csv", tiny)
    assert [answer(rows[i], tiny) for i in range(2)] == ["A", "B"]
