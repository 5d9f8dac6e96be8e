"""Samples of every kind become the levels that they stand for, or are refused."""

import io
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx.errors import ConfigError, ImageError
from fastvlm_mlx.inputs.images import load_image
from tests.pictures import encoded, packed, png, png_chunk, tiff

# Corners and steps of a grey scale; 8 columns, so that rows of 1, 4 and 12 bits are whole bytes.
GREY = np.array([[0, 255, 17, 34, 51, 68, 85, 102], [119, 136, 153, 170, 187, 204, 221, 238]], dtype=np.uint8)
RGB = np.dstack([GREY, GREY[::-1], 255 - GREY])
COLOURS = np.dstack([np.arange(16) * 17, 255 - np.arange(16) * 17, np.arange(16) * 9])[0].astype(np.uint8)
SIZE = {256: 8, 257: 2}
WORD = {"<": "<u2", ">": ">u2"}


def grey(bits: int, photometric: int, order: str) -> bytes:
    levels = GREY.astype(np.int64) * ((1 << bits) - 1) // 255
    levels = (1 << bits) - 1 - levels if photometric == 0 else levels
    strip = levels.astype(WORD[order]).tobytes() if bits == 16 else packed(levels, bits)
    return tiff([strip], {**SIZE, 258: bits, 262: photometric}, order=order)


def colour(
    array: np.ndarray, tags: dict[int, int | tuple[int, ...]], *, order: str = "<", planes: bool = False
) -> bytes:
    """A TIFF of an array (H, W, C)."""
    array = array.astype(array.dtype.newbyteorder(order))
    parts = [array[..., band] for band in range(array.shape[2])] if planes else [array]
    bits = (array.dtype.itemsize * 8,) * array.shape[2]
    strips = [np.ascontiguousarray(part).tobytes() for part in parts]
    return tiff(strips, {**SIZE, 258: bits, 262: 2, 277: array.shape[2], 284: 2 if planes else 1, **tags}, order=order)


def levels(data: object, **options: object) -> np.ndarray:
    return np.asarray(load_image(data, **options))


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize(("bits", "order"), [(1, "<"), (4, ">"), (8, "<"), (8, ">"), (12, "<"), (16, "<"), (16, ">")])
def test_grey_tiff_shows_its_levels_or_is_refused(bits, order, photometric):
    top = (1 << bits) - 1
    # 12 and 16 bits keep their upper 8.
    expected = GREY if bits > 8 else (GREY.astype(int) * top // 255 * 255 // top).astype(np.uint8)
    data = grey(bits, photometric, order)
    if photometric == 0 and (bits, order) in {(12, "<"), (16, ">")}:
        with pytest.raises(ImageError, match="begins like TIFF but is"):
            load_image(data)
    else:
        for source in (data, Image.open(io.BytesIO(data))):
            np.testing.assert_array_equal(levels(source), np.dstack([expected] * 3))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 16])
def test_rgb_tiff_shows_its_levels(bits, order):
    samples = RGB if bits == 8 else RGB.astype(np.uint16) * 257
    np.testing.assert_array_equal(levels(colour(samples, {}, order=order)), RGB)
    alpha = np.full_like(samples[..., :1], 99)
    np.testing.assert_array_equal(levels(colour(np.dstack([samples, alpha]), {338: 2}, order=order)), RGB)


def test_planes_of_8_bits_show_their_levels():
    np.testing.assert_array_equal(levels(colour(RGB, {}, planes=True)), RGB)


