"""Formats of image files: encoded bytes -> a Pillow image that has yet to be decoded, or the reason why not."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import struct
import warnings
import zlib
from threading import Lock
from typing import TYPE_CHECKING

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.sources import Encoded

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 178_956_970
"""Images with more pixels are refused; a 16-bit RGB file of that size decodes to 1 GiB."""

# Pillow's own formats to try, those that need no plugin search first. EPS is not among them: Pillow starts Ghostscript
# for it.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "ICO", "JPEG2000", "QOI", "AVIF")
_UNMARKED = "TGA"  # it has no mark of its own, so all others come first
_KNOWN = ", ".join((*_FORMATS, _UNMARKED, "HEIF"))
DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, RuntimeError),
    *(AssertionError, AttributeError, struct.error, zlib.error),
)
"""What Pillow's plugins and decoders raise on damaged data, each its own."""

_PNG = b"\x89PNG\r\n\x1a\n"
# The texts of a PNG that may say which side is up.
_ORIENTATION_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif")
_MAX_TEXT_BYTES = 1 << 20
# Bits and colour type, grey or RGB, of the PNGs whose samples Pillow gives in 8 bits.
_OPAQUE_DEPTHS = (b"\x01\0", b"\x02\0", b"\x04\0", b"\x08\0", b"\x08\2", b"\x10\2")

_HEADER_BYTES = 4096

_RAW = "it is a camera raw file; export it as JPEG"
_VIDEO = "it is a video; save a frame of it as PNG"
# How files begin that people take for images, from byte 0 or 4 on, and what they are.
_OTHER_FILES = {
    b"\x00\x05\x16\x07": "it holds what macOS notes beside a file (AppleDouble); name the file without ._ before it",
    b"\xff\x0a": "JPEG XL cannot be read; save it as JPEG",
    b"JXL ": "JPEG XL cannot be read; save it as JPEG",
    b"%PDF": "it is a PDF; save the page as PNG",
    b"%!PS": "it is PostScript; save it as PNG",
    b"<svg": "it is an SVG drawing; save it as PNG",
    b"<?xm": "it is XML, perhaps an SVG drawing; save that as PNG",
    b"v/1\x01": "it is OpenEXR, whose samples have no fixed range; save it as PNG",
    b"#?RA": "it is Radiance HDR, whose samples have no fixed range; save it as PNG",
    b"PK\x03\x04": "it is a .zip archive; unpack it",
    b"vers": "it may be a pointer of Git LFS; 'git lfs pull' fetches the image",
    b"FUJI": _RAW,
    b"IIRO": _RAW,
    b"IIRS": _RAW,
    b"IIU\x00": _RAW,
    b"ftypcrx ": _RAW,
    b"ftypisom": _VIDEO,
    b"ftypmp4": _VIDEO,
    b"ftypqt ": _VIDEO,
    b"ftypM4V": _VIDEO,
    b"\x1aE\xdf\xa3": _VIDEO,
}


class _Quiet:
    """Ignores warnings while any thread is inside, and keeps decoders from writing to stderr from then on.

    `warnings.catch_warnings` alone is for one thread: where two overlap, the second restores what the first had set.
    """

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0

    def __enter__(self) -> None:
        _silence_decoders()
        with self._lock:
            if not self._inside:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._caught.__exit__(None, None, None)


@functools.cache
def _silence_decoders() -> None:
    """Keeps libtiff, and Pillow where logging is not set up, from writing lines of their own."""
    from PIL import _imaging

    logging.getLogger("PIL").addHandler(logging.NullHandler())  # without one, Python writes errors to stderr
    with contextlib.suppress(OSError, AttributeError):  # a Pillow that hides its libtiff
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


quiet = _Quiet()
"""Pillow warns of sizes below the limit, harmless metadata and palettes; entered around everything that it does."""


def open_image(encoded: Encoded) -> Image:
    """Identifies an image; its samples are read by `load`.

    Formats that other packages have registered with Pillow work, too. HEIF containers (.heic) go to pi-heif, which
    shows the primary image.

    Raises:
        ImageError: If it is none, is damaged, or has too many pixels.
    """
    from PIL import Image, UnidentifiedImageError

    data, name, media_type = encoded
    if not data:
        raise ImageError(f"{name}: is empty (0 bytes)")
    if data.startswith(_PNG):
        data = _plain_png(data)
    try:
        with quiet:
            return Image.open(io.BytesIO(data), formats=(*_FORMATS, *_registered(), _UNMARKED))
    except Image.DecompressionBombError as err:
        raise ImageError(f"{name}: has more than {MAX_PIXELS:,} pixels, the most that is read; reduce it") from err
    except UnidentifiedImageError as err:
        what = _other_file(data)
        if not what and data[4:8] == b"ftyp":
            return _open_heif(data, name)
        if not what and media_type.startswith("text/"):
            raise ImageError(
                f"{name}: is a {media_type} page, not an image; use the address of the image itself"
            ) from err
        what = what or _complaint(data) or "it is damaged or something else"
        raise ImageError(f"{name}: not an image in a known format ({_KNOWN}); {what}") from err
    except DECODER_ERRORS as err:
        raise ImageError(
            f"{name}: damaged, incomplete or of an unknown kind ({printable(err)}); export it again"
        ) from err


