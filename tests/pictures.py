"""Pictures for the tests, as cameras and other programs store them."""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def stored_with(orientation: int, upright: Image.Image, kind: str = "PNG") -> bytes:
    """A file whose EXIF orientation turns what it holds into `upright`."""
    stored = upright.transpose(_UNDO[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, kind, exif=exif, quality=95)
    return buffer.getvalue()


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    samples: np.ndarray, *, bits: int, colour: int, extra: Sequence[bytes] = (), after: Sequence[bytes] = ()
) -> bytes:
    """A PNG of rows of samples (H, W, C), with chunks before and after the samples."""
    height, width, channels = samples.shape
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    rows = b"".join(b"\0" + packed(row.reshape(1, -1), bits) for row in samples.reshape(height, width * channels))
    body = (head, *extra, png_chunk(b"IDAT", zlib.compress(rows)), *after, png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def packed(samples: np.ndarray, bits: int) -> bytes:
    """Rows of samples of `bits` bits, most significant first; each row begins with a new byte."""
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits((samples[..., None].astype(np.int64) >> shifts & 1).reshape(len(samples), -1), axis=1).tobytes()


def tiff(strips: Sequence[bytes], tags: dict[int, int | tuple[int, ...]], *, order: str = "<") -> bytes:
    """A TIFF of these strips; tags are written as 16-bit integers, DNG's version as bytes."""
    body, offsets = b"", []
    for strip in strips:
        offsets.append(8 + len(body))
        body += strip + bytes(len(strip) % 2)
    tags = {258: 8, 277: 1, **tags, 273: tuple(offsets), 279: tuple(map(len, strips))}
    entries = b""
    for tag, value in sorted(tags.items()):
        values = value if isinstance(value, tuple) else (value,)
        data = struct.pack(f"{order}{len(values)}{'B' if tag == 50706 else 'H'}", *values)
        if len(data) > 4:
            body, data = body + data, struct.pack(f"{order}I", 8 + len(body))
        entries += struct.pack(f"{order}HHI", tag, 1 if tag == 50706 else 3, len(values)) + data.ljust(4, b"\0")
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(body)) + body + directory
