"""The screen, or on macOS a window: its pixels now, or as a live stream."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.formatting import names, printable
from fastvlm_mlx.inputs.frames import Frame, optional
from fastvlm_mlx.inputs.programs import ProgramError, output_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

SCREEN, WINDOW = "@screen", "@window"
MOST_SCREENS = 16
RATE = 10.0
"""The most pictures a second that are taken of a screen, unless more are requested."""

_CAPTURE = "/usr/sbin/screencapture"
# JavaScript for macOS's osascript: whether this terminal may record the screen, and what windows there are.
_MAY_RECORD = 'ObjC.import("CoreGraphics"); $.CGPreflightScreenCaptureAccess()'
_WINDOWS = (
    'ObjC.import("CoreGraphics"); ObjC.deepUnwrap(ObjC.castRefToObject($.CGWindowListCopyWindowInfo(17, 0)))'
    ".filter(w => !w.kCGWindowLayer).map(w => w.kCGWindowNumber + '\\t' + "
    "[w.kCGWindowOwnerName, w.kCGWindowName].filter(t => t).join(': ').replace(/\\s+/g, ' ')).join('\\n')"
)
_PERMISSION = (
    "macOS does not let this terminal record the screen; allow it in System Settings > Privacy & Security > "
    "Screen & System Audio Recording, then start the terminal anew"
)


class Shot(NamedTuple):
    """Which screen or window a name means.

    Attributes:
        name: In messages.
        screen: Its number from 1, where a screen is meant.
        title: A part of the window's title or its program's name, where a window is meant.
    """

    name: str
    screen: int = 1
    title: str = ""


def is_screen(name: str) -> bool:
    """Whether a name means a screen or a window."""
    return name.partition(":")[0] in (SCREEN, WINDOW)


def parse(name: str) -> Shot:
    """The screen or window that `@screen`, `@screen:2` or `@window:TITLE` means.

    Raises:
        ImageError: If the name is none of these.
    """
    kind, colon, rest = name.partition(":")
    if kind == WINDOW and rest.strip():
        return Shot(printable(name), title=rest.strip())
    if kind == SCREEN and not colon:
        return Shot(name)
    if kind == SCREEN and rest.isascii() and rest.isdigit() and 1 <= int(rest[:4]) <= MOST_SCREENS:
        return Shot(name, screen=int(rest))
    expected = "@window:TITLE, with a part of the title" if kind == WINDOW else "@screen, or @screen:2 for the second"
    raise ImageError(f"{printable(name)}: expected {expected}")


def grab(shot: Shot) -> NDArray[np.uint8]:
    """The pixels (H, W, 3) of a screen or window now, in RGB.

    Raises:
        ImageError: If they cannot be had; the message says what is missing.
    """
    if sys.platform == "darwin":
        return _with_screencapture(shot)
    if shot.title:
        raise ImageError(f"{shot.name}: windows can be named on macOS only; @screen shows the whole screen")
    if os.environ.get("WAYLAND_DISPLAY") and (grim := shutil.which("grim")):
        return _with_grim(shot, grim)
    return _with_mss(shot)


def _with_mss(shot: Shot) -> NDArray[np.uint8]:
    mss: Any = optional("mss", f"{shot.name}: the screen", "screen")
    try:
        with mss.MSS() as screens:
            found = screens.monitors[1:]
            if shot.screen > len(found):
                raise ImageError(f"{shot.name}: no such screen; there {_are(len(found))}")
            image = screens.grab(found[shot.screen - 1])
    except (mss.ScreenShotError, OSError) as err:
        hint = "; under Wayland, install grim" if os.environ.get("WAYLAND_DISPLAY") else ""
        raise ImageError(f"{shot.name}: the screen cannot be read ({printable(err)}){hint}") from err
    bgra = np.frombuffer(image.raw, np.uint8).reshape(image.height, image.width, 4)
    return np.ascontiguousarray(bgra[:, :, 2::-1])


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"


def _with_grim(shot: Shot, grim: str) -> NDArray[np.uint8]:
    if shot.screen > 1:
        raise ImageError(f"{shot.name}: under Wayland, @screen shows all screens; none has a number")
    try:
        return _decoded(output_of([grim, "-t", "ppm", "-"]), shot)
    except ProgramError as err:
        raise ImageError(f"{shot.name}: the screen cannot be read ({err})") from err


def _with_screencapture(shot: Shot) -> NDArray[np.uint8]:
    if _answer(_MAY_RECORD) == "false":  # without the permission, it would show the bare desktop
        raise ImageError(f"{shot.name}: {_PERMISSION}")
    which = ["-o", "-l", str(_window(shot))] if shot.title else ["-D", str(shot.screen)]
    with tempfile.TemporaryDirectory(prefix="fastvlm-") as folder:
        path = os.path.join(folder, "screen.png")
        try:
            output_of([_CAPTURE, "-x", "-t", "png", *which, path])
            with open(path, "rb") as file:
                data = file.read()
        except ProgramError as err:
            hint = f"; {_PERMISSION}" if "could not create image" in str(err) and shot.screen == 1 else ""
            raise ImageError(f"{shot.name}: cannot be captured ({err}){hint}") from err
        except OSError as err:  # it ended well, and wrote nothing
            raise ImageError(f"{shot.name}: no such screen or window, or {_PERMISSION}") from err
    return _decoded(data, shot)


def _answer(script: str) -> str:
    """What a script answers; empty if it fails."""
    try:
        return output_of(["/usr/bin/osascript", "-l", "JavaScript", "-e", script]).decode(errors="replace").strip()
    except ProgramError:
        return ""


def windows() -> list[tuple[int, str]]:
    """The number and the title, with its program's name, of each window of macOS, the frontmost first."""
    lines = (line.partition("\t") for line in _answer(_WINDOWS).split("\n"))
    return [(int(number), title) for number, _, title in lines if number.isdigit()]


