"""The clipboard: the picture in it, or the path of the file that was copied."""

from __future__ import annotations

import os
import shutil
import sys
from urllib.parse import unquote, urlsplit

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.programs import ProgramError, output_of

CLIPBOARD = "@clipboard"

_EMPTY = f"{CLIPBOARD}: holds no picture; copy one, or a file, first"
# What programs offer, the best first.
_TYPES = ("image/png", "image/jpeg", "image/webp", "image/tiff", "image/bmp", "image/gif", "image/avif", "image/heic")
_FILES = ("x-special/gnome-copied-files", "text/uri-list")
_TEXTS = ("text/plain;charset=utf-8", "UTF8_STRING", "text/plain", "STRING")
# What macOS calls a copied file and pictures, in AppleScript.
_APPLE_FILE = "«class furl»"
_APPLE_PICTURES = ("«class PNGf»", "«class TIFF»", "JPEG picture", "GIF picture")


def paste() -> bytes | str:
    """The encoded picture in the clipboard, or the path of the file that was copied.

    Raises:
        ImageError: If it holds neither, or cannot be read.
    """
    try:
        return _from_macos() if sys.platform == "darwin" else _from_linux()
    except ProgramError as err:
        raise ImageError(f"{CLIPBOARD}: cannot be read ({err})") from err


def _from_macos() -> bytes | str:
    offered = _script("clipboard info")
    if _APPLE_FILE in offered:
        return _script(f"POSIX path of (the clipboard as {_APPLE_FILE})").rstrip("\n")
    for kind in _APPLE_PICTURES:
        if kind in offered:
            # «data PNGf89504E47…»
            answer = _script(f"the clipboard as {kind}").strip()
            try:
                return bytes.fromhex(answer.removeprefix("«data ")[4:].removesuffix("»"))
            except ValueError as err:
                raise ImageError(f"{CLIPBOARD}: what it holds cannot be read; copy it again") from err
    raise ImageError(_EMPTY)


def _script(text: str) -> str:
    return output_of(["/usr/bin/osascript", "-e", text]).decode(errors="replace")


def _from_linux() -> bytes | str:
    listing, reading = _commands()
    try:
        offered = output_of(listing).decode(errors="replace").split("\n")
    except ProgramError as err:
        text = str(err)
        if any(sign in text for sign in ("TARGETS not available", "Nothing is copied", "No selection")):
            raise ImageError(_EMPTY) from err  # nobody has copied anything
        raise
    offered = [each.strip() for each in offered]
    for kind in _FILES:
        if kind in offered and (path := _path(output_of([*reading, kind]))):
            return path
    others = [each for each in offered if each.startswith("image/") and each != "image/svg+xml"]
    for kind in [*_TYPES, *others]:
        if kind in offered:
            return output_of([*reading, kind])
    for kind in _TEXTS:
        if kind in offered and (path := _path(output_of([*reading, kind]))):
            return path
    raise ImageError(_EMPTY)


def _commands() -> tuple[list[str], list[str]]:
    """The commands that list what the clipboard offers, and that read it as the type that follows.

    Raises:
        ImageError: If there is no program for them, or no display.
    """
    if os.environ.get("WAYLAND_DISPLAY"):
        if program := shutil.which("wl-paste"):
            return [program, "--list-types"], [program, "--no-newline", "--type"]
        raise ImageError(f"{CLIPBOARD}: needs the program wl-paste; install wl-clipboard")
    if not os.environ.get("DISPLAY"):
        raise ImageError(f"{CLIPBOARD}: there is no display, so there is no clipboard")
    if program := shutil.which("xclip"):
        read = [program, "-selection", "clipboard", "-out", "-target"]
        return [*read, "TARGETS"], read
    raise ImageError(f"{CLIPBOARD}: needs the program xclip; install it")


def _path(data: bytes) -> str | None:
    """The file that was copied, by its URL or path; None if it is something else, or several."""
    lines = [line.strip() for line in data.decode(errors="surrogateescape").split("\n")]
    lines = [line for line in lines if line and not line.startswith("#") and line not in ("copy", "cut")]
    if len(lines) > 1 and all(line.startswith("file:") for line in lines):
        raise ImageError(f"{CLIPBOARD}: holds {len(lines)} files; copy one")
    if len(lines) != 1:
        return None
    if lines[0].startswith("file:"):
        try:
            return unquote(urlsplit(lines[0]).path, errors="surrogateescape")
        except ValueError as err:
            raise ImageError(f"{CLIPBOARD}: {printable(lines[0])} is no file") from err
    return lines[0] if os.path.isabs(lines[0]) and os.path.isfile(lines[0]) else None
