import io
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fastvlm_mlx.errors import FastVLMError, ImageError
from fastvlm_mlx.inputs import video
from fastvlm_mlx.inputs.decoding import Decoder
from fastvlm_mlx.inputs.video import Frame, open_stream
from tests import films

av = pytest.importorskip("av", reason="the extra video is not installed")


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
    assert time.monotonic() - begin > 0.25


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.mp4", "missing.mp4: no such file"),
        ("@camrea:1", "@camrea:1: no such source; did you mean @camera:1?"),
        ("@clipboard", "@clipboard: no such source; there are @camera, @screen, @window:TITLE and @test"),
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


def noisy(number: int) -> NDArray[np.uint8]:
    """A frame that takes so many bytes that damage hits it."""
    frame = films.shade(number)
    frame[32:] = np.random.default_rng(number).integers(0, 256, (16, 64, 3))
    return frame


def frames_of(path: Path) -> tuple[list[Frame], list[str]]:
    """The frames of a damaged film, and what was said of it."""
    notes: list[str] = []
    with open_stream(str(path), notify=notes.append) as stream:
        return list(stream), notes


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_film_that_is_damaged_in_the_middle_is_used_up_to_its_end(tmp_path: Path, suffix: str) -> None:
    film = films.write(tmp_path / f"film{suffix}", [i / 10 for i in range(24)], draw=noisy)
    data = bytearray(film.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    film.write_bytes(data)
    frames, notes = frames_of(film)
    assert 15 < len(frames) < 25
    assert frames[-1].time == pytest.approx(2.3)
    assert len(notes) == 1
    assert "damaged after 1." in notes[0]
    assert "; what can be read is used" in notes[0]


def test_a_film_that_was_cut_says_where_it_ends(tmp_path: Path) -> None:
    film = films.write(tmp_path / "film.mkv", [i / 10 for i in range(60)], draw=noisy)
    film.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    frames, notes = frames_of(film)
    assert 20 < len(frames) < 40
    assert notes == [
        f"{film}: incomplete: it should last 5.9 s, and ends after {frames[-1].time:.1f} s; what can be read is used"
    ]


def test_a_hole_in_a_stream_that_was_recorded_is_said_once(tmp_path: Path) -> None:
    times = [number / 10 for number in range(60) if not 10 <= number < 30 and not 40 <= number < 55]
    frames, notes = frames_of(films.write(tmp_path / "film.ts", times, gop=1))
    np.testing.assert_allclose([frame.time for frame in frames], times, atol=1e-3)
    assert notes == [f"{tmp_path / 'film.ts'}: damaged after 0.9 s; what can be read is used"]


def test_a_picture_that_stands_still_for_long_is_no_hole_where_films_may_pause(tmp_path: Path) -> None:
    assert frames_of(films.write(tmp_path / "film.mp4", [0.0, 0.1, 5.0]))[1] == []


def test_a_film_without_a_video_track_says_so(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "song.mka"), "w") as container:
        track: Any = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        container.mux(track.encode(sound))
        container.mux(track.encode())
    with pytest.raises(ImageError, match=r"song\.mka: has no video track$"):
        open_stream(str(tmp_path / "song.mka"))


def test_a_film_without_times_has_those_of_its_rate(tmp_path: Path) -> None:
    film = films.write(tmp_path / "film.h264", [i / 10 for i in range(5)])
    frames, _ = frames_of(film)
    steps = np.diff([frame.time for frame in frames])
    assert len(frames) == 5
    np.testing.assert_allclose(steps, steps[0], atol=1e-6)  # rounded to ticks
    assert steps[0] > 0


def test_frames_whose_pixels_are_not_square_are_stretched() -> None:
    with open_stream("lavfi:color=red:s=64x48:d=1,setsar=3/2") as stream:
        assert stream.size == (96, 48)


def test_few_frames_of_a_long_film_are_found_by_its_key_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten hours, of which a frame every two hours is decoded with little else."""
    film = films.write(
        tmp_path / "long.mp4", [60.0 * i for i in range(600)], draw=lambda n: films.shade(n % 24), gop=10
    )
    decoded: list[float] = []
    real = Decoder.next_frame

    def counted(self: Decoder) -> tuple[Any, float] | None:
        found = real(self)
        decoded.extend([] if found is None else [found[1]])
        return found

    monkeypatch.setattr(Decoder, "next_frame", counted)
    with open_stream(str(film), rate=1 / 7200) as stream:
        assert [frame.time for frame in stream] == [0, 7200, 14400, 21600, 28800]
    assert len(decoded) < 60


def test_a_film_on_the_web_is_a_film(film: Path) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(film.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        handler.log_message = lambda *_: None  # type: ignore[attr-defined]
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{film.name}"
        with open_stream(url, rate=2) as stream:
            numbers = [films.number_of(frame.pixels) for frame in stream]
        with pytest.raises(ImageError, match=r"missing\.mp4: cannot be read \(Server returned 404 Not Found\)"):
            open_stream(f"{url.rpartition('/')[0]}/missing.mp4")
        server.shutdown()
    assert (stream.live, numbers) == (False, [0, 5, 10, 15])


def test_a_playlist_opens_no_other_file(tmp_path: Path, film: Path) -> None:
    """Neither one that a file names, as a film may come from a stranger."""
    for name, text in {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{film}\n#EXT-X-ENDLIST\n",
        "list.mp4": f"ffconcat version 1.0\nfile '{film}'\n",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ImageError, match="not a film that can be read"):
            open_stream(str(tmp_path / name))


class _Camera(BaseHTTPRequestHandler):
    """A camera on the network that sends pictures, and then keeps still."""

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        picture = io.BytesIO()
        Image.new("RGB", (64, 48), "red").save(picture, "JPEG")
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        part = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(picture.getvalue())
        self.wfile.write((part + picture.getvalue() + b"\r\n") * 30)
        self.server.quiet.wait(60)  # type: ignore[attr-defined]


@pytest.fixture
def camera() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Camera) as server:
        server.quiet = Event()  # type: ignore[attr-defined]
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.quiet.set()  # type: ignore[attr-defined]
        server.shutdown()


def opened(camera: str) -> Any:
    """A stream; tried again where the camera was held up for longer than the limit of a test."""
    for _ in range(9):
        with suppress(ImageError):
            return open_stream(camera)
    return open_stream(camera)


def test_a_stream_on_the_web_that_keeps_still_is_given_up(camera: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "NETWORK_TIMEOUT", 0.4)
    with opened(camera) as stream:
        assert (stream.live, stream.duration, stream.size) == (True, None, (64, 48))
        with pytest.raises(ImageError, match=r"/: no more frames; nothing has come for 0\.4 s$"):
            list(stream)


def test_a_stream_that_is_closed_while_it_waits_ends_without_an_error(
    camera: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "NETWORK_TIMEOUT", 0.6)
    for _ in range(10):
        stream = opened(camera)
        Timer(0.2, stream.close).start()
        try:
            assert all(frame.pixels.shape == (48, 64, 3) for frame in stream)
        except ImageError:  # the timer was held up, and nothing came for too long
            continue
        break
    else:
        pytest.fail("a stream that was closed ended in an error, again and again")
