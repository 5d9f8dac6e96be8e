"""An image is read from where the caller allows, and from nowhere else."""

import base64
import contextlib
import http.server
import io
import socket
import ssl
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.inputs import network, sources
from fastvlm_mlx.inputs.images import load_image
from fastvlm_mlx.inputs.network import is_public
from fastvlm_mlx.inputs.prompts import conversation
from fastvlm_mlx.inputs.sources import Allow, Encoded


def encoded(size: tuple[int, int] = (40, 30)) -> bytes:
    array = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


DATA_URL = "data:image/png;base64," + base64.b64encode(encoded()).decode()


class Server(http.server.BaseHTTPRequestHandler):
    """Answers by path, well and badly."""

    def do_GET(self):
        picture = encoded()
        if self.path.startswith("http://"):  # as to a proxy
            self.send_error(418, self.path)
        elif self.path == "/missing.png":
            self.send_error(404)
        elif self.path == "/slow.png":
            time.sleep(30)
        elif self.path == "/to-file":
            self.redirect("file:///etc/hostname")
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
        elif self.path == "/huge-redirect":
            self.send_response(302)
            self.send_header("Location", "/untyped.png")
            self.send_header("Content-Length", str(10**30))
            self.end_headers()
        elif self.path == "/slow-header.png":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b"X-Header: 1\r\n")
                    time.sleep(0.05)
        elif self.path == "/untyped.png":
            self.answer(picture, kind=None)
        elif self.path == "/mistyped.png":
            self.answer(picture, kind="text/html")
        elif self.path == "/rude":
            self.send_error(404, "\x1b[31mred")
        elif self.path.startswith("/redirect"):
            left = int(self.path.removeprefix("/redirect"))
            self.redirect(f"/redirect{left - 1}" if left > 1 else "/untyped.png")
        elif self.path == "/to-ftp":
            self.redirect("ftp://example.org/a.png")
        elif self.path == "/to-private":
            self.redirect(f"http://127.0.0.1:{self.server.server_port}/untyped.png")
        elif self.path == "/page":
            self.answer(b"<html>a page about images</html>", kind="text/html")
        elif self.path == "/large.png":
            self.answer(bytes(3 << 20))
        elif self.path == "/ein%20bild.png?size=%C3%BC":
            self.answer(picture)

    def redirect(self, address: str) -> None:
        self.send_response(302)
        self.send_header("Location", address)
        self.end_headers()

    def answer(self, body: bytes, *, length: int | None = None, kind: str | None = "image/png") -> None:
        self.send_response(200)
        if kind:
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


