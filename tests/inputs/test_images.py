"""Any source becomes the same RGB picture, and its pixels are Apple's to the bit."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from fastvlm_mlx.backend import mx
from fastvlm_mlx.errors import ConfigError, ImageError
from fastvlm_mlx.inputs.images import load_image, preprocess
from fastvlm_mlx.inputs.resolution import as_resolution, auto_detail, auto_resolutions, check_resolution
from tests.checkpoints import GOLDEN
from tests.pictures import stored_with

NAMES = ("landscape", "portrait", "square", "large", "tiny")


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def in_unit_interval(pixels: np.ndarray) -> np.ndarray:
    """What Apple's processor computes of the bytes."""
    return pixels.astype(np.float32) / np.float32(255)


@pytest.mark.parametrize("name", NAMES)
def test_pixel_values_are_apples_to_the_bit(name):
    expected = load_file(GOLDEN / "apple" / "expected.safetensors")[f"{name}.pixel_values"]
    pixels = preprocess(load_image(GOLDEN / "apple" / "images" / f"{name}.png"), 128)
    np.testing.assert_array_equal(in_unit_interval(pixels), expected.transpose(1, 2, 0), strict=True)


@pytest.mark.parametrize("golden", ["apple_untied", "apple_hot"])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_scale_to_the_floats_that_apple_computes(golden, name):
    # These goldens come without their pictures; their values are multiples of 1/255, so the bytes can be told.
    expected = load_file(GOLDEN / golden / "expected.safetensors")[f"{name}.pixel_values"]
    pixels = np.rint(expected * 255).astype(np.uint8)
    np.testing.assert_array_equal(in_unit_interval(pixels), expected, strict=True)


def test_near_black_image_stays_black():
    assert preprocess(Image.new("RGB", (50, 40), (1, 1, 1)), 64).max() == 1


def test_content_is_centred_with_the_odd_pixel_after_it():
    pixels = preprocess(Image.new("RGB", (64, 61), "white"), 64)
    assert np.flatnonzero(pixels[:, 0, 0]).tolist() == list(range(1, 62))


def test_every_kind_of_source_gives_the_same_picture(tmp_path):
    picture = noise(7, 5)
    data = encoded(picture)
    path = tmp_path / "ein bild.png"
    path.write_bytes(data)
    array = np.asarray(picture)
    with path.open("rb") as file:
        for source in (
            *(path, str(path), data, bytearray(data), memoryview(data), file, io.BytesIO(data), picture, array),
            "data:image/png;base64," + base64.b64encode(data).decode(),
            "data:image/png," + "".join(f"%{byte:02x}" for byte in data),
            np.dstack([array, array[..., 0]]),
            array / 255,
            (array / 255).astype(np.float32),
        ):
            np.testing.assert_array_equal(np.asarray(load_image(source)), array)


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    noise(2, 2).save(tmp_path / "photo.png")
    assert load_image("~/photo.png").size == (2, 2)


