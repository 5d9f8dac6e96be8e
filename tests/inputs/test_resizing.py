"""Resizing on a black square gives Apple's pixels to the bit, whatever the size, the resolution and the way."""

import time
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx.inputs import resizing
from fastvlm_mlx.inputs.images import load_image, preprocess
from fastvlm_mlx.inputs.turned import TurnedImage

BICUBIC = Image.Resampling.BICUBIC


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Black and white, so that levels overshoot and are cut."""
    levels = np.random.default_rng(seed).integers(0, 2, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(255 * levels)


def padded_first(image: Image.Image, resolution: int) -> np.ndarray:
    """Apple's order of steps: the whole square is made, then resized."""
    side = max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((resolution, resolution), BICUBIC))


def both_ways(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    return image, image.transpose(Image.Transpose.ROTATE_90)


@pytest.mark.parametrize(
    "size", [(1, 1), (3, 1), (1, 3), (200, 10), (10, 200), (64, 64), (64, 37), (37, 64), (99, 100), (301, 300)]
)
@pytest.mark.parametrize("threads", [1, 3])
def test_parts_and_bands_equal_padding_first(size, threads, monkeypatch):
    monkeypatch.setattr(resizing, "cpu_threads", lambda: threads)
    image = noise(*size)
    expected = padded_first(image, 64)
    np.testing.assert_array_equal(resizing._in_parts(TurnedImage(image), 64), expected)
    for band_pixels in (500, 1 << 24):
        monkeypatch.setattr(resizing, "_BAND_PIXELS", band_pixels)
        np.testing.assert_array_equal(resizing._in_bands(image, 64), expected)


@pytest.mark.parametrize("seed", range(8))
def test_any_size_at_any_resolution_equals_padding_first(seed):
    rng = np.random.default_rng(seed)
    for _ in range(8):
        long, resolution = int(rng.integers(1, 400)), 64 * int(rng.integers(1, 6))
        short = int(rng.integers(1, long + 1)) if seed % 2 else max(long // int(rng.integers(3, 99)), 1)
        for picture in both_ways(noise(short, long, seed)):
            np.testing.assert_array_equal(preprocess(picture, resolution), padded_first(picture, resolution))


@pytest.mark.parametrize("resolution", range(64, 1537, 64))
def test_every_resolution_equals_padding_first(resolution):
    rng = np.random.default_rng(resolution)
    for picture in both_ways(noise(int(rng.integers(100, 500)), 500)):
        np.testing.assert_array_equal(preprocess(picture, resolution), padded_first(picture, resolution))


@pytest.mark.parametrize("resolution", [64, 128, 256, 512, 1024])
def test_parts_are_exact_wherever_they_are_tried(resolution):
    rng = np.random.default_rng(resolution)
    for long in (7, min(resolution, 512), int(rng.integers(100, 1_000))):
        assert resizing._parts_are_exact(long, resolution)
        for picture in both_ways(noise(int(rng.integers(1, long + 1)), long)):
            np.testing.assert_array_equal(
                resizing._in_parts(TurnedImage(picture), resolution), padded_first(picture, resolution)
            )


@pytest.mark.parametrize("side", [4_032, 9_999, 19_999, 65_535])
@pytest.mark.parametrize("resolution", [256, 1_024])
def test_pillow_weighs_a_part_of_a_large_square_as_it_weighs_the_whole(side, resolution):
    row = noise(side, 1)
    whole = np.asarray(row.resize((resolution, 1), BICUBIC))
    part = resizing._Side(side - 2, side, resolution)
    cuts = part.cuts(7)
    for start, end in pairwise(cuts):
        first, last, low, high = part.part(start, end)
        pixels = row.crop((first + 1, 0, last + 1, 1))
        filtered = np.asarray(pixels.resize((end - start, 1), BICUBIC, box=(low, 0, high, 1)))
        np.testing.assert_array_equal(filtered, whole[:, start:end])
    assert len(cuts) > 7


@pytest.mark.parametrize(("side", "resolution"), [(4_000, 768), (100, 192), (65_535, 2_048)])
def test_parts_are_not_tried_where_their_places_are_rounded(side, resolution):
    assert not resizing._parts_are_exact(side, resolution)


@pytest.mark.parametrize("resolution", [64, 192, 512])
def test_a_very_wide_picture_equals_padding_first(resolution):
    picture = noise(20_000, 10)
    tall = Image.new("RGB", (resolution, 20_000))
    tall.paste(picture.resize((resolution, 10), BICUBIC), (0, 9_995))
    expected = np.asarray(tall.resize((resolution, resolution), BICUBIC))
    assert expected.any()
    np.testing.assert_array_equal(preprocess(picture, resolution), expected)


@pytest.mark.parametrize("resolution", [64, 192, 512])
def test_a_very_tall_picture_equals_padding_first(resolution):
    rows = np.asarray(noise(10, 20))
    square = Image.new("RGB", (20_000, 20))
    square.paste(Image.fromarray(rows), (9_995, 0))
    narrow = np.tile(np.asarray(square.resize((resolution, 20), BICUBIC)), (1_000, 1, 1))
    expected = np.asarray(Image.fromarray(narrow).resize((resolution, resolution), BICUBIC))
    assert expected.any()
    np.testing.assert_array_equal(preprocess(Image.fromarray(np.tile(rows, (1_000, 1, 1))), resolution), expected)


def test_a_grey_picture_has_equal_channels():
    grey = load_image(noise(300, 200).getchannel(0))
    pixels = preprocess(grey, 256)
    np.testing.assert_array_equal(pixels, padded_first(grey, 256))
    np.testing.assert_array_equal(pixels, np.repeat(pixels[..., :1], 3, axis=2))


@pytest.mark.parametrize("turn", [None, *Image.Transpose])
@pytest.mark.parametrize("size", [(1, 1), (300, 200), (200, 301), (30, 900), (900, 30)])
def test_a_picture_that_is_turned_while_it_is_resized_equals_one_turned_first(size, turn, monkeypatch):
    monkeypatch.setattr(resizing, "_TURNED_PIXELS", 10_000)
    picture = TurnedImage(noise(*size), turn)
    upright = picture.upright()
    assert picture.size == upright.size
    for resolution in (192, 256):
        np.testing.assert_array_equal(preprocess(picture, resolution), padded_first(upright, resolution))


def test_a_photograph_is_not_turned_at_its_full_size(monkeypatch):
    turned = []
    transpose = Image.Image.transpose

    def counting(image: Image.Image, turn: Image.Transpose) -> Image.Image:
        turned.append(image.width * image.height)
        return transpose(image, turn)

    pictures = [
        TurnedImage(noise(1_200, 900), turn) for turn in (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270)
    ]
    monkeypatch.setattr(resizing, "_TURNED_PIXELS", 100_000)
    monkeypatch.setattr(Image.Image, "transpose", counting)
    for picture in pictures:
        preprocess(picture, 512)
    assert turned
    assert max(turned) < 0.4 * 1_200 * 900


@pytest.mark.parametrize("size", [(1_200, 900), (900, 1_200)])
def test_a_photograph_is_copied_at_black_edges_only(size, monkeypatch):
    copied = []
    crop = Image.Image.crop

    def counting(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
        if image is picture:
            copied.append((box[2] - box[0]) * (box[3] - box[1]))
        return crop(image, box)

    picture = noise(*size)
    monkeypatch.setattr(Image.Image, "crop", counting)
    preprocess(picture, 512)
    assert sum(copied) < 0.1 * size[0] * size[1]


def test_the_work_for_a_tall_picture_does_not_grow_with_the_square():
    tall, wide = Image.new("RGB", (150, 9_000)), Image.new("RGB", (9_000, 150))
    seconds = {size: [] for size in (tall.size, wide.size)}
    for image in (tall, wide) * 3:
        start = time.process_time()
        preprocess(image, 256)
        seconds[image.size].append(time.process_time() - start)
    # Filtering whole rows of the square takes 50 times as long.
    assert min(seconds[tall.size]) < 15 * min(seconds[wide.size])


def test_the_black_beside_a_very_wide_picture_stays_black():
    pixels = preprocess(noise(20_000, 10), 128)
    assert pixels[:63].max() == 0
    assert pixels[65:].max() == 0
    assert pixels[63:65].max() > 0