@pytest.mark.parametrize("path", ["ein bild.png?size=ü", "untyped.png", "mistyped.png", "redirect3", "huge-redirect"])
def test_a_url_is_fetched(server, path):
    assert load_image(f"{server}/{path}").size == (40, 30)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.png", "the server answered 404 Not Found"),
        ("slow.png", "not fetched within 0.5 s"),
        ("trickle.png", "not fetched within 0.5 s"),
        ("slow-header.png", "not fetched within 0.5 s"),
        ("to-file", "the server answered 302"),
        ("to-ftp", "the server answered 302 a redirect to ftp://example.org/a.png, which is neither http nor https"),
        ("redirect4", "the server answered 302 more than 3 redirects"),
        ("rude", r"the server answered 404 \\x1b\[31mred"),
        ("cut.png", r"the connection broke after 1000 of \d+ bytes; try again"),
        ("garbage", "cannot be fetched"),
        ("length", "cannot be fetched .*many"),
        ("page", "is a text/html page, not an image; use the address of the image itself"),
        ("large.png", "larger than 2 MiB"),
    ],
)
def test_bad_answer_is_refused_with_its_address(server, path, message, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOWNLOAD_BYTES", 2 << 20)
    with pytest.raises(ImageError, match=f"{server}/{path}: {message}"):
        load_image(f"{server}/{path}", timeout=0.5 if "0.5 s" in message else 60)


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
        load_image(url, timeout=60)


POLICIES = {"all": Allow.ALL, "public": Allow.PUBLIC, "data only": Allow.DATA_ONLY}
FILES = "files may not be read here; allow=Allow(files=True) permits it"
URLS = "URLs may not be fetched here; allow=Allow(urls=True) permits it"
PRIVATE = "is not on the public internet; Allow(urls=True, private_hosts=True) permits it"


@pytest.mark.parametrize("policy", POLICIES)
def test_data_urls_bytes_and_open_files_are_always_allowed(policy):
    for source in (DATA_URL, encoded(), io.BytesIO(encoded())):
        assert load_image(source, allow=POLICIES[policy]).size == (40, 30)


@pytest.mark.parametrize(
    ("policy", "source", "message"),
    [
        ("public", "/etc/passwd", FILES),
        ("data only", "/etc/passwd", FILES),
        ("public", Path("/etc/passwd"), FILES),
        ("public", "", FILES),
        ("public", "~/photo.png", FILES),
        ("public", "file:///etc/passwd", "only http://, https:// and data: URLs can be fetched"),
        ("all", "file:///etc/passwd", "only http://, https:// and data: URLs can be fetched"),
        ("data only", "https://example.org/a.png", URLS),
        ("data only", "HTTP://127.0.0.1/a.png", URLS),
        ("public", "http://127.0.0.1/a.png", PRIVATE),
        ("public", "http://[::1]/a.png", PRIVATE),
        ("public", "http://[::ffff:127.0.0.1]/a.png", PRIVATE),
        ("public", "http://169.254.169.254/latest/meta-data/", PRIVATE),
        ("public", "https://10.0.0.1/a.png", PRIVATE),
        ("public", "http://0/a.png", PRIVATE),
        ("public", "http://2130706433/a.png", PRIVATE),
        ("public", "http://localhost/a.png", PRIVATE),
    ],
)
def test_a_source_that_is_not_allowed_is_refused(policy, source, message):
    with pytest.raises(ImageError) as error:
        load_image(source, allow=POLICIES[policy])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("64:ff9b::5db8:d822", True),  # 93.184.216.34 seen from an IPv6 network
        ("64:ff9b::7f00:1", False),  # 127.0.0.1
        ("::ffff:10.0.0.1", False),
        ("64:ff9b:1::7f00:1", False),  # 127.0.0.1 behind a translator of the local network
        ("2002:7f00:1::1", False),  # 6to4 of 127.0.0.1
        ("2001:0:7f00:1::1", False),  # Teredo
        ("::7f00:1", False),  # 127.0.0.1, as IPv6 once wrote it
        ("fec0::1", False),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("ff02::1", False),
    ],
)
def test_addresses_outside_the_public_internet_are_known(address, public):
    assert is_public(address) is public


@pytest.fixture
def internet(server, monkeypatch):
    """Names with public and private addresses; connections to the public one arrive at the server."""
    port = int(server.rpartition(":")[2])
    names = {
        "public.example": ["93.184.216.34"],
        "private.example": ["127.0.0.1"],
        "mixed.example": ["93.184.216.34", "10.0.0.1"],
        "93.184.216.34": ["93.184.216.34"],
    }
    lookups, connections = [], []
    connect, resolve = socket.create_connection, socket.getaddrinfo

    def resolve_name(host, *arguments, **options):
        lookups.append(host)
        if host not in names:
            return resolve(host, *arguments, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in names[host]]

    def create_connection(address, *arguments):
        connections.append(address)
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        try:
            return connect(("127.0.0.1", port), *arguments)
        finally:
            monkeypatch.setattr(socket, "getaddrinfo", resolve_name)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_name)
    monkeypatch.setattr(network.socket, "create_connection", create_connection)
    return lookups, connections


def test_the_connection_goes_to_the_address_that_was_checked(internet):
    lookups, connections = internet
    assert load_image("http://public.example/untyped.png", allow=Allow.PUBLIC).size == (40, 30)
    assert lookups == ["public.example"]
    assert connections == [("93.184.216.34", 80)]


@pytest.mark.parametrize("host", ["private.example", "mixed.example"])
def test_a_name_with_a_private_address_is_refused_before_a_connection(internet, host):
    with pytest.raises(ImageError, match=rf"{host} \(its address is 1.*\) is not on the public internet"):
        load_image(f"http://{host}/untyped.png", allow=Allow.PUBLIC)
    assert not internet[1]


def test_a_redirect_to_a_private_host_is_refused(internet):
    with pytest.raises(ImageError, match=r"public\.example/to-private: .*127\.0\.0\.1 is not on the public internet"):
        load_image("http://public.example/to-private", allow=Allow.PUBLIC)
    assert internet[1] == [("93.184.216.34", 80)]


