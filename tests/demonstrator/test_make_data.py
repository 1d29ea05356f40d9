"""Files and rows of the training data."""

import json

import numpy as np
from demonstrator.make_data import PICTURES, Counts, make_data, make_picture, make_stream
from PIL import Image

from videollama3.training.dataset_rows import missing_files, read_row

COUNTS = Counts(captions=3, pictures=2, clips=1, streams=1, review=2, heldout=1)


def test_rows_are_what_training_reads(tmp_path):
    written = make_data(tmp_path, counts=COUNTS, processes=1)
    assert written == {
        "captions": 3,
        "pictures": 2,
        "clips": 1,
        "streams": 1,
        "review": 2,
        "heldout_pictures": 1,
        "heldout_clips": 1,
    }
    for name, kind in (
        ("captions", "image"),
        ("pictures", "image"),
        ("clips", "video"),
        ("streams", "stream"),
        ("heldout_clips", "video"),
    ):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == written[name]
        for row in rows:
            checked = read_row(row, media_root=tmp_path)
            assert checked.kind == kind
            assert not missing_files(checked)


def test_the_same_seed_makes_the_same_file_in_any_order(tmp_path):
    (tmp_path / "pictures").mkdir()
    options = {"folder": tmp_path, "part": PICTURES, "seed": 7}
    first = make_picture(3, **options)
    pixels = np.asarray(Image.open(tmp_path / "pictures/000003.png"))
    make_picture(2, **options)
    assert make_picture(3, **options) == first
    assert (np.asarray(Image.open(tmp_path / "pictures/000003.png")) == pixels).all()
    assert make_picture(3, **{**options, "seed": 8}) != first


def test_a_streaming_answer_stands_at_the_time_of_its_event(tmp_path):
    (tmp_path / "streams").mkdir()
    (row,) = make_stream(0, folder=tmp_path, seed=0)
    user, assistant = (message for message in row["conversation"] if message["role"] != "system")
    assert user["role"] == "user"
    assert user["time"] < 0.0, "before the first frame, as watch puts it"
    assert 0.5 <= assistant["time"] < row["end_time"]
    assert assistant["content"].endswith(" now.")
