"""Names on a command line that stand for more than one picture file: what is meant, found out at little cost.

Devices (`@screen`, `@clipboard`, `@camera`, `@test`, `lavfi:GRAPH`, rtsp URLs) are known by their names; films, PDFs
and animations by how they begin. What follows a # is read by `fragments`. Every command that takes a picture comes
through here, so this module imports next to nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

HEAD_BYTES = 2048
"""Bytes at the beginning of a file that tell its kind."""
PDF, FILM, ANIMATION = "PDF", "film", "animation"

_LIVE = ("@screen", "@window", "@camera", "@clipboard", "@test")
_LIVE_SCHEMES = ("lavfi:", "rtsp://", "rtsps://")
_WEB = ("http://", "https://")
_DATA = ("data:application/pdf", "data:video/")
_MOVING_DATA = ("data:image/gif", "data:image/webp", "data:image/png", "data:image/apng")
# Ends of the paths of web addresses whose content is fetched to see whether it holds several pictures.
_EXTENSIONS = (".pdf", ".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".mpg", ".ts", ".gif", ".webp", ".apng")
# What begins a file of the format that FFmpeg calls mov, but is a picture.
_STILL = b"avif avis heic heix heim heis hevc hevx hevm hevs mif1 mif2 msf1 crx jp2 jpx jpm".split()
_FILM_MARKS = (
    *(b"\x1aE\xdf\xa3", b"FLV\x01", b"OggS", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3", b".RMF", b"\x06\x0e\x2b\x34"),
    *(b"0&\xb2u\x8ef\xcf\x11", b"nut/multimedia container", b"YUV4MPEG2", b"DKIF"),
)


def is_web(name: str) -> bool:
    """Whether a name is an http(s) URL."""
    return name[:8].lower().startswith(_WEB)


def is_live(name: str) -> bool:
    """Whether a name means what a device shows now, not a file; a file of that name comes first."""
    live = name.partition(":")[0] in _LIVE if name.startswith("@") else name.lower().startswith(_LIVE_SCHEMES)
    return live and not os.path.lexists(name)


def meant(name: str, devices: Sequence[str] = _LIVE) -> str:
    """Which device a name may mean: `@camera` for `@camrea`; empty if it is like none, or is a file."""
    if not name.startswith("@") or os.path.lexists(name):
        return ""
    from difflib import get_close_matches

    device, colon, which = name.partition(":")
    near = get_close_matches(device.lower(), devices, 1)
    return f"{near[0]}{colon}{which}" if near else ""


def kind_of(head: bytes) -> str:
    """What a file holds that begins with these bytes: a PDF, a film, a possible animation; empty for all else."""
    if b"%PDF-" in head[:1024]:
        return PDF
    if head[4:8] == b"ftyp":
        return "" if head[8:12].rstrip() in _STILL else FILM
    if head[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot") or head.startswith(_FILM_MARKS):
        return FILM
    if head[:4] == b"RIFF":
        moves = head[8:16] == b"WEBPVP8X" and len(head) > 20 and head[20] & 2
        return FILM if head[8:11] == b"AVI" else ANIMATION if moves else ""
    if head[:6] in (b"GIF87a", b"GIF89a") or (head.startswith(b"\x89PNG") and b"acTL" in head):
        return ANIMATION
    is_stream = len(head) > 564 and all(head[at] == 0x47 for at in (0, 188, 376, 564))  # packets of an MPEG stream
    return FILM if is_stream else ""


def kind_of_file(path: str) -> str:
    """What an ordinary file holds, as by `kind_of`; empty if it cannot be read, which reading it will say."""
    try:
        if path.startswith("~") and not os.path.lexists(path):
            path = os.path.expanduser(path)
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            # Of a pipe, nothing may be read: its bytes come once.
            return kind_of(file.read(HEAD_BYTES)) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else ""
    except (OSError, ValueError):
        return ""


def is_plain(source: object, *, animations: bool = False) -> bool:
    """Whether a source is one picture, as far as its first bytes show; a web address goes by its path.

    Args:
        source: A name, or encoded bytes.
        animations: Whether an animation counts as several pictures.
    """
    several = (PDF, FILM, ANIMATION) if animations else (PDF, FILM)
    if isinstance(source, (bytes, bytearray)):
        return kind_of(bytes(source[:HEAD_BYTES])) not in several
    if not isinstance(source, str):
        return True
    if source[:5].lower() == "data:":
        return not source[:40].lower().startswith(_DATA + _MOVING_DATA if animations else _DATA)
    if is_live(source):
        return False
    base, has_fragment = source, False
    if "#" in source:
        from fastvlm_mlx.inputs.fragments import split_name

        base, fragment = split_name(source)
        has_fragment = fragment is not None
    if is_web(source):
        return not has_fragment and not _web_path(base).endswith(_EXTENSIONS if animations else _EXTENSIONS[:-3])
    return not has_fragment and kind_of_file(base) not in several


def _web_path(url: str) -> str:
    from urllib.parse import unquote, urlsplit

    try:
        return unquote(urlsplit(url).path).lower()
    except ValueError:
        return ""
