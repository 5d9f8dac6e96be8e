import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.inputs import clipboard, screen
from fastvlm_mlx.inputs.video import open_stream
from tests import displays
from tests.displays import copy


@pytest.fixture(scope="module")
def display() -> Iterator[str]:
    if reason := displays.missing():
        pytest.skip(reason)
    pytest.importorskip("mss", reason="the extra screen is not installed")
    with displays.display() as name:
        yield name


@pytest.fixture
def at_display(display: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)


def program(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.usefixtures("at_display")
def test_the_screen_is_read_as_it_is() -> None:
    pixels = screen.grab(screen.parse("@screen"))
    assert pixels.shape == (240, 320, 3)
    assert pixels.dtype == np.uint8


@pytest.mark.usefixtures("at_display")
def test_the_screen_is_a_live_stream_that_ends_when_it_is_closed() -> None:
    with open_stream("@screen", rate=100) as stream:
        times = []
        for frame in stream:
            times.append(frame.time)
            if len(times) == 3:
                stream.close()
    assert (stream.live, stream.size, len(times)) == (True, (320, 240), 3)
    assert times == sorted(times)


@pytest.mark.usefixtures("at_display")
def test_a_second_screen_that_is_not_there_is_named() -> None:
    with pytest.raises(ImageError, match=r"^@screen:2: no such screen; there is 1$"):
        screen.grab(screen.parse("@screen:2"))


@pytest.mark.parametrize("name", ["@screen:0", "@screen:x", "@screen:", "@screen:99", "@window", "@window: "])
def test_a_name_that_is_no_screen_says_what_is_one(name: str) -> None:
    with pytest.raises(ImageError, match=rf"^{name}: expected @"):
        screen.parse(name)


def test_a_machine_without_a_display_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mss", reason="the extra screen is not installed")
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ImageError, match=r"^@screen: the screen cannot be read"):
        screen.grab(screen.parse("@screen"))
    with pytest.raises(ImageError, match=r"^@clipboard: there is no display"):
        clipboard.paste()


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of stand-ins for the programs of macOS."""
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(screen, "_CAPTURE", str(tmp_path / "screencapture"))
    real = screen.output_of

    def output_of(command: list[str], **settings: float) -> bytes:
        return real([str(tmp_path / Path(command[0]).name), *command[1:]], **settings)

    monkeypatch.setattr(screen, "output_of", output_of)
    monkeypatch.setattr(clipboard, "output_of", output_of)
    return tmp_path


def test_macos_captures_the_screen_with_its_own_program(mac: Path) -> None:
    Image.new("RGBA", (6, 4), (200, 10, 20, 255)).save(mac / "shot.png")
    program(mac, "osascript", "echo true")
    program(mac, "screencapture", f'echo "$@" > {mac}/arguments; for last; do :; done; cp {mac}/shot.png "$last"')
    pixels = screen.grab(screen.parse("@screen:2"))
    assert pixels.shape == (4, 6, 3)
    assert pixels[0, 0].tolist() == [200, 10, 20]
    assert (mac / "arguments").read_text().startswith("-x -t png -D 2 ")


def test_macos_without_permission_is_not_shown_the_bare_desktop(mac: Path) -> None:
    program(mac, "osascript", "echo false")
    program(mac, "screencapture", "touch captured")
    with pytest.raises(ImageError, match=r"System Settings > Privacy & Security > Screen & System Audio Recording"):
        screen.grab(screen.parse("@screen"))


def test_a_window_of_macos_is_found_by_a_part_of_its_title(mac: Path) -> None:
    Image.new("RGB", (3, 2)).save(mac / "shot.png")
    listing = "41\\tMail: Inbox\\n42\\tSafari: Weather — Paris\\n"
    program(mac, "osascript", f"case \"$*\" in *Window*) printf '{listing}';; *) echo true;; esac")
    program(mac, "screencapture", f'echo "$@" > {mac}/arguments; for last; do :; done; cp {mac}/shot.png "$last"')
    assert screen.grab(screen.parse("@window:paris")).shape == (2, 3, 3)
    assert "-l 42 " in (mac / "arguments").read_text()
    with pytest.raises(ImageError, match="no window has this title; there are Mail: Inbox, Safari: Weather — Paris"):
        screen.grab(screen.parse("@window:Dock"))


def test_a_capture_that_fails_says_why(mac: Path) -> None:
    program(mac, "osascript", "exit 1")  # an older system does not know the question
    program(mac, "screencapture", "echo 'could not create image from display' >&2; exit 1")
    with pytest.raises(ImageError, match="screencapture: could not create image from display\\); macOS does not let"):
        screen.grab(screen.parse("@screen"))


def test_the_clipboard_of_macos_gives_a_picture_or_the_path_of_a_file(mac: Path) -> None:
    program(mac, "osascript", "case \"$2\" in *info*) echo '«class PNGf», 12';; *) echo '«data PNGf89504E47»';; esac")
    assert clipboard.paste() == b"\x89PNG"
    program(mac, "osascript", "case \"$2\" in *info*) echo '«class furl», 12';; *) echo '/a b/c.jpg';; esac")
    assert clipboard.paste() == "/a b/c.jpg"
    program(mac, "osascript", "echo 'string, 12'")
    with pytest.raises(ImageError, match=r"^@clipboard: holds no picture; copy one, or a file, first$"):
        clipboard.paste()


def test_a_program_that_hangs_is_ended(tmp_path: Path) -> None:
    from fastvlm_mlx.inputs.programs import ProgramError, output_of

    with pytest.raises(ProgramError, match=r"^slow does not answer within 0.1 s$"):
        output_of([str(program(tmp_path, "slow", "exec sleep 5"))], seconds=0.1)


@pytest.mark.usefixtures("at_display")
def test_the_clipboard_gives_the_picture_in_it() -> None:
    copy("image/png", b"\x89PNG picture")
    assert clipboard.paste() == b"\x89PNG picture"


@pytest.mark.usefixtures("at_display")
def test_the_clipboard_gives_the_path_of_a_copied_file(tmp_path: Path) -> None:
    copy("text/uri-list", b"file:///tmp/a%20b/c%C3%A9.jpg\r\n")
    assert clipboard.paste() == "/tmp/a b/cé.jpg"
    copy("x-special/gnome-copied-files", b"copy\nfile:///tmp/d.jpg")
    assert clipboard.paste() == "/tmp/d.jpg"
    (tmp_path / "e.jpg").touch()
    copy("UTF8_STRING", str(tmp_path / "e.jpg").encode())
    assert clipboard.paste() == str(tmp_path / "e.jpg")


@pytest.mark.usefixtures("at_display")
def test_a_clipboard_without_a_picture_says_so() -> None:
    copy("UTF8_STRING", b"only words")
    with pytest.raises(ImageError, match=r"^@clipboard: holds no picture; copy one, or a file, first$"):
        clipboard.paste()
    copy("text/uri-list", b"file:///a.jpg\nfile:///b.jpg")
    with pytest.raises(ImageError, match=r"^@clipboard: holds 2 files; copy one$"):
        clipboard.paste()