def _window(shot: Shot) -> int:
    found = windows()
    wanted = shot.title.casefold()
    for number, title in found:
        if wanted in title.casefold():
            return number
    raise ImageError(f"{shot.name}: no window has this title; there are {names([title for _, title in found])}")


def _decoded(data: bytes, shot: Shot) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "PPM")) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as err:
        raise ImageError(f"{shot.name}: what was captured is no picture ({printable(err)})") from err


def screens() -> int:
    """How many screens there are, as far as is known."""
    if sys.platform == "darwin":
        return 1
    try:
        mss: Any = optional("mss", "", "screen")
        with mss.MSS() as found:
            return len(found.monitors) - 1
    except (ImageError, OSError):
        return 0
    except mss.ScreenShotError:
        return 0


class ScreenStream:
    """A live `Stream` of a screen or window; each frame is taken when it is asked for.

    Raises:
        ImageError: If it cannot be read.
    """

    def __init__(self, name: str, *, rate: float | None = None) -> None:
        self._shot = parse(name)
        self.name, self.live = self._shot.name, True
        self.duration: float | None = None
        self._pause = 1 / (rate or RATE)
        self._closed = Event()
        self._begin = time.monotonic()
        self._first: NDArray[np.uint8] | None = grab(self._shot)
        height, width, _ = self._first.shape
        self.size = (width, height)

    def __iter__(self) -> Iterator[Frame]:
        due = time.monotonic()
        while not self._closed.wait(max(0.0, due - time.monotonic())):
            at = time.monotonic()
            due = max(due + self._pause, at)
            pixels, self._first = self._first if self._first is not None else grab(self._shot), None
            self.size = (pixels.shape[1], pixels.shape[0])
            yield Frame(pixels, at - self._begin)

    def close(self) -> None:
        """Ends the stream, also from another thread."""
        self._closed.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