def test_a_proxy_is_not_asked_to_resolve_what_must_be_public(internet, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy")
    assert load_image("http://public.example/untyped.png", allow=Allow.PUBLIC).size == (40, 30)


def test_a_proxy_of_the_environment_is_used_otherwise(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server)
    monkeypatch.delenv("no_proxy")
    with pytest.raises(ImageError, match=r"the server answered 418 http://nowhere\.example/a\.png"):
        load_image("http://nowhere.example/a.png")


def test_tls_is_checked_against_the_name_not_the_address(internet, monkeypatch):
    names = []

    def wrap_socket(self, sock, *, server_hostname, **options):
        names.append((server_hostname, self.verify_mode, self.check_hostname))
        sock.close()
        raise ssl.SSLError("seen")

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap_socket)
    with pytest.raises(ImageError, match="seen"):
        load_image("https://public.example/a.png", allow=Allow.PUBLIC)
    assert names == [("public.example", ssl.CERT_REQUIRED, True)]
    assert internet[1] == [("93.184.216.34", 443)]


def test_what_was_read_already_is_an_image_with_its_own_name_wherever_it_is_from():
    assert load_image(Encoded(encoded(), "the first picture"), allow=Allow.DATA_ONLY).size == (40, 30)
    with pytest.raises(ImageError, match=r"^the first picture: is empty"):
        load_image(Encoded(b"", "the first picture"), allow=Allow.DATA_ONLY)


def messages(part: dict[str, object]) -> list[dict[str, object]]:
    return [{"role": "user", "content": [part, {"type": "text", "text": "Hi"}]}]


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "image", "path": "a.png"}]
)
def test_a_string_in_messages_is_public_by_default(part):
    (reference,) = conversation(messages(part))[-1].images
    assert reference.allow == Allow.PUBLIC
    (reference,) = conversation(messages(part), allow=Allow.ALL)[-1].images
    assert reference.allow == Allow.ALL


def test_what_a_program_gives_is_allowed_by_default():
    (reference,) = conversation(messages({"type": "image", "image": Path("a.png")}))[-1].images
    assert reference.allow == Allow.ALL
    (reference,) = conversation("Hi", ["a.png"])[-1].images
    assert reference.allow == Allow.ALL
    (reference,) = conversation("Hi", ["a.png"], allow=Allow.DATA_ONLY)[-1].images
    assert reference.allow == Allow.DATA_ONLY


def test_a_file_beyond_the_limit_is_not_read_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 1 << 20)
    path = tmp_path / "huge.png"
    path.write_bytes(bytes((2 << 20) + 1))
    with pytest.raises(ImageError, match=r"huge\.png: larger than 1 MiB"):
        load_image(path)


def test_an_open_file_is_read_from_its_start():
    file = io.BytesIO(encoded())
    file.read()
    assert load_image(file).size == (40, 30)


def test_a_closed_file_is_refused(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        pass
    with pytest.raises(ImageError, match=r"a\.png: cannot be read \(.*closed file\)"):
        load_image(file)


def test_an_image_whose_file_was_closed_is_refused(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded())
    with Image.open(path) as by_name:
        pass
    with path.open("rb") as file:
        by_file = Image.open(file)
    for image in (by_name, by_file):
        with pytest.raises(ImageError, match="its file was closed before it was read; call load"):
            load_image(image)


def test_a_file_may_be_called_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("~").write_bytes(encoded())
    assert load_image("~").size == (40, 30)


def test_a_name_with_other_spaces_is_pointed_out(tmp_path):
    (tmp_path / "Screenshot 1.00.00\u202fPM.png").write_bytes(encoded())
    with pytest.raises(ImageError, match=r"no such file; a file there differs only in the kind of its spaces"):
        load_image(tmp_path / "Screenshot 1.00.00 PM.png")


@pytest.mark.parametrize("length", [100, 10_000])
def test_base64_without_a_header_is_pointed_out(length):
    with pytest.raises(ImageError, match="base64 needs data:image/png;base64, before it") as error:
        load_image("iVBORw0KGgo+" * (length // 12))
    assert len(str(error.value)) < 350


def test_half_a_character_in_a_data_url_is_refused():
    with pytest.raises(ImageError, match="not valid Unicode"):
        load_image("data:image/png,\ud83d")
