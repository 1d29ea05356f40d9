"""What a run leaves behind, and what the next one makes of it."""

import json
import os

import pytest

from videollama3.bulk.input_rows import RowDefaults, open_input
from videollama3.bulk.result_file import ResultFile

SETTINGS = {"format": 1, "model": "DIR", "prompt": "What?"}


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"video": f"{i}.mp4"}) + "\n" for i in range(5)))
    return open_input(str(path), RowDefaults(prompt="What?"))


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "deep" / "out.jsonl")


def result(rows, index, **more):
    return {"index": index, "answer": f"answer {index} é", **more, "key": rows.key(index)}


def write(path, rows, *indices, failed=()):
    with ResultFile(path, SETTINGS, rows) as file:
        for index in indices:
            file.write(result(rows, index, **({"error": "bad"} if index in failed else {})))


def pending(path, rows, **options):
    with ResultFile(path, SETTINGS, rows, **options) as file:
        return list(file.pending())


def lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_what_is_done_is_not_pending(path, rows):
    assert pending(path, rows) == [0, 1, 2, 3, 4]
    write(path, rows, 3, 0, failed=[3])
    with ResultFile(path, SETTINGS, rows) as file:
        assert (file.num_answered, file.num_failed) == (1, 1)
        assert list(file.pending()) == [1, 2, 4]
        file.write(result(rows, 4))
        assert (file.num_answered, list(file.pending())) == (2, [1, 2])
    assert [line["index"] for line in lines(path)] == [3, 0, 4]


def test_a_line_stands_when_write_returns(path, rows):
    with ResultFile(path, SETTINGS, rows) as file:
        file.write(result(rows, 2))
        assert lines(path) == [result(rows, 2)]


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_torn_line_is_cut_off(path, rows, cut):
    write(path, rows, 0, 1)
    whole = os.path.getsize(path)
    write(path, rows, 2)
    os.truncate(path, os.path.getsize(path) - cut)
    assert pending(path, rows) == [2, 3, 4]
    assert os.path.getsize(path) == whole
    write(path, rows, 2)
    assert [line["index"] for line in lines(path)] == [0, 1, 2]


def test_a_long_torn_line(path, rows):
    write(path, rows, 0)
    with open(path, "ab") as file:
        file.write(b'{"index": 1, "answer": "' + b"x" * 300_000)
    assert pending(path, rows) == [1, 2, 3, 4]
    os.truncate(path, 30)
    assert pending(path, rows) == [0, 1, 2, 3, 4]
    assert os.path.getsize(path) == 0


def test_a_record_that_was_cut_off_before_the_first_result(path, rows):
    write(path, rows)
    os.truncate(f"{path}.run.json", 9)
    assert pending(path, rows) == [0, 1, 2, 3, 4]
    with open(f"{path}.run.json", encoding="utf-8") as file:
        assert json.load(file) == SETTINGS


def test_failures_are_done_again_when_asked(path, rows):
    write(path, rows, 0, 1, 2, failed=[0, 2])
    os.chmod(path, 0o640)
    assert pending(path, rows) == [3, 4]
    assert pending(path, rows, retry_failed=True) == [0, 2, 3, 4]
    assert [line["index"] for line in lines(path)] == [1]
    assert os.stat(path).st_mode & 0o777 == 0o640
    assert sorted(os.listdir(os.path.dirname(path))) == ["out.jsonl", "out.jsonl.run.json"]


def test_results_of_another_run_are_refused(path, rows):
    write(path, rows, 0)
    with pytest.raises(
        ValueError, match=r"some with model 'DIR' \(now 'OTHER'\), seed None \(now 1\): pass --overwrite"
    ):
        ResultFile(path, {**SETTINGS, "model": "OTHER", "seed": 1}, rows)
    assert lines(path) == [result(rows, 0)]
    with ResultFile(path, {**SETTINGS, "model": "OTHER"}, rows, overwrite=True) as file:
        assert len(list(file.pending())) == 5
    assert lines(path) == []


def test_results_of_another_input_are_refused(path, rows, tmp_path):
    write(path, rows, 0, 3)
    changed = tmp_path / "rows.jsonl"
    text = changed.read_text()
    changed.write_text(text + json.dumps({"video": "more.mp4"}) + "\n")
    assert pending(path, open_input(str(changed), RowDefaults())) == [1, 2, 4, 5]
    changed.write_text(text.replace("3.mp4", "other.mp4"))
    with pytest.raises(ValueError, match=r"line 2 to answer row 3 of .*rows.jsonl', got the answer to another row"):
        pending(path, open_input(str(changed), RowDefaults()))
    changed.write_text("".join(text.splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError, match="line 2 to answer row 3"):
        pending(path, open_input(str(changed), RowDefaults()))


def test_files_of_others_are_left_alone(path, rows):
    os.makedirs(os.path.dirname(path))
    with open(path, "w", encoding="utf-8") as file:
        file.write("mine\n")
    with pytest.raises(
        FileExistsError, match=r"got a file without '.*out.jsonl.run.json' beside it: pass --overwrite"
    ):
        ResultFile(path, SETTINGS, rows)
    assert os.listdir(os.path.dirname(path)) == ["out.jsonl"]
    assert pending(path, rows, overwrite=True) == [0, 1, 2, 3, 4]


def test_damage_in_the_middle_is_no_torn_line(path, rows):
    write(path, rows, 0, 1)
    with open(path, "ab") as file:
        file.write(b"\0\0\0\n")
    with pytest.raises(ValueError, match="line 3 as a result of this command"):
        pending(path, rows)


def test_a_row_that_stands_twice(path, rows):
    write(path, rows, 0)
    with open(path, "ab") as file:
        file.write(json.dumps(result(rows, 0)).encode() + b"\n")
    with pytest.raises(ValueError, match=r"each row once .*got row 0 again in line 2"):
        pending(path, rows)


def test_one_run_at_a_time(path, rows):
    with (
        ResultFile(path, SETTINGS, rows),
        pytest.raises(RuntimeError, match="written by one run at a time, got another that is at work"),
    ):
        ResultFile(path, SETTINGS, rows)
    assert len(pending(path, rows)) == 5
