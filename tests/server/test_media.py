"""Images that clients name: what is read, from where, and what is refused with which words."""

import base64
import contextlib
import http.server
import io
import os
import socket
import struct
import threading
import zlib
from pathlib import Path

import pytest
from PIL import Image

from fastvlm_mlx.inputs import network, pages
from fastvlm_mlx.inputs.images import load_image
from fastvlm_mlx.server import media
from fastvlm_mlx.server.api import ApiError
from fastvlm_mlx.server.media import Images
from fastvlm_mlx.server.settings import Settings
from tests import pdfs
from tests.server.conftest import run

WHERE = "messages[2].content[1]"


def picture(size=(40, 30), kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 60)).save(buffer, kind)
    return buffer.getvalue()


PICTURE = picture()
BASE64 = base64.b64encode(PICTURE).decode()
DATA_URL = f"data:image/png;base64,{BASE64}"


def header_only(width, height):
    """A PNG of that size, without samples."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def as_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def refused(url, **settings):
    """The error that a URL gets; its message begins with the place of the image."""
    with pytest.raises(ApiError) as error:
        Images(Settings(**settings)).read(url, WHERE)
    assert (error.value.status, error.value.param) == (400, WHERE)
    assert str(error.value).startswith(f"{WHERE}: ")
    return error.value


@pytest.mark.parametrize(
    "url",
    [
        DATA_URL,
        f"data:;base64,{BASE64}",
        f"DATA:image/png;charset=utf-8;BASE64,{BASE64}",
        f"data:image/png;base64,{BASE64[:50]}\r\n {BASE64[50:]}\n",
        f"data:image/png;base64,{BASE64.replace('+', '%2B').replace('/', '%2f').replace('=', '%3D')}",
        as_url(picture(kind="JPEG"), "text/html"),  # the content counts, not what is said of it
        as_url(picture(kind="WEBP"), "image/png"),
    ],
    ids=["plain", "without a type", "with parameters", "with line ends", "percent", "mistyped", "webp as png"],
)
def test_a_data_url_is_read_whatever_is_closed(url):
    (encoded,) = Images(Settings()).read(url, WHERE)
    assert load_image(encoded).size == (40, 30)
    assert encoded.name == WHERE


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"data:image/png;base64,{BASE64[:-1]}", "not valid base64 (Incorrect padding"),
        (f"data:image/png;base64,{BASE64[:40]}*{BASE64[40:]}", "not valid base64"),
        (f"data:image/png;base64,é{BASE64}", "not valid base64"),
        ("data:image/png;base64,\ud800", "the data: URL is not valid Unicode"),
        ("data:image/png;base64", "a data: URL has the form data:image/png;base64,…"),
        ("data:image/png;base64,", "is empty (0 bytes)"),
        ("data:,Hello", "not an image in a known format"),
        (as_url(b"\x89"), "not an image in a known format"),
        (as_url(PICTURE[:20]), "export it again"),
        (as_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "it is an SVG drawing; save it as PNG"),
        ("data:application/pdf;base64,AAAA", "not an image in a known format"),
        (as_url(header_only(30_000, 30_000)), "more than 178,956,970 pixels"),
        (as_url(header_only(12_000, 10_000)), "has 12000×10000 pixels, more than 100,000,000, the most that is read"),
    ],
    ids=lambda value: value[:40] if not value.startswith("data") else "",
)
def test_a_bad_data_url_is_refused_with_its_place_and_reason(url, message):
    assert message in str(refused(url))


@pytest.mark.parametrize(
    "url", ["/etc/passwd", "file:///etc/passwd", "picture.png", "", "ftp://example.org/a.png", BASE64]
)
def test_files_are_closed(url):
    error = refused(url)
    assert "files are not read here; send the image as data:image/png;base64,…" in str(error)
    assert len(str(error)) < 300


def test_web_addresses_are_closed():
    error = refused("https://example.org/a.png")
    assert "send a data: URL, or start the server with --allow-image-urls" in str(error)
    assert error.code == "image_url_not_allowed"


def test_images_of_a_request_are_counted_and_weighed():
    images = Images(Settings(max_images=2))
    for _ in range(2):
        images.read(DATA_URL, WHERE)
    with pytest.raises(ApiError, match="a request can have at most 2 images"):
        images.read(DATA_URL, WHERE)
    images = Images(Settings(max_body_bytes=len(PICTURE) + 10))
    images.read(DATA_URL, WHERE)
    with pytest.raises(ApiError, match="the images of a request can have at most"):
        images.read(DATA_URL, WHERE)


@pytest.fixture
def folder(tmp_path):
    """A media folder with a picture, and things beside it that must stay closed."""
    root = tmp_path / "media"
    (root / "inner").mkdir(parents=True)
    (root / "a picture.png").write_bytes(PICTURE)
    (root / "inner" / "link.png").symlink_to(root / "a picture.png")
    (tmp_path / "secret.png").write_bytes(PICTURE)
    (root / "escape.png").symlink_to(tmp_path / "secret.png")
    (root / "circle").symlink_to(root / "circle")
    os.mkfifo(root / "pipe")
    return root


@pytest.mark.parametrize(
    "name",
    [
        "a picture.png",
        "inner/link.png",
        "inner/../a picture.png",
        "{root}/a picture.png",
        "file://{root}/a%20picture.png",
        "FILE://localhost{root}/a%20picture.png",
    ],
)
def test_a_file_below_the_media_folder_is_read(folder, name):
    (encoded,) = Images(Settings(media_root=folder)).read(name.format(root=folder), WHERE)
    assert encoded.data == PICTURE


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "{root}/../secret.png",
        "escape.png",
        "file:///etc/passwd",
        "file://{root}/%2e%2e/secret.png",
        "missing.png",
        "circle",
        "pipe",
        ".",
        "",
        "inner",
        "a\0b",
        "x" * 5000,
        "\ud800",
    ],
)
def test_nothing_else_is_read_or_told_of(folder, name):
    error = refused(name.format(root=folder), media_root=folder)
    assert error.code == "file_not_found"
    assert str(error).endswith("no such file below the media folder")


def test_a_file_of_another_machine_or_beyond_the_limit_is_refused(folder):
    assert "names a file of another machine" in str(refused("file://server/share/a.png", media_root=folder))
    assert "is larger than 50 B" in str(refused("a picture.png", media_root=folder, max_body_bytes=50))


GIVEN_UP = threading.Event()
"""Set when a slow answer is not waited for any more."""


class Site(http.server.BaseHTTPRequestHandler):
    """What stands behind the public addresses of the tests."""

    def do_GET(self):
        if self.path == "/to-private":
            self.answer(302, b"", Location="http://10.0.0.1/secret.png")
        elif self.path == "/to-metadata":
            self.answer(302, b"", Location="http://169.254.169.254/latest/meta-data/")
        elif self.path == "/to-file":
            self.answer(302, b"", Location="file:///etc/passwd")
        elif self.path.startswith("/round"):
            self.answer(302, b"", Location=f"/round{int(self.path[6:]) + 1}")
        elif self.path == "/page":
            self.answer(200, b"<html></html>", Content_Type="text/html")
        elif self.path == "/slow":
            GIVEN_UP.wait(60)
            self.answer(200, PICTURE)
        else:
            self.answer(200, PICTURE)

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_port
        running.shutdown()


@pytest.fixture
def internet(site, monkeypatch):
    """Names in the hands of an attacker; each is resolved to the next of its addresses. Says where connections went."""
    names = {
        "public.example": [["93.184.216.34"]],
        "localhost.attacker.example": [["127.0.0.1"]],
        "half.example": [["93.184.216.34", "192.168.0.1"]],
        "rebinding.example": [["93.184.216.34"], ["127.0.0.1"]],
        "v6.example": [["::ffff:127.0.0.1"]],
        "translated.example": [["64:ff9b:1::a00:1"]],
    }
    connections = []
    connect, resolve = socket.create_connection, socket.getaddrinfo

    def resolve_name(host, port, *arguments, **options):
        if host not in names:
            return resolve(host, port, *arguments, **options)
        answers = names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    def create_connection(address, *arguments):
        connections.append(address[0])
        with monkeypatch.context() as context:
            context.setattr(socket, "getaddrinfo", resolve)
            return connect(("127.0.0.1", site), *arguments)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_name)
    monkeypatch.setattr(network.socket, "create_connection", create_connection)
    return connections


def test_a_public_address_is_fetched_when_that_is_allowed(internet):
    (encoded,) = Images(Settings(allow_image_urls=True)).read("http://public.example/a.png", WHERE)
    assert (encoded.data, encoded.name) == (PICTURE, WHERE)
    assert internet == ["93.184.216.34"]


@pytest.mark.parametrize(
    ("url", "connections"),
    [
        ("http://169.254.169.254/latest/meta-data/", []),
        ("http://127.0.0.1/a.png", []),
        ("http://[::1]/a.png", []),
        ("http://2130706433/a.png", []),
        ("http://0x7f.1/a.png", []),
        ("http://localhost.attacker.example/a.png", []),
        ("http://half.example/a.png", []),
        ("http://v6.example/a.png", []),
        ("http://translated.example/a.png", []),
        ("http://public.example@127.0.0.1/a.png", []),
        ("http://public.example/to-private", ["93.184.216.34"]),
        ("http://public.example/to-metadata", ["93.184.216.34"]),
    ],
)
def test_nothing_private_is_reached_however_it_is_named(internet, url, connections):
    error = refused(url, allow_image_urls=True)
    assert "is not on the public internet" in str(error) or "cannot be fetched" in str(error)
    assert "Allow(" not in str(error)  # the words of the Python API
    assert internet == connections


def test_a_name_is_resolved_once_and_the_connection_goes_there(internet):
    Images(Settings(allow_image_urls=True)).read("http://rebinding.example/a.png", WHERE)
    assert internet == ["93.184.216.34"]
    refused("http://rebinding.example/a.png", allow_image_urls=True)  # from now on it is 127.0.0.1
    assert internet == ["93.184.216.34"]


def test_redirects_to_files_or_without_end_are_refused(internet):
    assert "Redirection to url 'file:///etc/passwd' is not allowed" in str(
        refused("http://public.example/to-file", allow_image_urls=True)
    )
    assert "more than 3 redirects" in str(refused("http://public.example/round0", allow_image_urls=True))
    assert internet == ["93.184.216.34"] * 5


def test_a_page_is_no_image(internet):
    assert "not an image" in str(refused("http://public.example/page", allow_image_urls=True))


def test_a_slow_host_is_given_up_and_few_are_waited_for_at_once(internet, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(media, "FETCH_SECONDS", 0.1)
        assert "not fetched within 0.1 s" in str(refused("http://public.example/slow", allow_image_urls=True))
    GIVEN_UP.set()
    monkeypatch.setattr(media, "_fetching", threading.BoundedSemaphore(1))
    with media._fetching, pytest.raises(ApiError, match="images are being fetched already") as error:
        Images(Settings(allow_image_urls=True)).read("http://public.example/a.png", WHERE)
    assert (error.value.status, error.value.retry_after) == (429, 1)
    Images(Settings(allow_image_urls=True)).read("http://public.example/a.png", WHERE)


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", {}), ("/api/chat", {"model": "demo"})])
def test_a_resolution_beyond_what_the_server_allows_is_refused(serving, path, body):
    body |= {"messages": [{"role": "user", "content": "What is it?"}], "resolution": 640}

    async def ask():
        with serving(max_resolution=576) as (client, _):
            return await client.post(path, body)

    answer = run(ask())
    assert answer.status == 400
    assert b"resolution must be at most 576 here, not 640; --max-resolution of the server" in answer.body


def test_each_page_of_a_pdf_is_an_image():
    pytest.importorskip("pypdfium2", reason="the extra pdf is not installed")
    images = Images(Settings()).read(as_url(pdfs.pdf([(1, 0, 0), (0, 0, 1)]), "application/pdf"), WHERE)
    assert [load_image(image).getpixel((700, 1000)) for image in images] == [(255, 0, 0), (0, 0, 255)]
    assert [load_image(image).size for image in images] == [(1448, 2048)] * 2


def test_pages_count_as_images():
    pytest.importorskip("pypdfium2", reason="the extra pdf is not installed")
    images = Images(Settings(max_images=3))
    images.read(DATA_URL, WHERE)
    with pytest.raises(ApiError, match="the PDF: has 3 pages, more than 2, the most images here"):
        images.read(as_url(pdfs.pdf([(1, 0, 0)] * 3)), WHERE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"%PDF-1.7\n", "the PDF: not a PDF that can be read; it is damaged, incomplete or without pages"),
        (pdfs.locked(), "the PDF: the PDF has a password; save a copy without it"),
    ],
    ids=["damaged", "locked"],
)
def test_a_pdf_that_cannot_be_read_says_why(data, message):
    pytest.importorskip("pypdfium2", reason="the extra pdf is not installed")
    assert message in str(refused(as_url(data, "application/pdf")))


def test_a_pdf_without_the_extra_names_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "reading PDFs needs pypdfium2; install it with: pip install 'fastvlm-mlx[pdf]'" in str(
        refused(as_url(b"%PDF-1.7\n", "application/pdf"))
    )


def test_a_pdf_that_takes_too_long_is_given_up(monkeypatch):
    pytest.importorskip("pypdfium2", reason="the extra pdf is not installed")
    monkeypatch.setitem(pages.draw_pages.__kwdefaults__, "seconds", 0.01)
    assert "the PDF was not drawn within 0.01 s" in str(refused(as_url(pdfs.pdf([(1, 0, 0)]))))


@pytest.mark.parametrize("url", ["@screen", "@clipboard", "@camera", "@test", "lavfi:testsrc2", "rtsp://camera/1"])
def test_no_device_is_opened_for_a_stranger(url):
    assert "files are not read here" in str(refused(url))
    assert "no such file below the media folder" in str(refused(url, media_root=Path(__file__).parent))
