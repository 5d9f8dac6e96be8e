"""`--resolution auto --detail 8` takes as few pixels as the finest details need, wherever and however stored."""

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Transpose

from fastvlm_mlx.inputs.detail import Details, resolution_for_details
from fastvlm_mlx.inputs.images import choose_resolution, load_turned
from fastvlm_mlx.inputs.turned import TurnedImage

SIDE = 1024


def sheet(size: int = 0, *, ink: int = 0, text: str = "The quick brown fox") -> Image.Image:
    """A page with one line of print of this size, and a large disc with a sharp edge."""
    page = Image.new("RGB", (SIDE, 768), (240, 240, 240))
    draw = ImageDraw.Draw(page)
    draw.ellipse((500, 160, 900, 560), fill=(20, 60, 200))
    if size:
        draw.text((40, min(600, 740 - 2 * size)), text, font=ImageFont.load_default(size), fill=(ink, ink, ink))
    return page


def stripes(period: int) -> TurnedImage:
    levels = np.uint8(255 * (np.arange(SIDE) // (period // 2) % 2))
    return TurnedImage(Image.fromarray(np.tile(levels, (SIDE, 1))).convert("RGB"))


@pytest.mark.parametrize("picture", [Image.new("RGB", (SIDE, SIDE), "red"), sheet()])
def test_large_things_need_few_pixels_however_sharp(picture: Image.Image) -> None:
    assert resolution_for_details(picture, SIDE, 8) == 256


def test_one_line_of_print_counts_by_its_size() -> None:
    sizes = [resolution_for_details(sheet(size), SIDE, 8) for size in (24, 96, 140, 280)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == SIDE
    assert 256 < sizes[2] < sizes[1] < SIDE
    assert sizes[3] == 256


def test_print_counts_though_it_is_grey() -> None:
    black, grey = (resolution_for_details(sheet(16, ink=ink), SIDE, 8) for ink in (0, 100))
    assert grey >= 0.75 * black > 512


def test_more_pixels_for_a_detail_never_lower_the_resolution() -> None:
    picture = sheet(96)
    chosen = [resolution_for_details(picture, SIDE, detail) for detail in (1, 3, 5, 8, 12, 64)]
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (256, SIDE)


@pytest.mark.parametrize("period", [4, 8, 16])
def test_spacing_of_stripes_is_their_period(period: int) -> None:
    # At 512 pixels, it is half as many. A constant for faint textures is added to the contrast of 127.5 levels.
    assert Details(stripes(period), SIDE).spacing(512) == pytest.approx(period / 2 * (127.5 + 60) / 127.5, rel=0.2)


def test_faint_noise_is_no_detail() -> None:
    noise = np.random.default_rng(0).normal(128, 3, (768, SIDE, 1)).clip(0, 255).astype(np.uint8)
    assert resolution_for_details(Image.fromarray(np.repeat(noise, 3, 2)), SIDE, 8) == 256


@pytest.mark.parametrize("turn", Transpose)
@pytest.mark.parametrize("size", [(401, 303), (1025, 700), (2555, 1999)])
def test_the_way_that_a_picture_is_stored_changes_nothing(turn: Transpose, size: tuple[int, int]) -> None:
    upright = sheet(20).resize(size)
    stored = TurnedImage(upright, turn)
    turned = TurnedImage(stored.upright())
    one, other = Details(stored, 640), Details(turned, 640)
    assert [one.spacing(side) for side in (256, 384)] == [other.spacing(side) for side in (256, 384)]


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (20000, 3), (7, 9), (4096, 4096)])
def test_any_shape_has_a_resolution(size: tuple[int, int]) -> None:
    for colour in ("white", "black"):
        assert resolution_for_details(Image.new("RGB", size, colour), SIDE, 8) == 256


def test_without_a_bound_nothing_is_shrunk() -> None:
    blank = Image.new("RGB", (700, 300))
    assert choose_resolution([blank], "auto", SIDE) == 704
    assert choose_resolution([blank], "auto:64", SIDE) == 256


def test_a_model_of_few_pixels_gets_its_own() -> None:
    assert [resolution_for_details(sheet(12), native, 8) for native in (64, 192, 256)] == [64, 192, 256]


def test_a_file_an_array_and_a_picture_are_the_same(tmp_path: Path) -> None:
    picture = sheet(96)
    picture.save(tmp_path / "page.png")
    sources = (tmp_path / "page.png", np.asarray(picture), picture)
    chosen = {choose_resolution([load_turned(source)], "auto:8", SIDE) for source in sources}
    assert len(chosen) == 1
    assert 256 < chosen.pop() < SIDE


def test_it_is_cheap() -> None:
    picture = sheet(12).resize((2048, 1536))
    start = time.thread_time()
    resolution_for_details(picture, SIDE, 8)
    assert time.thread_time() - start < 0.5  # 20 ms where nothing else runs; a tower takes seconds
