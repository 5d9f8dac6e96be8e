"""When a picture counts as another one, and from when to when."""

import numpy as np
import pytest
from numpy.typing import NDArray

from fastvlm_mlx.watch.changes import GRID, Scenes, cell_changes, distance, is_dark, sign

Pixels = NDArray[np.uint8]


def picture(seed: int, side: int = 256) -> Pixels:
    """Coarse blocks of colour around the middle of the range."""
    blocks = np.random.default_rng(seed).integers(60, 190, (8, 8, 3), np.uint8)
    return np.kron(blocks, np.ones((side // 8, side // 8, 1), np.uint8))


def noisy(pixels: Pixels, sigma: float, seed: int) -> Pixels:
    noise = np.random.default_rng(seed).normal(0, sigma, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def mixed(first: Pixels, second: Pixels, part: float) -> Pixels:
    return (first * (1 - part) + second * part).astype(np.uint8)


def accepted(frames: list[tuple[float, Pixels]], **settings: float) -> list[tuple[float, float, float]]:
    """When each new picture was accepted, when the one before had gone and when this one was there."""
    scenes = Scenes(**settings)
    found = []
    for time, pixels in frames:
        look = scenes.look(time, sign(pixels))
        if look.ready:
            found.append((time, *scenes.accept(look)))
    return found


def held(pixels: Pixels, start: float, seconds: float) -> list[tuple[float, Pixels]]:
    """Ten frames a second that do not move."""
    return [(start + number / 10, pixels) for number in range(round(seconds * 10))]


@pytest.mark.parametrize("shape", [(32, 32), (1, 1), (480, 640), (700, 40), (33, 1000)])
def test_a_picture_of_any_shape_has_a_signature(shape: tuple[int, int]) -> None:
    signature = sign(np.full((*shape, 3), 90, np.uint8))
    assert signature.shape == (GRID, GRID, 3)
    np.testing.assert_array_equal(signature, 90)


def test_one_small_thing_counts_as_much_as_a_new_scene() -> None:
    first = picture(0)
    second = first.copy()
    second[100:124, 60:84] = (250, 20, 20)  # 1 % of the picture
    assert distance(sign(first), sign(second)) > 60
    assert (cell_changes(sign(first), sign(second)) > 16).mean() < 0.03


def test_brightness_that_changes_everywhere_is_no_change() -> None:
    first = picture(1)
    assert distance(sign(first), sign((first * 0.85).astype(np.uint8))) < 4


def test_black_is_dark_and_a_dim_scene_is_not() -> None:
    assert is_dark(sign(np.full((64, 64, 3), 3, np.uint8)))
    dim = np.full((64, 64, 3), 3, np.uint8)
    dim[20:30, 20:30] = 60
    assert not is_dark(sign(dim))


def test_a_cut_is_accepted_with_the_second_look_and_dated_to_the_first() -> None:
    frames = held(picture(0), 0, 2) + held(picture(1), 2, 1)
    assert accepted(frames) == [(0.1, 0.0, 0.0), (2.1, 2.0, 2.0)]


def test_a_fade_is_accepted_when_it_is_over_and_dated_to_its_middle() -> None:
    first, second = picture(0), picture(1)
    fade = [(2 + number / 10, mixed(first, second, number / 30)) for number in range(30)]
    found = accepted(held(first, 0, 2) + fade + held(second, 5, 2))
    assert len(found) == 2
    time, gone, came = found[1]
    assert 5.3 <= time <= 5.7
    assert gone == pytest.approx(3.5, abs=0.15)
    assert came == pytest.approx(3.5, abs=0.15)


def test_through_black_one_scene_goes_before_the_other_comes() -> None:
    first, second, black = picture(0), picture(1), np.zeros((256, 256, 3), np.uint8)
    down = [(2 + number / 10, mixed(first, black, number / 10)) for number in range(10)]
    up = [(3.2 + number / 10, mixed(black, second, number / 10)) for number in range(10)]
    found = accepted(held(first, 0, 2) + down + held(black, 3, 0.2) + up + held(second, 4.2, 1))
    assert len(found) == 3
    assert found[1][1] == pytest.approx(2.5, abs=0.15)
    assert found[2][2] == pytest.approx(3.7, abs=0.15)


def test_something_that_passes_by_is_no_new_scene() -> None:
    first = picture(0)
    passing = [(2 + number / 10, picture(10 + number)) for number in range(5)]
    assert len(accepted(held(first, 0, 2) + passing + held(first, 2.5, 2))) == 1


def test_noise_is_no_change_and_a_new_thing_within_it_is() -> None:
    first = picture(0)
    second = first.copy()
    second[100:140, 60:100] = (250, 20, 20)
    frames = [(number / 10, noisy(first if number < 40 else second, 20, number)) for number in range(60)]
    times = [time for time, _, _ in accepted(frames)]
    assert len(times) == 2
    assert times[1] <= 4.2


def test_a_picture_that_never_stands_still_is_accepted_after_some_patience() -> None:
    frames = [(number / 10, picture(number)) for number in range(50)]
    times = [time for time, _, _ in accepted(frames, patience=1.0)]
    assert 3 <= len(times) <= 5
    assert min(np.diff(times)) >= 1.0


def test_a_higher_threshold_notices_less() -> None:
    first = picture(0)
    second = first.copy()
    second[100:140, 60:100] = np.clip(second[100:140, 60:100].astype(int) + 30, 0, 255)
    frames = held(first, 0, 1) + held(second, 1, 1)
    assert len(accepted(frames)) == 2
    assert len(accepted(frames, least=50)) == 1