def test_a_tiff_map_of_8_bit_colours_shows_them():
    for scale in (1, 257):
        colour_map = tuple((COLOURS.T.astype(int) * scale).ravel().tolist())
        data = tiff([packed(GREY // 17, 4)], {**SIZE, 258: 4, 262: 3, 320: colour_map})
        np.testing.assert_array_equal(levels(data), COLOURS[GREY // 17])


RGB_16 = RGB.astype(np.uint16) * 257
UNREADABLE = {
    "signed 8 bits": (tiff([GREY.tobytes()], {**SIZE, 262: 1, 339: 2}), "signed 8-bit samples of unknown range"),
    "signed 16 bits": (tiff([bytes(32)], {**SIZE, 258: 16, 262: 1, 339: 2}), "signed 16-bit samples of unknown range"),
    "32 bits": (tiff([bytes(64)], {**SIZE, 258: 32, 262: 1}), "32-bit samples of unknown range"),
    "floats": (tiff([bytes(64)], {**SIZE, 258: 32, 262: 1, 339: 3}), "floating-point samples of unknown range"),
    "no photometric": (tiff([GREY.tobytes()], SIZE), "samples of unknown meaning"),
    "planes of 16 bits": (colour(RGB_16, {}, planes=True), "separate planes"),
    "planes of reversed bits": (colour(RGB, {266: 2}, planes=True), "separate planes"),
    "other inks": (colour(np.dstack([RGB, GREY]), {262: 5, 332: 2}), "inks other than cyan"),
    "subsampled YCbCr": (tiff([bytes(48)], {**SIZE, 258: (8, 8, 8), 262: 6, 277: 3}), "YCbCr samples of an unusual"),
}
PREVIEWS = {
    "DNG": colour(RGB, {50706: (1, 4, 0, 0)}),
    "reduced": colour(RGB, {254: 1}),
    "mask": colour(RGB, {254: 4}),
    "reduced, by the old tag": colour(RGB, {255: 2}),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_tiff_that_pillow_misreads_is_refused(case):
    data, message = UNREADABLE[case]
    for source in (data, Image.open(io.BytesIO(data))):
        with pytest.raises(ImageError, match=f"holds {message}.*; save it with 8 bits per channel"):
            load_image(source)


@pytest.mark.parametrize("case", PREVIEWS)
def test_a_preview_is_not_taken_for_the_picture(case):
    for source in (PREVIEWS[case], Image.open(io.BytesIO(PREVIEWS[case]))):
        with pytest.raises(ImageError, match="is a camera raw file, or begins with a reduced preview"):
            load_image(source)


def test_the_first_page_of_a_tiff_is_read():
    np.testing.assert_array_equal(levels(colour(RGB, {254: 2})), RGB)


DAMAGED = {
    "samples": tiff([zlib.compress(RGB.tobytes())[:20]], {**SIZE, 258: (8, 8, 8), 259: 8, 262: 2, 277: 3}),
    "number of channels": tiff([RGB.tobytes()], {**SIZE, 258: (8, 8, 8), 262: 2, 277: 333}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_decoders_leave_stderr_to_us(case):
    script = "import sys; from fastvlm_mlx.inputs.images import load_image; load_image(sys.stdin.buffer)"
    run = subprocess.run([sys.executable, "-c", script], input=DAMAGED[case], capture_output=True, check=False)
    assert run.stderr.startswith(b"Traceback")
    assert b"ImageError: <stdin>: " in run.stderr


@pytest.mark.parametrize("image", [Image.fromarray(GREY.astype(np.int32)), Image.fromarray(GREY).convert("I")])
def test_integers_of_unknown_range_are_refused_as_image_and_as_array(image):
    for source, message in ((image, "32-bit samples of unknown range"), (np.asarray(image), "must be uint8 or float")):
        with pytest.raises(ImageError, match=message):
            load_image(source)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_jpeg_2000_of_8_bits_is_read(channels):
    mode = ("L", "LA", "RGB", "RGBA")[channels - 1]
    image = Image.fromarray(RGB).convert(mode).resize((64, 64))
    data = encoded(image, "JPEG2000", irreversible=False)
    np.testing.assert_array_equal(levels(data), np.asarray(image.convert("RGB")))


def test_jpeg_2000_of_16_bits_is_read_in_grey_alone():
    image = Image.fromarray(np.kron(GREY, np.ones((16, 16))).astype(np.uint16) * 257)
    data = encoded(image, "JPEG2000", irreversible=False)
    np.testing.assert_array_equal(levels(data)[..., 0], np.asarray(image) >> 8)
    data = encoded(Image.new("RGB", (64, 64), "white"), "JPEG2000")
    deep = data.replace(b"\x07\x01\x01" * 3, b"\x0f\x01\x01" * 3)  # the size of each channel's samples: 16 bits
    assert deep != data
    for source in (deep, Image.open(io.BytesIO(deep))):
        with pytest.raises(ImageError, match="holds samples of 16 bits; save it with 8 bits per channel"):
            load_image(source)


@pytest.mark.parametrize(("bits", "colour_type"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_the_transparent_colour_of_a_png_has_the_depth_of_its_samples(bits, colour_type):
    top = (1 << bits) - 1
    array = GREY[..., None] if colour_type == 0 else RGB
    samples = array.astype(int) * top // 255
    key = png_chunk(b"tRNS", samples[0, 1].astype(">u2").tobytes())
    data = png(samples, bits=bits, colour=colour_type, extra=[key])
    expected = np.broadcast_to((samples * 255 // top), RGB.shape).astype(np.uint8)
    np.testing.assert_array_equal(levels(data), expected)
    transparent = (samples == samples[0, 1]).all(axis=-1, keepdims=True)
    np.testing.assert_array_equal(levels(data, background="#0a0b0c"), np.where(transparent, (10, 11, 12), expected))


def alpha_sources() -> dict[str, object]:
    """The same picture, its left half transparent."""
    alpha = np.where(np.arange(8) < 4, 0, 255).astype(np.uint8) + np.zeros_like(GREY)
    rgba = Image.fromarray(np.dstack([RGB, alpha]))
    la = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(alpha)))
    palette = Image.fromarray(GREY // 17).convert("P")
    palette.putpalette(COLOURS.tobytes())
    indexes = np.unique(GREY[:, :4] // 17)
    opacities = bytes(0 if index in indexes else 255 for index in range(16))
    return {
        "RGBA": rgba,
        "LA": la,
        "PNG": encoded(rgba),
        "WEBP": encoded(rgba, "WEBP", lossless=True, exact=True),
        "TIFF": encoded(rgba, "TIFF"),
        "array": np.asarray(rgba),
        "premultiplied": rgba.convert("RGBa"),
        "palette": encoded(palette, transparency=opacities),
        "palette object": Image.open(io.BytesIO(encoded(palette, transparency=opacities))),
    }


@pytest.mark.parametrize("case", alpha_sources())
def test_a_background_shows_through_transparent_pixels(case):
    source = alpha_sources()[case]
    stored, on_white = levels(source), levels(source, background="white")
    assert (on_white[:, :4] == 255).all()
    np.testing.assert_array_equal(on_white[:, 4:], stored[:, 4:])
    if case != "premultiplied":  # nothing is left of its transparent colours
        assert len(np.unique(stored[:, :4])) > 2


@pytest.mark.parametrize("case", alpha_sources())
def test_dropped_alpha_is_noted_unless_a_background_is_given(case):
    notes: list[str] = []
    load_image(alpha_sources()[case], notify=notes.append)
    assert len(notes) == 1
    load_image(alpha_sources()[case], background="white", notify=notes.append)
    assert len(notes) == 1


def test_opaque_alpha_is_not_noted():
    for image in (Image.fromarray(RGB), Image.fromarray(RGB).convert("RGBA"), Image.fromarray(GREY).convert("P")):
        load_image(image, notify=pytest.fail)


def test_an_empty_fourth_channel_of_a_tga_is_no_alpha():
    image = Image.fromarray(np.dstack([RGB, np.zeros_like(GREY)]))
    np.testing.assert_array_equal(levels(encoded(image, "TGA"), background="white"), RGB)


def test_half_transparent_pixels_are_blended():
    image = Image.new("RGBA", (1, 1), (200, 100, 0, 51))  # 51 / 255 is a fifth
    assert levels(image, background="#ffff00")[0, 0].tolist() == [244, 224, 0]


@pytest.mark.parametrize("background", ["whit", "#12", "", 7, (255, 255, 255)])
def test_a_background_that_is_no_colour_is_refused(background):
    with pytest.raises(ConfigError, match="background must be a colour such as white or #f0f0f0, not "):
        load_image(RGB, background=background)


def test_threads_that_load_pictures_leave_warnings_as_they_were():
    data, filters = encoded(Image.new("RGB", (900, 900))), list(warnings.filters)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(load_image, [data] * 40))
    assert warnings.filters == filters


def test_a_palette_with_alpha_warns_no_one():
    image = Image.new("P", (2, 1))
    image.info["transparency"] = b"\0\1"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert levels(image).shape == (1, 2, 3)
