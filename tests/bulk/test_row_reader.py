"""What counts as the fault of a medium."""

import errno

import pytest

from videollama3.bulk.input_rows import RowDefaults, open_input
from videollama3.bulk.row_reader import FailedRow, RowReader
from videollama3.processing.processing_videollama3 import VideoLlama3Processor


@pytest.fixture
def row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"video": "absent.mp4"}\n')
    return open_input(str(path), RowDefaults(prompt="What?"))[0]


def test_a_missing_file_is(processor, row):
    failed = RowReader(processor).read(row)
    assert isinstance(failed, FailedRow)
    assert failed.reason.endswith("absent.mp4': no such file.")


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (TimeoutError("too slow"), True),
        (OSError(errno.EIO, "bad disk"), True),
        (OSError(errno.ENOMEM, "no memory"), False),
        (OSError(errno.EMFILE, "too many files"), False),
        (MemoryError(), False),
        (AttributeError("a bug"), False),
        (TypeError("a bug"), False),
    ],
)
def test_running_out_of_something_and_bugs_are_not(processor, row, monkeypatch, error, counts):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(VideoLlama3Processor, "encode_conversation", fail)
    if counts:
        assert RowReader(processor).read(row).reason == str(error)
    else:
        with pytest.raises(type(error)):
            RowReader(processor).read(row)


def test_settings_that_would_fail_every_row_are_seen_before(processor):
    import copy

    other = copy.deepcopy(processor)
    RowReader(other).check()
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match="pixel_dtype='uint8'"):
        RowReader(other).check()
