"""XMP inside pictures: written into JPEG, PNG and WebP files without a change to any other byte of their content.

What cannot be kept whole is left alone: a file that ends early or goes on after its end, several pictures in one JPEG
file, whose offsets would move, and a signed picture. The new file takes the place of the old one at once, and only
after both were decoded to the same pixels.
"""

import hashlib
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fastvlm_mlx.errors import ConfigError, ImageError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.formats import DECODER_ERRORS, open_image, quiet
from fastvlm_mlx.inputs.sources import Encoded
from fastvlm_mlx.jobs.kinds import in_library
from fastvlm_mlx.jobs.sidecars import Outcome
from fastvlm_mlx.jobs.xmp import EMPTY_PACKET, read_xmp, with_description
from fastvlm_mlx.outputs import replace_content

_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_EXTENDED_XMP = b"http://ns.adobe.com/xmp/extension/\0"
_KEYWORD = b"XML:com.adobe.xmp\0"
_PNG = b"\x89PNG\r\n\x1a\n"
_AFTER_SCAN = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
"""The next marker after compressed data, in which 0xff is followed by 0 or is a restart marker."""
_LONGEST_SEGMENT = 0xFFFF - 2
_MOST_XMP = 16 << 20
_ALPHA, _HAS_XMP = 0x10, 0x04
"""Flags of WebP's VP8X chunk."""


class NotEmbeddedError(ConfigError):
    """A picture into which nothing can be written safely; the message is a clause about such pictures."""


class _Host(NamedTuple):
    """An encoded picture: the XMP in it, or nothing, and how to make it with other XMP."""

    xmp: bytes
    with_xmp: Callable[[bytes], bytes]


def embed(picture: str, text: str, *, generator: str, overwrite: bool = False) -> tuple[Outcome, str | None]:
    """Writes a description into a picture; returns what became of it, and the SHA-256 of the file if it has changed.

    The file keeps its times, rights and extended attributes.

    Args:
        picture: The picture's path.
        text: The description.
        generator: The program and the model that it is from.
        overwrite: Whether to replace somebody else's description, too.

    Raises:
        NotEmbeddedError: If that cannot be done safely; the file is as it was.
        ConfigError: If the file cannot be read or written; it is as it was.
    """
    try:
        status = os.lstat(picture)
        if os.path.islink(picture) or status.st_nlink > 1:
            raise NotEmbeddedError("that are links, or have several names")
        if in_library(picture):
            raise NotEmbeddedError("that are in a Photos library")
        if not status.st_mode & 0o222:
            raise NotEmbeddedError("that are read-only")
        data = Path(picture).read_bytes()
    except (OSError, ValueError) as err:
        reason = getattr(err, "strerror", None) or err
        raise ConfigError(f"{printable(picture)}: cannot be read ({reason})") from err
    host = _host(data)
    try:
        present = read_xmp(host.xmp or EMPTY_PACKET)
        if present.is_own and " ".join(present.description.split()) == " ".join(text.split()):
            return Outcome.UNCHANGED, None
        xmp = with_description(host.xmp or EMPTY_PACKET, text, generator=generator, overwrite=overwrite)
    except ConfigError as err:
        raise NotEmbeddedError("whose XMP cannot be read, or has its description in a rare form") from err
    if xmp is None:
        return Outcome.KEPT, None
    changed = host.with_xmp(xmp)
    if (
        _host(changed).xmp != xmp
        or _host(changed).with_xmp(b"") != host.with_xmp(b"")
        or _shown(changed) != _shown(data)
    ):
        raise NotEmbeddedError("that would not be the same with a description in them")
    replace_content(Path(picture), changed, status)
    return Outcome.WRITTEN, hashlib.sha256(changed).hexdigest()


def read_embedded(data: bytes) -> bytes:
    """Returns the XMP in an encoded picture; nothing if there is none.

    Raises:
        NotEmbeddedError: If that is no picture that `embed` writes into.
    """
    return _host(data).xmp


