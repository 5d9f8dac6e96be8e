"""What is not a usable picture is refused with its name and what to do."""

import contextlib
import io
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx.errors import ImageError
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
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "damaged or of an unknown kind of HEIF .*; save it as JPEG"),
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
    "float tiff": ("F", "floating-point samples of unknown range"),
    "32-bit tiff": ("I", "32-bit samples of unknown range"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_by_name(case, tmp_path):
    data, message = BAD_FILES[case]
    path = tmp_path / f"{case}.png"
    if isinstance(data, str):
        Image.new(data, (2, 2), 1).save(path, "TIFF")
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
        (SimpleNamespace(read=lambda size: 5), "image file: reading it gave int, not bytes"),
        (None, "must be a path, URL, bytes, binary file, PIL image or array, not NoneType"),
        (3, "not int"),
        (["a.png"], "not list"),
        (Image.new("1", (20_000, 9_000)), r"has more than 178,956,970 pixels, the most that is read \(20000×9000\)"),
        (Image.fromarray(np.full((2, 2), 200, np.int32)), "PIL image: holds 32-bit samples of unknown range"),
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
