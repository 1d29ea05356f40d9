"""Which media a server opens for its clients: real files, links and names."""

import pytest

from videollama3.serving.media_access import MediaAccess


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a b.mp4").write_bytes(b"x")
    (tmp_path / "root-beside").mkdir()
    (tmp_path / "root-beside" / "c.mp4").write_bytes(b"x")
    (folder / "out").symlink_to(tmp_path / "root-beside")
    (folder / "round").symlink_to(folder / "round")
    return folder


@pytest.mark.parametrize("url", ["data:video/mp4;base64,AA", "http://a/b.mp4", "HTTPS://a/b.mp4"])
def test_urls_pass_with_and_without_a_root(root, url):
    assert MediaAccess(root).admit(url, what="video") == url
    assert MediaAccess().admit(url, what="video") == url


@pytest.mark.parametrize(
    "name", ["inner/a b.mp4", "inner/../inner/a b.mp4", "{root}/inner/a b.mp4", "file://{root}/inner/a%20b.mp4"]
)
def test_files_below_the_root(root, name):
    name = name.format(root=root)
    assert MediaAccess(root).admit(name, what="video") == str(root / "inner" / "a b.mp4")
    with pytest.raises(ValueError, match=r"Expected message 0 .* without --media-root"):
        MediaAccess().admit(name, what="message 0")


def test_a_root_that_is_a_link_is_followed(root, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(root)
    assert MediaAccess(link).admit("inner/a b.mp4", what="video") == str(root / "inner" / "a b.mp4")
    assert MediaAccess(root).admit(f"{link}/inner/a b.mp4", what="video") == str(root / "inner" / "a b.mp4")


@pytest.mark.parametrize(
    "name", ["../root-beside/c.mp4", "{root}-beside/c.mp4", "out/c.mp4", "file://{root}/%2e%2e/root-beside/c.mp4", "/"]
)
def test_nothing_outside_the_root(root, name):
    with pytest.raises(ValueError, match="below the media root of this server"):
        MediaAccess(root).admit(name.format(root=root), what="video")


@pytest.mark.parametrize("name", ["", "inner", "absent.mp4", "round", "inner/a b.mp4/x"])
def test_only_files_that_are_there(root, name):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        MediaAccess(root).admit(name, what="video")


@pytest.mark.parametrize("address", ["ftp://a/b", "rtsp://a/b", "concat:a", "pipe:0", "C+:x"])
def test_other_schemes(root, address):
    with pytest.raises(ValueError, match="as a data:, http: or https: URL"):
        MediaAccess(root).admit(address, what="video")


@pytest.mark.parametrize("address", [None, 3, b"a", {"url": "a"}])
def test_what_is_no_string(root, address):
    with pytest.raises(TypeError, match="with its URL as a string"):
        MediaAccess(root).admit(address, what="video")


def test_a_root_that_is_no_folder(tmp_path):
    with pytest.raises(NotADirectoryError, match="media root as a folder"):
        MediaAccess(tmp_path / "absent")