def test_mlx_arrays_are_images():
    array = np.asarray(noise(6, 4))
    for dtype in (mx.float16, mx.float32):  # a half of a step of 1/255 is 4 times float16's rounding
        np.testing.assert_array_equal(np.asarray(load_image((mx.array(array) / 255).astype(dtype))), array)
    np.testing.assert_array_equal(np.asarray(load_image(mx.array(array))), array)
    with pytest.raises(ImageError, match=r"an array cannot be read .*; convert it to uint8 or float32"):
        load_image(mx.array(array).astype(mx.bfloat16))


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1)])
def test_grey_arrays_are_repeated_over_the_channels(shape):
    array = np.arange(24, dtype=np.uint8).reshape(shape)
    expected = np.broadcast_to(array.reshape(4, 6, 1), (4, 6, 3))
    np.testing.assert_array_equal(np.asarray(load_image(array)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = noise(6, 4)
    data = stored_with(orientation, upright)
    for source in (data, Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(upright))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_loading_twice_turns_once(orientation, kind):
    data = stored_with(orientation, noise(6, 4), kind)
    for source in (data, Image.open(io.BytesIO(data))):
        once = load_image(source)
        assert once.size == (6, 4)
        assert once.getexif().get(0x0112, 1) == 1
        np.testing.assert_array_equal(np.asarray(load_image(once)), np.asarray(once))


def test_loading_again_copies_only_if_told_to():
    picture = load_image(stored_with(6, noise(6, 4)))
    assert load_image(picture, copy=False) is picture
    assert load_image(picture) is not picture


def test_damaged_exif_counts_as_none():
    picture = noise(6, 4)
    data = encoded(picture, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(np.asarray(load_image(data)), np.asarray(picture))


def test_sixteen_bit_grey_keeps_its_high_byte():
    samples = np.array([[0, 255, 256, 32_768, 65_535]], dtype=np.uint16)
    for data in (encoded(Image.fromarray(samples)), encoded(Image.fromarray(samples), "TIFF")):
        assert np.asarray(load_image(data))[0].tolist() == [[value] * 3 for value in (0, 0, 1, 128, 255)]


def test_sixteen_bit_pgm_keeps_its_high_byte():
    data = b"P5 3 1 65535\n" + np.array([0, 32_768, 65_535], dtype=">u2").tobytes()
    assert np.asarray(load_image(data))[0, :, 0].tolist() == [0, 128, 255]


def test_alpha_is_dropped_not_blended():
    for mode in ("RGBA", "LA"):
        image = Image.new("RGBA", (2, 2), (200, 200, 200, 0)).convert(mode)
        assert np.asarray(load_image(image)).tolist() == [[[200] * 3] * 2] * 2


def test_palette_with_transparency_shows_its_colours():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    data = encoded(image, transparency=b"\x00\xff")
    assert np.asarray(load_image(data)).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_cmyk_jpeg_shows_its_colours():
    red = Image.new("RGB", (16, 16), (220, 20, 20)).convert("CMYK")
    # JPEG at quality 95 moves flat colours by at most a few levels.
    np.testing.assert_allclose(np.asarray(load_image(encoded(red, "JPEG", quality=95)))[8, 8], (220, 20, 20), atol=4)


def test_animation_shows_its_first_frame():
    first, second = (Image.new("RGB", (3, 3), colour) for colour in ("red", "blue"))
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(first, kind, save_all=True, append_images=[second], **options)
        assert np.asarray(load_image(data))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["1", "L", "YCbCr", "HSV"])
def test_other_modes_are_converted(mode):
    assert load_image(noise(3, 2).convert(mode)).mode == "RGB"


def test_a_pil_image_is_left_as_it_was():
    image = noise(4, 4)
    before = np.asarray(image).copy()
    load_image(image).putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(np.asarray(image), before)


@pytest.mark.parametrize(
    ("size", "native", "expected"),
    [
        ((1, 1), 1024, 256),
        ((256, 10), 1024, 256),
        ((257, 10), 1024, 320),
        ((500, 400), 1024, 512),
        ((400, 512), 1024, 512),
        ((1024, 768), 1024, 1024),
        ((4000, 3000), 1024, 1024),
        ((4000, 3000), 128, 128),
    ],
)
def test_auto_neither_exceeds_the_picture_nor_the_models_resolution(size, native, expected):
    choices = auto_resolutions(size, native)
    assert choices[-1] == expected
    assert choices[0] == min(256, native)


@pytest.mark.parametrize(("value", "detail"), [("auto", np.inf), ("auto:12", 12), ("auto:1.5", 1.5), (256, None)])
def test_auto_says_how_many_pixels_a_detail_gets(value, detail):
    assert auto_detail(value) == detail


@pytest.mark.parametrize("value", ["auto:", "auto:x", "auto:0", "auto:65", "auto:nan", "auto:-1", "auto:inf"])
def test_impossible_details_are_refused(value):
    with pytest.raises(ConfigError, match=r"^a detail takes 1 to 64 pixels, as in auto:12, not '"):
        as_resolution(value)


@pytest.mark.parametrize("resolution", [64, 256, 1024, 1536, 4096])
def test_multiples_of_64_are_resolutions(resolution):
    assert check_resolution(resolution) == resolution


@pytest.mark.parametrize(
    ("resolution", "message"),
    [
        (0, "from 64 to 4096, not 0; try 64"),
        (-64, "not -64; try 64"),
        (63, "not 63; try 64"),
        (500, "not 500; try 448"),
        (4160, "not 4160; try 4096"),
        (512.0, "not 512.0"),
        (True, "not True"),
        ("512", "whole number of pixels or 'auto', not '512'"),
        (None, "not None"),
    ],
)
def test_bad_resolution_is_refused(resolution, message):
    with pytest.raises(ConfigError, match=message):
        check_resolution(resolution)
