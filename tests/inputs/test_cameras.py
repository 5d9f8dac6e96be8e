import errno
from collections.abc import Iterator
from threading import Event, Thread
from typing import Any

import pytest

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.inputs import cameras, video
from fastvlm_mlx.inputs.cameras import Camera
from fastvlm_mlx.inputs.decoding import Place
from fastvlm_mlx.inputs.video import open_stream

av = pytest.importorskip("av", reason="the extra video is not installed")

TWO = [Camera("/dev/video0", "Integrated Webcam"), Camera("/dev/video2", "Desk View")]


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Two cameras that show a grey picture; what is opened is listed."""
    opened: list[tuple[str, dict[str, Any]]] = []
    real = av.open

    def open_device(address: str, **settings: Any) -> Any:
        opened.append((address, settings))
        return real("color=gray:s=32x16:r=30,realtime", format="lavfi")

    monkeypatch.setattr(cameras, "list_cameras", lambda: TWO)
    monkeypatch.setattr(av, "open", open_device)
    monkeypatch.setattr("sys.platform", "linux")
    return opened


def pretend(monkeypatch: pytest.MonkeyPatch, graph: str) -> None:
    """Puts a graph in the place of the camera."""

    def places(name: str) -> Iterator[Place]:
        yield Place(address=graph, name=name, format="lavfi", device=True, dark="shows only black; uncover it")

    monkeypatch.setattr(video, "camera_places", places)


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("@camera", "/dev/video0"),
        ("@camera:1", "/dev/video2"),
        ("@camera:desk", "/dev/video2"),
        ("@camera:/dev/video7", "/dev/video7"),
    ],
)
def test_a_camera_is_named_by_number_title_or_device(two: list[Any], name: str, address: str) -> None:
    with open_stream(name) as stream:
        assert stream.live
        assert next(iter(stream)).pixels.shape == (16, 32, 3)
    assert [each for each, _ in two] == [address]


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("name", ["@camera:2", "@camera:none"])
def test_a_camera_that_is_not_there_lists_those_that_are(name: str) -> None:
    with pytest.raises(ImageError, match=rf"^{name}: no such camera; there are 0: Integrated Webcam, 1: Desk View$"):
        open_stream(name)


def test_a_machine_without_cameras_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cameras, "list_cameras", list)
    with pytest.raises(ImageError, match=r"^@camera: no camera was found"):
        open_stream("@camera")


@pytest.mark.parametrize(
    ("platform", "number", "message"),
    [
        ("linux", errno.EBUSY, "@camera: the camera is in use; close the other program"),
        (
            "linux",
            errno.EACCES,
            "@camera: the camera may not be used; join the group video: sudo usermod -aG video $USER",
        ),
        ("linux", errno.ENODEV, "@camera: there is no such camera, or it was unplugged"),
        (
            "darwin",
            errno.EIO,
            "@camera: the camera cannot be opened; another program may use it, or allow this terminal "
            "in System Settings > Privacy & Security > Camera, then start it anew",
        ),
    ],
)
def test_a_camera_that_cannot_be_opened_says_why_in_one_line(
    monkeypatch: pytest.MonkeyPatch, platform: str, number: int, message: str
) -> None:
    def refuse(address: str, **settings: Any) -> Any:
        raise OSError(number, "no")

    monkeypatch.setattr(cameras, "list_cameras", lambda: TWO)
    monkeypatch.setattr(av, "open", refuse)
    monkeypatch.setattr("sys.platform", platform)
    with pytest.raises(ImageError) as caught:
        open_stream("@camera")
    assert str(caught.value).startswith(message)
    assert ("Privacy & Security > Camera" in str(caught.value)) == (platform == "darwin")


def test_a_camera_of_a_mac_is_opened_by_name_at_a_rate_that_it_has(
    two: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = av.open

    def choosy(address: str, **settings: Any) -> Any:
        if settings["container_options"]["framerate"] != "15":
            two.append((address, settings))
            raise OSError(errno.EIO, "no such rate")
        return real(address, **settings)

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(av, "open", choosy)
    with open_stream("@camera:1"):
        rates = [settings["container_options"]["framerate"] for _, settings in two]
    assert [address for address, _ in two] == ["Desk View:none"] * 3
    assert rates == ["30", "25", "15"]


def test_the_dark_beginning_of_a_camera_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_mlx.inputs.playing._WARM_UP", 60.0)
    pretend(monkeypatch, "color=black:s=32x16:r=30:d=0.3[a];color=gray:s=32x16:r=30[b];[a][b]concat,realtime")
    with open_stream("@camera") as stream:
        frame = next(iter(stream))
    assert frame.pixels.min() > 100
    assert frame.time > 0.15


def test_a_camera_that_stays_black_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_mlx.inputs.playing._WARM_UP", 0.1)
    pretend(monkeypatch, "color=black:s=32x16:r=30,realtime")
    notes: list[str] = []
    with open_stream("@camera", notify=notes.append) as stream:
        frames = iter(stream)
        assert [next(frames).pixels.max() for _ in range(3)] == [0, 0, 0]
    assert notes == ["@camera: shows only black; uncover it"]


def test_a_camera_that_is_unplugged_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "color=gray:s=32x16:r=30:d=0.2,realtime")
    with open_stream("@camera") as stream, pytest.raises(ImageError, match=r"no more frames; .* was unplugged$"):
        list(stream)


def test_a_camera_is_released_at_once_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "color=gray:s=32x16:r=10,realtime")
    stream, closed = open_stream("@camera"), Event()

    def close() -> None:
        stream.close()
        closed.set()

    count = late = 0
    for _ in stream:
        count += 1
        late += closed.is_set()
        if count == 2:
            Thread(target=close).start()
    assert count >= 2
    assert late <= 1
