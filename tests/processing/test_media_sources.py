"""Every way to hand over a file or a picture, and what is said about those that cannot be read."""

import base64
import functools
import http.server
import io
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import GOLDEN
from videollama3.processing import media_sources
from videollama3.processing.media_sources import describe, frames_to_rgb, load_picture, open_source


def ramp(height=6, width=9):
    """uint8 (height, width, 3), all values different along every axis."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 20, columns * 25, 255 - rows * 20 - columns], axis=-1).astype(np.uint8)


def encoded(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "a b#1.png"
    path.write_bytes(encoded(Image.fromarray(ramp())))
    return path


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/picture.png")
            self.end_headers()
        elif self.path in ("/cut", "/endless", "/slow"):
            self.send_response(200)
            if self.path == "/cut":
                self.send_header("Content-Length", "3000")
            self.end_headers()
            for _ in range({"/cut": 1, "/endless": 10_000, "/slow": 100}[self.path]):
                try:
                    self.wfile.write(bytes(1000))
                except OSError:
                    return
                time.sleep(0.05 if self.path == "/slow" else 0)
        elif self.path == "/secret":
            self.send_error(403, "Forbidden")
        else:
            super().do_GET()


@pytest.fixture
def server(tmp_path):
    (tmp_path / "picture.png").write_bytes(encoded(Image.fromarray(ramp())))
    (tmp_path / "empty.png").write_bytes(b"")
    handler = functools.partial(_QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


FORMS = {
    "str": str,
    "path": lambda path: path,
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "bytesio": lambda path: io.BytesIO(path.read_bytes()),
    "file url": lambda path: path.as_uri(),
    "data url": lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
    "wrapped data url": lambda path: "data:image/png;base64," + base64.encodebytes(path.read_bytes()).decode(),
    "pil": lambda path: Image.open(io.BytesIO(path.read_bytes())),
    "numpy": lambda path: ramp(),
    "numpy channels first": lambda path: ramp().transpose(2, 0, 1),
    "numpy float": lambda path: ramp() / 255,
    "numpy int64": lambda path: ramp().astype(np.int64),
    "torch": lambda path: torch.from_numpy(ramp()).permute(2, 0, 1),
    "torch channels last": lambda path: torch.from_numpy(ramp()),
    "torch float": lambda path: torch.from_numpy(ramp()).permute(2, 0, 1) / 255,
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_picture(png, form):
    picture = load_picture(FORMS[form](png), what="image 0")
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, ramp())


def test_an_open_file_is_read_from_its_beginning_and_left_open(png):
    with open(png, "rb") as file:
        file.seek(10)
        assert np.array_equal(load_picture(file, what="image 0"), ramp())
        assert not file.closed


def test_a_path_below_home(png, monkeypatch):
    monkeypatch.setenv("HOME", str(png.parent))
    assert np.array_equal(load_picture(f"~/{png.name}", what="image 0"), ramp())


def test_bare_base64():
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    text = base64.encodebytes(encoded(Image.fromarray(noise))).decode()
    assert np.array_equal(load_picture(text, what="image 0"), noise)


def test_http(server):
    assert np.array_equal(load_picture(f"{server}/picture.png", what="image 0"), ramp())
    assert np.array_equal(load_picture(f"{server}/moved", what="image 0"), ramp())


def test_http_errors(server):
    with pytest.raises(
        FileNotFoundError, match=r"^Expected image 3 at a URL that answers, got '.*/none.png': 404 File not found\.$"
    ):
        load_picture(f"{server}/none.png", what="image 3")
    with pytest.raises(
        ValueError, match=r"^Expected image 3 at a URL that answers, got '.*/secret': 403 Forbidden\.$"
    ):
        load_picture(f"{server}/secret", what="image 3")
    with pytest.raises(
        ValueError, match=r"^Expected image 3 with content, got http://127\.0\.0\.1:.*: it is empty\.$"
    ):
        load_picture(f"{server}/empty.png", what="image 3")


@pytest.mark.parametrize(
    ("path", "seconds", "expected"),
    [
        ("cut", 60, "the download broke off after 1000 of 3000 bytes"),
        ("endless", 60, "it has more bytes, and at most 50000 are downloaded; fetch it yourself and give the path"),
        ("slow", 0.2, r"the download was not over after 0.2 seconds and \d+ bytes; fetch it yourself .*"),
        ("picture.png", 60, None),
    ],
)
def test_downloads_have_an_end(server, monkeypatch, path, seconds, expected):
    monkeypatch.setattr(media_sources, "MAX_DOWNLOAD_BYTES", 50_000)
    url = f"{server}/{path}"
    if expected is None:
        assert open_source(url, what="video 1", max_seconds=seconds).read(4) == b"\x89PNG"
        return
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"^Expected video 1 at a URL that answers, got '{url}': {expected}\.$"):
        open_source(url, what="video 1", max_seconds=seconds)
    assert time.monotonic() - started < 3


def test_a_size_that_is_too_large_is_refused_before_it_comes(server, monkeypatch):
    monkeypatch.setattr(media_sources, "MAX_DOWNLOAD_BYTES", 10)
    with pytest.raises(ValueError, match=r"it has \d+ bytes, and at most 10 are downloaded"):
        open_source(f"{server}/picture.png", what="video 1")


def test_a_server_that_is_not_there():
    with pytest.raises(
        ValueError, match=r"^Expected video 1 at a URL that answers, got 'http://127\.0\.0\.1:9/x': .*refused"
    ):
        open_source("http://127.0.0.1:9/x", what="video 1")
    with pytest.raises(ValueError, match=r"^Expected video 1 at a URL that answers, got 'http://\[bad/x': "):
        open_source("http://[bad/x", what="video 1")


def test_open_source_resolves_to_a_path_or_a_stream(png):
    assert open_source(png, what="image 0") == str(png)
    assert open_source(png.as_uri(), what="image 0") == str(png)
    assert open_source(str(png.parent), what="video 0") == str(png.parent)
    stream = open_source(png.read_bytes(), what="image 0")
    assert stream.tell() == 0
    assert stream.read() == png.read_bytes()


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("no/such.png", FileNotFoundError, "Expected image 2 at an existing path, got 'no/such.png': no such file."),
        (
            Path("no/such.png"),
            FileNotFoundError,
            "Expected image 2 at an existing path, got 'no/such.png': no such file.",
        ),
        (
            "file:///no/such.png",
            FileNotFoundError,
            "Expected image 2 at an existing path, got '/no/such.png': no such file.",
        ),
        ("", FileNotFoundError, "Expected image 2 at an existing path, got '': no such file."),
        (b"", ValueError, "Expected image 2 with content, got <BytesIO>: it is empty."),
        (io.BytesIO(), ValueError, "Expected image 2 with content, got <BytesIO>: it is empty."),
        (17, TypeError, "Expected image 2 as a path, URL, bytes or binary file object, got int: 17."),
        (None, TypeError, "Expected image 2 as a path, URL, bytes or binary file object, got NoneType: None."),
        ({"a": 1}, TypeError, "Expected image 2 as a path, URL, bytes or binary file object, got dict: {'a': 1}."),
        (
            "data:image/png,abc",
            ValueError,
            "Expected image 2 as a base64 data URL (data:...;base64,...), got 'data:image/png'.",
        ),
        ("data:image/png;base64,a$b", ValueError, "Expected image 2 as valid base64, got data that is not: "),
        (b"hello world", ValueError, "Expected image 2 as an image file, got '<bytes>': format not recognised."),
    ],
)
def test_sources_that_are_none(source, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        load_picture(source, what="image 2")


def test_a_text_file_object():
    with pytest.raises(TypeError, match="Expected image 2 as a path, URL, bytes or binary file object, got StringIO"):
        load_picture(io.StringIO("abc"), what="image 2")


def test_files_that_are_no_pictures(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match=r"^Expected image 1 with content, got '.*empty.png': the file is empty\.$"):
        load_picture(tmp_path / "empty.png", what="image 1")
    with pytest.raises(
        ValueError, match=r"^Expected image 1 as an image file, got '.*text.png': format not recognised\.$"
    ):
        load_picture(tmp_path / "text.png", what="image 1")
    with pytest.raises(ValueError, match=r"^Expected image 1 as an image file, got the folder '.*'\.$"):
        load_picture(tmp_path, what="image 1")


@pytest.mark.parametrize("opened", [False, True])
def test_a_truncated_jpeg(opened):
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)), "JPEG")
    source = data[: len(data) // 2]
    message = r"^Expected image 4 as a whole image file, got '<.*>': image file is truncated .*\.$"
    with pytest.raises(ValueError, match=message):
        load_picture(Image.open(io.BytesIO(source)) if opened else source, what="image 4")


def test_golden_pictures():
    assert load_picture(GOLDEN / "media" / "img1_1023x517.jpg", what="image 0").shape == (517, 1023, 3)
    alpha = load_picture(GOLDEN / "media" / "img2_300x900_alpha.png", what="image 0")
    with Image.open(GOLDEN / "media" / "img2_300x900_alpha.png") as image:
        assert image.mode == "RGBA"
        # Alpha is dropped, not blended.
        assert np.array_equal(alpha, np.asarray(image)[..., :3])


def _palette(transparency):
    image = Image.fromarray(ramp()).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


GREY = ramp()[..., 0]
MODES = {
    "L": (Image.fromarray(GREY), np.stack([GREY] * 3, -1)),
    "LA": (Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (9, 6), 7)]), np.stack([GREY] * 3, -1)),
    "RGBA": (Image.fromarray(np.concatenate([ramp(), np.full((6, 9, 1), 3, np.uint8)], -1)), ramp()),
    "P": (_palette(None), np.asarray(_palette(None).convert("RGB"))),
    "P with a transparent entry": (_palette(3), np.asarray(_palette(None).convert("RGB"))),
    "P with alpha entries": (_palette(bytes([0, 9, 200])), np.asarray(_palette(None).convert("RGB"))),
    "CMYK": (Image.fromarray(ramp()).convert("CMYK"), ramp()),
    "1": (Image.fromarray(GREY > 50), np.stack([(GREY > 50) * np.uint8(255)] * 3, -1)),
    "I;16": (Image.fromarray(GREY.astype(np.uint16) * 256 + 77), np.stack([GREY] * 3, -1)),
    "I": (Image.fromarray(GREY.astype(np.int32) * 256 + 77), np.stack([GREY] * 3, -1)),
}


@pytest.mark.parametrize("mode", MODES)
def test_picture_modes(mode):
    image, expected = MODES[mode]
    assert image.mode == mode.split()[0]
    assert np.array_equal(load_picture(image, what="image 0"), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "P with alpha entries", "1", "I;16"])
def test_picture_modes_from_png(mode):
    image, expected = MODES[mode]
    assert np.array_equal(load_picture(encoded(image), what="image 0"), expected)


def test_floating_point_and_32_bit_pictures_are_refused():
    with pytest.raises(
        ValueError, match=r"^Expected image 0 with 8 or 16 bits per channel, got floating point pixels \(mode F\)\.$"
    ):
        load_picture(Image.fromarray(GREY.astype(np.float32)), what="image 0")
    with pytest.raises(ValueError, match=r"^Expected image 0 with 8 or 16 bits per channel, got 32-bit integers\.$"):
        load_picture(Image.fromarray(GREY.astype(np.int32) * 1000), what="image 0")


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda p: p),
        (2, lambda p: p[:, ::-1]),
        (3, lambda p: p[::-1, ::-1]),
        (4, lambda p: p[::-1]),
        (5, lambda p: p.transpose(1, 0, 2)),
        (6, lambda p: np.rot90(p, -1)),
        (7, lambda p: p[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda p: np.rot90(p, 1)),
    ],
)
def test_exif_orientation(orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(ramp()), exif=exif)
    assert np.array_equal(load_picture(data, what="image 0"), turn(ramp()))
    # A picture the user has opened gives the same as its file.
    assert np.array_equal(load_picture(Image.open(io.BytesIO(data)), what="image 0"), turn(ramp()))


def test_animated_gif_as_an_image_gives_its_first_picture():
    pictures = [Image.fromarray(np.full((6, 9, 3), value, dtype=np.uint8)) for value in (10, 200)]
    data = encoded(pictures[0], "GIF", save_all=True, append_images=pictures[1:])
    assert np.array_equal(load_picture(data, what="image 0"), np.full((6, 9, 3), 10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_dtypes(dtype):
    values = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=dtype).reshape(1, 1, 2, 2).expand(2, 3, 2, 2)
    assert frames_to_rgb(values, what="video 0")[1, ..., 2].tolist() == [[0, 64], [128, 255]]


def test_a_tensor_that_requires_grad():
    values = torch.full((1, 3, 4, 5), 0.2, requires_grad=True)
    assert frames_to_rgb(values, what="video 0").tolist() == np.full((1, 4, 5, 3), 51).tolist()


def test_grey_and_boolean_arrays():
    assert np.array_equal(load_picture(GREY, what="image 0"), np.stack([GREY] * 3, -1))
    assert np.array_equal(load_picture(GREY[..., None], what="image 0"), np.stack([GREY] * 3, -1))
    assert load_picture(np.array([[True, False]]), what="image 0").tolist() == [[[255] * 3, [0] * 3]]


def test_where_both_layouts_fit():
    both = np.arange(3 * 4 * 3, dtype=np.uint8).reshape(3, 4, 3)
    assert np.array_equal(load_picture(both, what="image 0"), both)
    assert np.array_equal(load_picture(torch.from_numpy(both), what="image 0"), both.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((6, 5, 2)), "Expected image 5 with 1, 3 or 4 channels first or last, got shape (6, 5, 2)."),
        (np.zeros(5), "Expected image 5 as (height, width[, channels]) pictures, got shape (5,)."),
        (np.zeros((2, 4, 5, 3)), "Expected image 5 as (height, width[, channels]) pictures, got shape (2, 4, 5, 3)."),
        (np.zeros((0, 5, 3)), "Expected image 5 with at least one frame and one pixel, got shape (1, 0, 5, 3)."),
        (np.full((4, 5, 3), 1.5), "Expected image 5 as uint8 0..255 or float 0..1, got float64 from 1.5 to 1.5."),
        (np.array([[-0.25, 1.0]]), "Expected image 5 as uint8 0..255 or float 0..1, got float64 from -0.25 to 1."),
        (np.array([[np.nan, 1.0]]), "Expected image 5 as uint8 0..255 or float 0..1, got float64 from nan to nan."),
        (np.array([[3, 256]]), "Expected image 5 as uint8 0..255 or float 0..1, got int64 from 3 to 256."),
        (np.array([[-1, 2]]), "Expected image 5 as uint8 0..255 or float 0..1, got int64 from -1 to 2."),
        (np.array([["a", "b"]]), "Expected image 5 as uint8 0..255 or float 0..1, got dtype <U1."),
        (torch.full((3, 4, 5), 255.0), "Expected image 5 as uint8 0..255 or float 0..1, got float32 from 255 to 255."),
    ],
)
def test_arrays_that_are_no_pictures(array, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_picture(array, what="image 5")


def test_describe():
    assert describe("a.png") == "a.png"
    assert describe(Path("a/b.png")) == str(Path("a/b.png"))
    assert describe("x" * 300) == "x" * 100 + "..."
    assert describe(b"abc") == "<bytes>"
    assert describe(io.BytesIO()) == "<BytesIO>"
