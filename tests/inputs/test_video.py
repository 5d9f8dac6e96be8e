import time
from pathlib import Path

import pytest

from fastvlm_mlx.errors import FastVLMError, ImageError
from fastvlm_mlx.inputs.video import open_stream
from tests import films

pytest.importorskip("av", reason="the extra video is not installed")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds, ten frames a second."""
    return films.write(tmp_path_factory.mktemp("film") / "film.mp4", [i / 10 for i in range(20)])


def test_a_film_gives_every_frame_with_its_own_time(film: Path) -> None:
    with open_stream(str(film)) as stream:
        frames = list(stream)
    assert (stream.live, stream.size) == (False, films.SIZE)
    assert stream.duration == pytest.approx(2, abs=0.11)
    assert [films.number_of(frame.pixels) for frame in frames] == list(range(20))
    assert [frame.time for frame in frames] == pytest.approx([i / 10 for i in range(20)])


def test_a_rate_leaves_out_the_frames_that_come_earlier(film: Path) -> None:
    with open_stream(str(film), rate=2) as stream:
        assert [films.number_of(frame.pixels) for frame in stream] == [0, 5, 10, 15]


def test_frames_come_by_time_where_the_rate_of_the_film_varies(tmp_path: Path) -> None:
    times = [0, 0.1, 0.2, 1.5, 1.6, 4.0]
    film = films.write(tmp_path / "varying.mkv", times)
    with open_stream(str(film), rate=1) as stream:
        assert [frame.time for frame in stream] == pytest.approx([0, 1.5, 4.0], abs=0.002)


def test_a_stretch_of_a_film_keeps_the_times_of_the_film(film: Path) -> None:
    with open_stream(str(film), start=0.65, end=1.2) as stream:
        assert [round(frame.time, 3) for frame in stream] == [0.7, 0.8, 0.9, 1.0, 1.1]


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_the_frames_of_a_turned_film_are_upright(tmp_path: Path, degrees: int) -> None:
    film = films.write(tmp_path / "turned.mov", [0, 0.1], rotation=degrees)
    with open_stream(str(film)) as stream:
        pixels = next(iter(stream)).pixels
    height, width, _ = pixels.shape
    assert (width, height) == stream.size == (films.SIZE if degrees % 180 == 0 else films.SIZE[::-1])
    corner = {0: (4, 4), 90: (height - 4, 4), 180: (height - 4, width - 4), 270: (4, width - 4)}[degrees]
    red, green, _ = pixels[corner]
    assert red > 200 > 60 > green


def test_the_test_pattern_comes_by_the_clock_and_can_be_closed_by_another_thread() -> None:
    with open_stream("@test", rate=20) as stream:
        begin = time.monotonic()
        for frame in stream:
            if frame.time > 0.3:
                stream.close()
    assert stream.live
    assert stream.duration is None
    assert 0.25 < time.monotonic() - begin < 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.mp4", "missing.mp4: no such file"),
        ("/", "/: is a folder, not a film"),
        ("lavfi:nosuch", "lavfi:nosuch: cannot be read (Filter not found)"),
        ("lavfi:anullsrc", "lavfi:anullsrc: has no video track"),
        ("ftp://x/y.mp4", "ftp://x/y.mp4: only http://, https://, rtsp:// and rtsps:// can be opened"),
    ],
)
def test_what_is_no_source_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ImageError) as caught:
        open_stream(name)
    assert str(caught.value) == message


def test_a_text_is_no_film(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_text("not a film at all\n" * 100)
    with pytest.raises(ImageError, match="not a film that can be read"):
        open_stream(str(tmp_path / "film.mp4"))


@pytest.mark.parametrize("settings", [{"rate": 0}, {"rate": float("nan")}, {"start": -1}, {"start": 2, "end": 1}])
def test_a_wrong_number_is_refused(film: Path, settings: dict[str, float]) -> None:
    with pytest.raises(FastVLMError, match="must be a number"):
        open_stream(str(film), **settings)