def _registered() -> list[str]:
    """The formats of plugins that do not come with Pillow."""
    from PIL import Image

    plugins = ((name, getattr(factory, "__module__", "")) for name, (factory, _) in Image.OPEN.items())
    return [name for name, module in plugins if not module.startswith("PIL.")]


def _open_heif(data: bytes, name: str) -> Image:
    try:
        from pi_heif import HeifImageFile
    except ImportError as err:
        raise ImageError(f"{name}: HEIC needs the package pi-heif ({printable(err)}); pip install pi-heif") from err
    try:
        image: Image = HeifImageFile(io.BytesIO(data))
    except DECODER_ERRORS as err:
        if b"moov" in data[:_HEADER_BYTES]:
            raise ImageError(f"{name}: a HEIF sequence without a still image; save a frame of it as PNG") from err
        raise ImageError(f"{name}: damaged or of an unknown kind of HEIF ({printable(err)}); save it as JPEG") from err
    return image


def _other_file(data: bytes) -> str:
    """What a file is whose beginning is known; empty if it is not."""
    starts = (data[:8], data[4:12])
    return next((what for mark, what in _OTHER_FILES.items() if any(start.startswith(mark) for start in starts)), "")


def _complaint(data: bytes) -> str:
    """Pillow's own reason against a file that begins like one of its formats; empty if it does not."""
    from PIL import Image

    for name in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "JPEG2000", "QOI", "AVIF"):
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory and accept and accept(data[:16]) is True:
            try:
                with quiet:
                    factory(io.BytesIO(data), "")
            except DECODER_ERRORS as err:
                return f"it begins like {name} but is damaged or of an unknown kind ({printable(err)}); export it again"
    return ""


def _plain_png(data: bytes) -> bytes:
    """A PNG without texts and colour profile, which Pillow refuses if they are long.

    Texts that may hold the orientation are kept, at most `_MAX_TEXT_BYTES` of each. The transparent colour, which a PNG
    gives at the depth of its samples, is given in 8 bits, as Pillow gives samples.
    """
    parts: list[bytes | memoryview] = []
    view, start, at = memoryview(data), 0, len(_PNG)
    while at + 12 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            break
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            parts += [view[start:at], _orientation_text(kind, data[at + 8 : end - 4])]
            start = end
        elif kind == b"tRNS" and data[24:26] in _OPAQUE_DEPTHS:
            parts += [view[start:at], _chunk(kind, _in_8_bits(data[at + 8 : end - 4], data[24]))]
            start = end
        at = end
    return b"".join((*parts, view[start:])) if parts else data


def _orientation_text(kind: bytes, body: bytes) -> bytes:
    """The chunk of an uncompressed text of at most `_MAX_TEXT_BYTES`, or nothing if it is of no use here."""
    keyword, _, text = body.partition(b"\0")
    if keyword not in _ORIENTATION_TEXTS:
        return b""
    packed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    if kind == b"zTXt":
        text = text[1:]  # the method of compression
    elif kind == b"iTXt":
        text = text[2:].split(b"\0", 2)[-1]  # after the language and the translated keyword
    try:
        text = zlib.decompressobj().decompress(text, _MAX_TEXT_BYTES) if packed else text[:_MAX_TEXT_BYTES]
    except zlib.error:
        return b""
    if keyword == b"XML:com.adobe.xmp":
        return _chunk(b"iTXt", keyword + bytes(5) + text)
    return _chunk(b"tEXt", keyword + b"\0" + text)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _in_8_bits(samples: bytes, bits: int) -> bytes:
    """16-bit fields that hold samples of `bits` bits -> the same fields with 8-bit samples."""
    top = (1 << bits) - 1
    values = [int.from_bytes(samples[at : at + 2], "big") for at in range(0, len(samples), 2)]
    levels = [value >> 8 if bits == 16 else (value & top) * 255 // top for value in values]
    return struct.pack(f">{len(levels)}H", *levels)
