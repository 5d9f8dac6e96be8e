"""Films by their own time."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.watch.film import Film
from fastvlm_mlx.watch.outputs import Cue
from tests.watch.pictures import BLACK, FakeEngine, FakeStream, Pixels, scene, with_spot

A, B = scene(0), scene(1)
NAMES: list[tuple[Pixels, str]] = [(A, "A red ball."), (B, "A blue ball."), (with_spot(A), "A red ball and a cup.")]


def name(pixels: Any) -> str:
    """What the model says of a picture: what it knows, or how bright it is."""
    return next((text for known, text in NAMES if np.array_equal(known, pixels)), f"Something {pixels.mean():.3f}.")


def film(pictures: list[Pixels], error: BaseException | None = None, **settings: float) -> tuple[Film, FakeEngine]:
    engine = FakeEngine(name)
    stream: Any = FakeStream(pictures, error=error)
    return Film(stream, engine, lambda pixels: Request(image=pixels), clean=str, **settings), engine  # type: ignore


def cues(pictures: list[Pixels], **settings: float) -> list[Cue]:
    return list(film(pictures, **settings)[0].cues())


def near(*expected: tuple[float, float, str]) -> list[Cue]:
    return [Cue(pytest.approx(start, abs=0.11), pytest.approx(end, abs=0.11), text) for start, end, text in expected]


def mixed(first: Pixels, second: Pixels, count: int) -> list[Pixels]:
    return [(first + (second.astype(float) - first) * part).astype(np.uint8) for part in np.linspace(0, 1, count)]


def test_cues_begin_and_end_with_their_scenes() -> None:
    assert cues([A] * 20 + [B] * 20) == near((0, 2, "A red ball."), (2, 4, "A blue ball."))


def test_a_fade_is_cut_in_its_middle_and_not_described() -> None:
    assert cues([A] * 20 + mixed(A, B, 30) + [B] * 20) == near((0, 3.5, "A red ball."), (3.5, 7, "A blue ball."))


def test_nothing_is_told_of_black() -> None:
    pictures = [BLACK] * 10 + [A] * 20 + [BLACK] * 20 + [B] * 20 + [BLACK] * 5
    assert cues(pictures) == near((1, 3, "A red ball."), (5, 7, "A blue ball."))


def test_a_small_thing_that_comes_is_told() -> None:
    assert cues([A] * 20 + [with_spot(A)] * 20) == near((0, 2, "A red ball."), (2, 4, "A red ball and a cup."))


def test_the_model_is_asked_once_about_a_scene_that_stands_still() -> None:
    watched, engine = film([A] * 100, heartbeat=0)
    assert list(watched.cues()) == near((0, 10, "A red ball."))
    assert (len(engine.handles), watched.asked, watched.looks) == (1, 1, 100)


def test_a_heartbeat_asks_again_and_does_not_tell_the_same_again() -> None:
    watched, engine = film([A] * 100, heartbeat=3)
    assert list(watched.cues()) == near((0, 10, "A red ball."))
    assert len(engine.handles) == 4


def test_what_moves_all_the_time_is_told_every_second() -> None:
    found = cues([scene(100 + number) for number in range(60)])
    assert 4 <= len(found) <= 7
    assert all(second.start == first.end for first, second in pairwise(found))


def test_every_second_of_a_film_that_moves_can_be_told_less_often() -> None:
    watched, engine = film([scene(100 + number) for number in range(100)], every=3)
    list(watched.cues())
    assert len(engine.handles) <= 4


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_film_of_few_frames_is_described(count: int) -> None:
    watched, engine = film([A] * count)
    list(watched.cues())
    assert len(engine.handles) == 1


def test_a_film_without_a_frame_has_no_cue() -> None:
    assert cues([]) == []


def test_a_film_that_cannot_be_read_on_is_told_as_far_as_it_goes() -> None:
    watched, _ = film([A] * 20 + [B] * 20, error=ImageError("film.mp4: damaged"))
    found = watched.cues()
    assert [next(found), next(found)] == near((0, 2, "A red ball."), (2, 4, "A blue ball."))
    with pytest.raises(ImageError, match="damaged"):
        next(found)


def test_cues_come_while_the_film_is_read() -> None:
    watched, _ = film([A] * 20 + [B] * 20 + [A] * 200)
    assert next(watched.cues()).text == "A red ball."
    assert watched.looks < 60


def test_leaving_early_cancels_what_is_asked() -> None:
    engine = FakeEngine()
    stream: Any = FakeStream([A] * 20 + [B] * 20)
    watched = Film(stream, engine, lambda pixels: Request(image=pixels), clean=str, progress=_leave)  # type: ignore
    with pytest.raises(KeyboardInterrupt):
        list(watched.cues())
    assert engine.handles[0].cancelled


def _leave(time: float) -> None:
    if time > 1:
        raise KeyboardInterrupt
