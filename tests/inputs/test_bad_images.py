"""What is not a usable picture is refused with its name and what to do."""

import contextlib
import http.server
import io
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.inputs import images
from fastvlm_mlx.inputs.images import load_image


def encoded(kind: str = "PNG", size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    array = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no data: a decompression bomb's first bytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


BAD_FILES = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "text": (b"hello, I am not a picture\n", "not an image in a known format .*JPEG, PNG"),
    "html": (b"<!doctype html><title>404</title>", "not an image in a known format"),
    "pdf": (b"%PDF-1.7\n%....", "not an image in a known format"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image in a known format"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC is not supported; save it as JPEG"),
    "pickle": (b"\x80\x04\x95\x10", "not an image in a known format"),
    "png signature": (encoded()[:8], "not an image in a known format|damaged"),
    "half png": (encoded()[:1500], "damaged, incomplete or of an unknown kind .*export it again"),
    "half jpeg": (encoded("JPEG")[:700], "damaged, incomplete or of an unknown kind"),
    "half webp": (encoded("WEBP")[:300], "damaged, incomplete or of an unknown kind|not an image in a known format"),
    "half gif": (encoded("GIF")[:900], "damaged, incomplete or of an unknown kind"),
    "half tiff": (encoded("TIFF")[:1500], "damaged, incomplete or of an unknown kind|not an image in a known format"),
    "half bmp": (encoded("BMP")[:500], "damaged, incomplete or of an unknown kind"),
    "bomb": (png_header(30_000, 30_000), "has more than 178,956,970 pixels, the most that is read; reduce it"),
    "smaller bomb": (png_header(12_000, 15_000), "has more than 178,956,970 pixels, the most that is read"),
    "too long": (png_header(70_000, 10), "is 70000×10; a side may have at most 65,535 pixels"),
    "float tiff": (None, "floating-point samples of unknown range"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_by_name(case, tmp_path):
    data, message = BAD_FILES[case]
    path = tmp_path / f"{case}.png"
    if data is None:
        Image.new("F", (2, 2), 0.5).save(path, "TIFF")
    else:
        path.write_bytes(data)
    before = path.read_bytes()
    with pytest.raises(ImageError, match=f"{case}.png: .*({message})"):
        load_image(path)
    assert path.read_bytes() == before


def test_every_cut_of_a_file_is_refused_or_read_whole():
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        data = encoded(kind, (12, 9))
        for length in range(0, len(data), 3):
            with contextlib.suppress(ImageError):
                assert load_image(data[:length]).size == (12, 9)


def test_flipped_bytes_never_raise_anything_else():
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"):
        data = encoded(kind, (12, 9))
        for _ in range(60):
            damaged = bytearray(data)
            for index in rng.integers(0, len(data), 3):
                damaged[index] = int(rng.integers(256))
            with contextlib.suppress(ImageError):
                load_image(bytes(damaged))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/photo.jpg", "no/such/photo.jpg: no such file"),
        ("", "no such file|is a folder|cannot be opened"),
        ("a\0b.png", "cannot be opened"),
        ("x" * 5000, "cannot be opened"),
        ("ftp://example.org/a.png", "ftp://example.org/a.png: only http://, https:// and data: URLs"),
        ("file:///a.png", "only http://, https:// and data: URLs"),
        ("data:image/png;base64", "has the form data:image/png;base64,"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png;base64,", r"is empty \(0 bytes\)"),
        ("data:text/plain,hello", "not an image in a known format"),
        (io.StringIO("text"), r"opened as text; open it in binary mode \('rb'\)"),
        (None, "must be a path, URL, bytes, binary file, PIL image or array, not NoneType"),
        (3, "not int"),
        (["a.png"], "not list"),
        (Image.new("1", (20_000, 9_000)), r"has more than 178,956,970 pixels, the most that is read \(20000×9000\)"),
        (Image.new("RGB", (0, 5)), r"PIL image: has no pixels \(0×5\)"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(H, W\).*not \(3, 8, 8\)"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"not \(1, 8, 8, 3\)"),
        (np.zeros((0, 8, 3), np.uint8), r"not \(0, 8, 3\)"),
        (np.zeros((8,), np.uint8), r"not \(8,\)"),
        (np.zeros((8, 8, 3), np.int64), "must be uint8 or float in .*, not int64"),
        (np.zeros((8, 8, 3), bool), "not bool"),
        (np.full((8, 8, 3), 255.0), r"must hold values in \[0, 1\], not \[255, 255\]; divide or clip it"),
        (np.full((8, 8, 3), -0.5), r"not \[-0.5, -0.5\]"),
        (np.full((8, 8, 3), np.nan), r"not \[nan, nan\]"),
        (np.zeros((70_000, 1), np.uint8), "too large: at most 178,956,970 pixels and 65,535 a side"),
    ],
)
def test_bad_source_is_refused(source, message):
    with pytest.raises(ImageError, match=message):
        load_image(source)


def test_a_folder_is_not_an_image(tmp_path):
    with pytest.raises(ImageError, match="is a folder, not an image; name the files in it"):
        load_image(tmp_path)


def test_a_file_beyond_the_limit_is_not_read_on(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 1 << 20)
    path = tmp_path / "huge.png"
    path.write_bytes(bytes((2 << 20) + 1))
    with pytest.raises(ImageError, match=r"huge\.png: larger than 1 MiB"):
        load_image(path)


class Server(http.server.BaseHTTPRequestHandler):
    """Answers by path, well and badly."""

    def do_GET(self):
        picture = encoded()
        if self.path == "/missing.png":
            self.send_error(404)
        elif self.path == "/slow.png":
            time.sleep(1)
        elif self.path == "/to-file":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
        elif self.path == "/cut.png":
            self.answer(picture[:1000], length=len(picture))
        elif self.path == "/trickle.png":
            self.answer(b"", length=len(picture))
            with contextlib.suppress(OSError):
                for byte in picture:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
        elif self.path == "/garbage":
            self.wfile.write(b"not http\r\n\r\n")
        elif self.path == "/length":
            self.send_response(200)
            self.send_header("Content-Length", "many")
            self.end_headers()
        elif self.path == "/page":
            self.answer(b"<html>a page about pictures</html>", kind="text/html")
        elif self.path == "/large.png":
            self.answer(bytes(3 << 20))
        elif self.path == "/ein%20bild.png?size=%C3%BC":
            self.answer(picture)

    def answer(self, body: bytes, *, length: int | None = None, kind: str = "image/png") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def test_a_url_is_fetched(server):
    assert load_image(f"{server}/ein bild.png?size=ü").size == (40, 30)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.png", "the server answered 404 Not Found"),
        ("slow.png", "not fetched within 0.5 s"),
        ("trickle.png", "not fetched within 0.5 s"),
        ("to-file", "the server answered 302"),
        ("cut.png", r"the connection broke after 1000 of \d+ bytes; try again"),
        ("garbage", "cannot be fetched"),
        ("length", "cannot be fetched .*many"),
        ("page", "is a text/html page, not an image; use the address of the picture itself"),
        ("large.png", "larger than 2 MiB"),
    ],
)
def test_bad_answer_is_refused_with_its_address(server, path, message, monkeypatch):
    monkeypatch.setattr(images, "MAX_DOWNLOAD_BYTES", 2 << 20)
    with pytest.raises(ImageError, match=f"{server}/{path}: {message}"):
        load_image(f"{server}/{path}", timeout=0.5)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9/a.png", "cannot be fetched .*refused"),
        ("http://", "cannot be fetched"),
        ("http://[::1/a.png", "cannot be fetched"),
        ("http://127.0.0.1:port/a.png", "cannot be fetched"),
    ],
)
def test_bad_url_is_refused(url, message):
    with pytest.raises(ImageError, match=message):
        load_image(url, timeout=2)