def _host(data: bytes) -> _Host:
    """An encoded picture as a place for XMP.

    Raises:
        NotEmbeddedError: If it is none.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data)
        if data.startswith(_PNG):
            return _png(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
    except (IndexError, struct.error, zlib.error) as err:
        raise NotEmbeddedError("that are damaged") from err
    raise NotEmbeddedError("that are neither JPEG nor PNG nor WebP")


def _shown(data: bytes) -> tuple[object, ...]:
    """What a decoder finds: the pixels, hashed, and what says how to show them."""
    try:
        with quiet, open_image(Encoded(data, "")) as image:
            image.load()
            kept = [
                image.info.get(name) for name in ("icc_profile", "exif", "transparency", "dpi", "gamma", "duration")
            ]
            frames = getattr(image, "n_frames", 1)
            pixels = hashlib.sha256(image.tobytes()).hexdigest()
            return image.format, image.mode, image.size, frames, pixels, *map(repr, kept)
    except (*DECODER_ERRORS, ImageError, MemoryError) as err:
        raise NotEmbeddedError("that are damaged") from err


def _one(found: list[bytes]) -> bytes:
    """The only XMP of a picture; nothing if there is none."""
    if len(found) > 1:
        raise NotEmbeddedError("that have XMP in several places")
    return found[0] if found else b""


def _jpeg(data: bytes) -> _Host:
    """JPEG: segments up to the first scan; the XMP is an APP1 segment behind JFIF and EXIF."""
    place, found, leading = (2, 2), [], True
    for marker, start, end, content in _segments(data):
        if marker == 0xE2 and content.startswith(b"MPF\0"):
            raise NotEmbeddedError("that hold several in one file (MPF)")
        if marker == 0xEB and content.startswith(b"JP"):
            raise NotEmbeddedError("that are signed (C2PA)")
        if marker == 0xE1 and content.startswith(_EXTENDED_XMP):
            raise NotEmbeddedError("whose XMP is spread over several segments")
        is_xmp = marker == 0xE1 and content.startswith(_XMP)
        if is_xmp:
            found.append(content[len(_XMP) :])
            place = start, end
        leading = leading and (marker == 0xE0 or (marker == 0xE1 and content.startswith(b"Exif\0\0")))
        if leading and not found:
            place = end, end

    def with_xmp(xmp: bytes) -> bytes:
        content = _XMP + xmp
        if len(content) > _LONGEST_SEGMENT:
            raise NotEmbeddedError("whose XMP would be too long for JPEG")
        segment = b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content if xmp else b""
        return data[: place[0]] + segment + data[place[1] :]

    return _Host(_one(found), with_xmp)


def _segments(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """The marker, start, end and content of each segment of a JPEG file that ends with its picture."""
    segments, place = [], 2
    while True:
        start = place
        if data[place] != 0xFF:
            raise NotEmbeddedError("that are damaged")
        while data[place] == 0xFF:
            place += 1
        marker = data[place]
        place += 1
        if marker == 0xD9:
            break
        (length,) = struct.unpack_from(">H", data, place)
        if marker <= 0x01 or 0xD0 <= marker <= 0xD8 or length < 2 or place + length > len(data):
            raise NotEmbeddedError("that are damaged")
        segments.append((marker, start, place + length, data[place + 2 : place + length]))
        place += length
        if marker == 0xDA:
            following = _AFTER_SCAN.search(data, place)
            if following is None:
                raise NotEmbeddedError("that are damaged")
            place = following.start()
    if data[place:].strip(b"\0\r\n "):
        raise NotEmbeddedError("that have other data behind them")
    return segments


def _png(data: bytes) -> _Host:
    """PNG: chunks with checksums; the XMP is an iTXt chunk."""
    place, start, found, names = (0, 0), len(_PNG), [], []
    while start < len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        body = data[start + 8 : end - 4]
        if end > len(data) or struct.unpack_from(">I", data, end - 4)[0] != zlib.crc32(name + body):
            raise NotEmbeddedError("that are damaged")
        names.append(name)
        if name == b"iTXt" and body.startswith(_KEYWORD):
            found.append(_text_of(body[len(_KEYWORD) :]))
            place = start, end
        elif name in (b"tEXt", b"zTXt", b"iTXt") and body.lower().startswith(b"raw profile type xmp\0"):
            raise NotEmbeddedError("that have XMP in ImageMagick's form")
        elif name == b"IHDR" and not found:
            place = end, end
        start = end
        if name == b"IEND":
            break
    if start != len(data):
        raise NotEmbeddedError("that have other data behind them")
    if names[:1] != [b"IHDR"] or names[-1:] != [b"IEND"] or names.count(b"IHDR") > 1:
        raise NotEmbeddedError("that are damaged")
    if {b"caBX", b"dSIG"} & set(names):
        raise NotEmbeddedError("that are signed (C2PA)")

    def with_xmp(xmp: bytes) -> bytes:
        body = b"iTXt" + _KEYWORD + b"\0\0\0\0" + xmp
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) if xmp else b""
        return data[: place[0]] + chunk + data[place[1] :]

    return _Host(_one(found), with_xmp)


def _text_of(body: bytes) -> bytes:
    """The text of an iTXt chunk, after its keyword."""
    _, _, text = body[2:].split(b"\0", 2)
    if body[0] == 0:
        return text
    inflate = zlib.decompressobj()
    text = inflate.decompress(text, _MOST_XMP)
    if not inflate.eof:
        raise NotEmbeddedError("that are damaged")
    return text


def _webp(data: bytes) -> _Host:
    """WebP: a RIFF file; the XMP is the last chunk, and VP8X says that there is one."""
    chunks, place = [], 12
    if struct.unpack_from("<I", data, 4)[0] + 8 != len(data):
        raise NotEmbeddedError("that are damaged, or have other data behind them")
    while place < len(data):
        name, length = struct.unpack_from("<4sI", data, place)
        end = place + 8 + length + length % 2
        if end > len(data):
            raise NotEmbeddedError("that are damaged")
        chunks.append((name, data[place:end], data[place + 8 : place + 8 + length]))
        place = end
    names = [name for name, _, _ in chunks]
    if b"C2PA" in names:
        raise NotEmbeddedError("that are signed (C2PA)")
    if not names or names[0] not in (b"VP8 ", b"VP8L", b"VP8X") or names.count(b"VP8X") > 1:
        raise NotEmbeddedError("that are damaged")
    header = bytearray(chunks[0][2] if names[0] == b"VP8X" else _extended(*chunks[0][::2]))
    if len(header) != 10:
        raise NotEmbeddedError("that are damaged")

    def with_xmp(xmp: bytes) -> bytes:
        header[0] = header[0] | _HAS_XMP if xmp else header[0] & ~_HAS_XMP
        parts = [_chunk(b"VP8X", bytes(header))]
        parts += [whole for name, whole, _ in chunks if name not in (b"VP8X", b"XMP ")]
        parts += [_chunk(b"XMP ", xmp)] if xmp else []
        content = b"WEBP" + b"".join(parts)
        return b"RIFF" + struct.pack("<I", len(content)) + content

    return _Host(_one([body for name, _, body in chunks if name == b"XMP "]), with_xmp)


def _chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _extended(name: bytes, body: bytes) -> bytes:
    """The VP8X header of a WebP file that has none: its size, and whether it is transparent."""
    if name == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        flags, width, height = (bits >> 28 & 1) * _ALPHA, bits & 0x3FFF, bits >> 14 & 0x3FFF
    elif name == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        width, height = (value & 0x3FFF for value in struct.unpack_from("<HH", body, 6))
        flags, width, height = 0, width - 1, height - 1
    else:
        raise NotEmbeddedError("that are damaged")
    if min(width, height) < 0:
        raise NotEmbeddedError("that are damaged")
    return bytes((flags, 0, 0, 0)) + width.to_bytes(3, "little") + height.to_bytes(3, "little")
