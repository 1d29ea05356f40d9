"""Files that appear whole, and locks that end with their process."""

import errno
import fcntl
import subprocess
import sys
import threading

import pytest

from videollama3.whole_files import lock, locked, write_whole

HOLDER = """
import sys
from videollama3.whole_files import locked

with locked(sys.argv[1]):
    print("inside", flush=True)
    sys.stdin.read()
"""


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "record.json"
    texts = [letter * 5000 for letter in "abc"]
    write_whole(path, texts[0])
    writers = [
        threading.Thread(target=lambda text=text: [write_whole(path, text) for _ in range(60)]) for text in texts
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "record.json"
    write_whole(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "after \ud800")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path):
    path = tmp_path / "lengths.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "inside\n"
        with open(path, "ab") as file:
            assert not lock(file, wait=False)
        holder.kill()
        with locked(path):
            pass
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.parametrize(("number", "is_error"), [(errno.ENOSYS, False), (errno.ENOLCK, False), (errno.EBADF, True)])
def test_a_disk_without_locks_that_is_pretended_is_used_without(tmp_path, monkeypatch, number, is_error):
    def flock(file, how):
        raise OSError(number, "pretended")

    monkeypatch.setattr(fcntl, "flock", flock)
    with open(tmp_path / "lock", "ab") as file:
        if is_error:
            with pytest.raises(OSError, match="pretended"):
                lock(file, wait=True)
        else:
            assert lock(file, wait=True)
