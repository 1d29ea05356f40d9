"""What several files of training tests start from."""

import pytest

from .tiny_task import write_checkpoint, write_rows


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A checkpoint's folder and a file of rows."""
    folder = tmp_path_factory.mktemp("task")
    return write_checkpoint(folder / "start"), write_rows(folder / "data")
