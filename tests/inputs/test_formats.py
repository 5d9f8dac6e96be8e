"""A file of any common format is opened, whatever else it holds; others are refused for what they are."""

import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.inputs.images import load_image
from tests.pictures import encoded, png, png_chunk

HEIC = Path(__file__).parent.parent / "data" / "heic"
RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
LONG = zlib.compress(bytes(2 << 20))


def heic_picture() -> Image.Image:
    """What was encoded into the files in `tests/data/heic`."""
    seed = np.random.default_rng(1).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(seed).resize((64, 48), Image.Resampling.BICUBIC)


def assert_close(data: object, expected: Image.Image) -> None:
    """At this quality HEVC moves a level of a smooth picture by 2 on average; another turn moves it by 40."""
    image = load_image(data)
    assert image.size == expected.size
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected.convert("RGB"))).mean() < 4


TEXTS = {
    "zTXt": png_chunk(b"zTXt", b"workflow\0\0" + LONG),
    "iTXt": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
    "iCCP": png_chunk(b"iCCP", b"profile\0\0" + LONG),
    "tEXt": png_chunk(b"tEXt", b"prompt\0" + bytes(65 << 20)),
    "many": b"".join(png_chunk(b"zTXt", b"%d\0\0" % number + zlib.compress(bytes(1 << 20))) for number in range(70)),
    "a keyword that Pillow uses itself": png_chunk(b"tEXt", b"interlace\x001") + png_chunk(b"tEXt", b"bbox\x001"),
    "broken": png_chunk(b"zTXt", b"a\0\0not deflated") + png_chunk(b"zTXt", b"") + png_chunk(b"iTXt", b"a\0\1"),
}


@pytest.mark.parametrize("place", ["extra", "after"])
@pytest.mark.parametrize("case", TEXTS)
def test_texts_in_a_png_leave_the_picture_alone(case, place):
    data = png(RGB, bits=8, colour=2, **{place: [TEXTS[case]]})
    np.testing.assert_array_equal(np.asarray(load_image(data)), RGB)


@pytest.mark.parametrize("packed", [False, True])
def test_a_png_is_turned_as_its_xmp_says_however_long_that_is(packed):
    xmp = b'<x tiff:Orientation="3"/>' + bytes(2 << 20)
    text = b"\1\0\0\0" + zlib.compress(xmp) if packed else b"\0\0\0\0" + xmp
    data = png(RGB, bits=8, colour=2, extra=[png_chunk(b"iTXt", b"XML:com.adobe.xmp\0" + text)])
    np.testing.assert_array_equal(np.asarray(load_image(data)), RGB[::-1, ::-1])


def test_a_png_is_turned_as_a_raw_profile_says():
    exif = Image.Exif()
    exif[0x0112] = 3
    profile = b"\nexif\n%8d\n" % len(exif.tobytes()) + exif.tobytes().hex().encode() + b"\n"
    for chunk in (
        png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
        png_chunk(b"tEXt", b"Raw profile type exif\0" + profile),
    ):
        np.testing.assert_array_equal(
            np.asarray(load_image(png(RGB, bits=8, colour=2, extra=[chunk]))), RGB[::-1, ::-1]
        )


def test_pillows_reason_is_quoted():
    data = encoded(Image.fromarray(RGB))
    with pytest.raises(ImageError, match=r"begins like PNG but is damaged .*\(broken PNG file \(chunk b'ID#T'\)\)"):
        load_image(data.replace(b"IDAT", b"ID#T"))


@pytest.mark.parametrize("name", ["plain", "second-is-primary", "10-bit", "alpha"])
def test_heic_shows_its_primary_image(name):
    assert_close(HEIC / f"{name}.heic", heic_picture())


def test_heic_of_12_bits_in_grey_shows_its_levels():
    assert_close(HEIC / "12-bit-grey.heic", heic_picture().convert("L"))


