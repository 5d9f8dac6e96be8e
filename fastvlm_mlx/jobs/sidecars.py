"""Texts beside pictures: `photo.txt`, as trainers read it, and XMP, as programs for photographs do.

The picture is never touched, and neither is the text of a person. Nothing is written into a library of Apple's Photos.
"""

import errno
import os
from collections import Counter
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Literal

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.jobs.kinds import in_library
from fastvlm_mlx.jobs.xmp import XMP, read_xmp, with_description
from fastvlm_mlx.outputs import write_output

Habit = Literal["ext", "plain"]
"""How XMP sidecars are called: `photo.jpg.xmp` (darktable, digiKam, immich) or `photo.xmp` (Lightroom)."""


class Outcome(str, Enum):
    """What became of a text that was to be written beside a picture."""

    WRITTEN = "written"
    UNCHANGED = "unchanged"
    """It was there already."""
    KEPT = "kept"
    """Somebody else's text is there, and stays."""


def text_path(picture: str) -> Path:
    """Returns where a picture's text is: `photo.txt` for `photo.jpg`."""
    return Path(os.path.splitext(picture)[0] + ".txt")


def xmp_path(picture: str, habit: Habit | None = None) -> Path:
    """Returns where a picture's XMP sidecar is or would be.

    Args:
        picture: The picture's path.
        habit: Without one, the sidecar that exists counts, else `photo.jpg.xmp`. Pictures with `shared_names` need
            `ext`.
    """
    full, plain = Path(f"{picture}.xmp"), Path(os.path.splitext(picture)[0] + ".xmp")
    if habit is None:
        habit = "plain" if os.path.exists(plain) and not os.path.exists(full) else "ext"
    return plain if habit == "plain" else full


def shared_names(pictures: Iterable[str]) -> set[str]:
    """Returns the pictures that differ from another one only in their extension, and so would share its `photo.txt`."""
    pictures = list(pictures)
    counts = Counter(os.path.splitext(picture)[0] for picture in pictures)
    return {picture for picture in pictures if counts[os.path.splitext(picture)[0]] > 1}


def write_text(picture: str, text: str, *, own: Iterable[str] = (), overwrite: bool = False) -> Outcome:
    """Writes a caption into `photo.txt`, on one line, since trainers take each line for a caption of its own.

    Args:
        picture: The picture's path.
        text: The caption.
        own: Earlier captions of ours for this picture, which may be replaced.
        overwrite: Whether to replace somebody else's text, too.

    Raises:
        ConfigError: If it cannot be written.
    """
    _check(picture)
    path, text = text_path(picture), " ".join(text.split())
    if not overwrite:
        found = " ".join(_read(path).decode(errors="replace").split())
        if found == text:
            return Outcome.UNCHANGED
        if found and found not in {" ".join(earlier.split()) for earlier in own}:
            return Outcome.KEPT
    write_output(path, f"{text}\n".encode("utf-8", "replace"))
    return Outcome.WRITTEN


def write_xmp(
    picture: str, text: str, *, generator: str, habit: Habit | None = None, overwrite: bool = False
) -> Outcome:
    """Writes a description into the XMP sidecar of a picture; everything else in it stays as it is.

    Args:
        picture: The picture's path.
        text: The description.
        generator: The program and the model that it is from.
        habit: See `xmp_path`.
        overwrite: Whether to replace somebody else's description, too.

    Raises:
        ConfigError: If the sidecar is not XMP, or cannot be written.
    """
    _check(picture)
    path = xmp_path(picture, habit)
    before = _read(path)
    try:
        after = with_description(before, text, generator=generator, overwrite=overwrite)
    except ConfigError as err:
        raise ConfigError(f"{printable(path)}: {err}; it is left as it is") from err
    if after is None:
        return Outcome.KEPT
    if after == before:
        return Outcome.UNCHANGED
    write_output(path, after)
    return Outcome.WRITTEN


def read_sidecars(picture: str) -> XMP:
    """Returns what is said beside a picture: in its XMP sidecar or, without a description there, in `photo.txt`.

    Raises:
        ConfigError: If a sidecar cannot be read.
    """
    path = xmp_path(picture)
    try:
        xmp = read_xmp(data) if (data := _read(path)).strip() else XMP()
    except ConfigError as err:
        raise ConfigError(f"{printable(path)}: {err}") from err
    if xmp.description:
        return xmp
    return XMP(_read(text_path(picture)).decode(errors="replace").strip(), False, xmp.tags)


def _check(picture: str) -> None:
    if in_library(picture):
        raise ConfigError(f"{printable(picture)}: is in a Photos library, into which nothing is written")


def _read(path: Path) -> bytes:
    """The content of a file; nothing if it does not exist, or cannot, since its name is too long."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as err:
        if err.errno == errno.ENAMETOOLONG:
            return b""
        raise ConfigError(f"{printable(path)}: cannot be read ({err.strerror or err})") from err