def test_a_grid_of_tiles_shows_the_whole_picture():
    image = np.asarray(load_image(HEIC / "grid.heic"))
    assert image.shape == (128, 64, 3)
    for half in (image[:48], image[64:112, ::-1]):  # the lower tile is mirrored
        assert np.abs(half.astype(int) - np.asarray(heic_picture())).mean() < 4


@pytest.mark.parametrize(
    ("name", "turn"),
    [
        ("orientation-6-in-both", Image.Transpose.ROTATE_270),
        ("orientation-5-in-both", Image.Transpose.TRANSPOSE),
        ("orientation-6-in-exif-alone", None),
    ],
)
def test_heic_is_turned_once_as_its_container_says(name, turn):
    expected = heic_picture() if turn is None else heic_picture().transpose(turn)
    data = (HEIC / f"{name}.heic").read_bytes()
    assert_close(data, expected)
    once = load_image(data)
    np.testing.assert_array_equal(np.asarray(load_image(once)), np.asarray(once))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_is_turned_once(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = load_image(encoded(heic_picture(), exif=exif))
    assert_close(encoded(heic_picture(), "AVIF", quality=95, exif=exif), upright)


@pytest.mark.parametrize(
    "brand", ["heic", "heix", "heim", "heis", "hevc", "hevx", "hevm", "hevs", "mif1", "msf1", "mif2", "MiHB"]
)
def test_heic_of_any_brand_is_read(brand):
    data = (HEIC / "plain.heic").read_bytes()
    assert_close(data[:8] + brand.encode() + data[12:], heic_picture())


def test_a_background_shows_through_a_transparent_heic():
    image = np.asarray(load_image(HEIC / "alpha.heic", background="white"))
    assert image[:20].min() > 250
    assert image[28:].min() < 200


def test_a_sequence_without_a_still_image_is_refused_as_such():
    with pytest.raises(ImageError, match=r"sequence\.heics: a HEIF sequence without a still image; save a frame"):
        load_image(HEIC / "sequence.heics")


def test_missing_pi_heif_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    with pytest.raises(ImageError, match=r"plain\.heic: HEIC needs the package pi-heif .*; pip install pi-heif"):
        load_image(HEIC / "plain.heic")


def test_plugins_that_others_register_are_used(monkeypatch):
    class Plugin(ImageFile.ImageFile):
        format = "OURS"

        def _open(self) -> None:
            self._mode, self._size = "L", (2, 1)
            self.tile = [("raw", (0, 0, 2, 1), 4, ("L", 0, 1))]

    monkeypatch.setitem(Image.OPEN, "OURS", (Plugin, lambda prefix: prefix.startswith(b"OURS")))
    assert np.asarray(load_image(b"OURS\x07\x09"))[0].tolist() == [[7] * 3, [9] * 3]


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"\0\5\x16\7\0\2\0\0Mac OS X        ", r"it holds what macOS notes beside a file \(AppleDouble\)"),
        (b"\xff\x0a", "JPEG XL cannot be read"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL cannot be read"),
        (b"%PDF-1.7\n", "it is a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "it is PostScript"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "it is an SVG drawing"),
        (b"\0\0\0\x18ftypisom", "it is a video"),
        (b"\0\0\0\x18ftypmp42", "it is a video"),
        (b"\0\0\0\x18ftypqt  ", "it is a video"),
        (b"\0\0\0\x18ftypcrx ", "it is a camera raw file"),
        (b"FUJIFILMCCD-RAW ", "it is a camera raw file"),
        (b"PK\3\4", "it is a .zip archive"),
        (b"v/1\1", "it is OpenEXR"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it may be a pointer of Git LFS"),
        (b"Dear reader,\n", "it is damaged or something else"),
    ],
)
def test_other_files_are_refused_for_what_they_are(start, what):
    with pytest.raises(ImageError, match=f"not an image in a known format .*; {what}"):
        load_image(start + bytes(100))
