"""Pictures: any source -> RGB -> square of R×R pixels, exactly as Apple's preprocessing makes it."""

from __future__ import annotations

import base64
import binascii
import io
import os
import struct
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias, Union

import numpy as np

from fastvlm_mlx.errors import ConfigError, ImageError
from fastvlm_mlx.machine import cpu_threads

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

ImageSource: TypeAlias = Union[
    str, "os.PathLike[str]", bytes, bytearray, memoryview, "IO[bytes]", "Image", "NDArray[Any]"
]
"""A path, an http(s) or `data:` URL, encoded bytes, an open binary file, a PIL image or an array.

Arrays are uint8 or floats in [0, 1] of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
"""

MAX_PIXELS = 178_956_970
"""Pictures with more pixels are refused; a 16-bit RGB file of that size decodes to 1 GiB."""
MAX_SIDE = 65_535
MAX_FILE_BYTES = 1 << 30
MAX_DOWNLOAD_BYTES = 64 << 20
DOWNLOAD_TIMEOUT = 20.0
"""Seconds within which a URL has to be fetched completely."""

MIN_AUTO_RESOLUTION = 256
MAX_RESOLUTION = 4096
"""The largest resolution in pixels: 4096 visual tokens, half of the context."""
_RESOLUTION_STEP = 64

# The formats that are tried, those that need no plugin search first. EPS is left out: Pillow starts Ghostscript for it.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "ICO", "TGA", "JPEG2000", "QOI", "AVIF")
# What Pillow's decoders raise on damaged data, each its own.
_DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, RuntimeError),
    struct.error,
)
_HEIC = (b"ftypheic", b"ftypheix", b"ftypmif1")
_BAND_PIXELS = 1 << 24


def load_image(source: ImageSource, *, timeout: float = DOWNLOAD_TIMEOUT, copy: bool = True) -> Image:
    """The picture in RGB, upright (EXIF orientation applied); alpha is dropped, as Apple does.

    Of an animation it is the first frame; 16-bit samples keep their high byte. Loading the result once more
    changes nothing.

    Args:
        source: See `ImageSource`. A URL is fetched.
        timeout: Seconds for fetching a URL.
        copy: Whether to copy a PIL image that is RGB and upright already. Without, it is returned itself.

    Raises:
        ImageError: If the source cannot be read or is not a picture.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        picture = _to_rgb(source, getattr(source, "filename", "") or "PIL image")
        return picture.copy() if copy and picture is source else picture
    if isinstance(source, np.ndarray):
        return Image.fromarray(_array_to_rgb(source))
    data, name = _read(source, timeout)
    return _decode(data, name)


def preprocess(image: Image, resolution: int) -> NDArray[np.uint8]:
    """The picture centred on a black square and resized to (R, R, 3), bicubic with antialiasing.

    Bit-equal to padding first and resizing then (`expand2square` and CLIPImageProcessor in apple/ml-fastvlm). Pillow
    filters rows first, columns second and rounds to 8 bits in between. Doing the two passes one by one, the first in
    bands of rows and the second in bands of columns, lets threads share them, and avoids the padded square, which takes
    1.6 GB for a picture of 20000×10.
    """
    from PIL import Image

    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    narrow = Image.new("RGB", (resolution, side))
    pixels = np.empty((resolution, resolution, 3), dtype=np.uint8)

    def filter_rows(start: int, end: int) -> None:
        band = image.crop((-left, start, side - left, end))  # black where the picture is not
        narrow.paste(band.resize((resolution, end - start), Image.Resampling.BICUBIC), (0, top + start))

    def filter_columns(start: int, end: int) -> None:
        band = narrow.crop((start, 0, end, side))
        pixels[:, start:end] = np.asarray(band.resize((end - start, resolution), Image.Resampling.BICUBIC))

    with ThreadPoolExecutor(cpu_threads()) as threads:
        for run, length in ((filter_rows, height), (filter_columns, resolution)):
            for done in [threads.submit(run, *band) for band in _bands(length, side)]:
                done.result()
    return pixels


def _bands(length: int, side: int) -> list[tuple[int, int]]:
    """Where to cut `length` rows (or columns) of `side` pixels: a band for each thread, more where those are large."""
    most = max(1, min(-(-length // cpu_threads()), _BAND_PIXELS // side))
    return [(start, min(start + most, length)) for start in range(0, length, most)]


def pixel_values_float(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The pixels in [0, 1]: Apple's `pixel_values` to the bit, with the channels last."""
    return pixels.astype(np.float32) / np.float32(255)


def check_resolution(resolution: int) -> int:
    """The resolution itself.

    Raises:
        ConfigError: If the tower cannot run at it.
    """
    if isinstance(resolution, bool) or not isinstance(resolution, int):
        raise ConfigError(f"resolution must be a whole number of pixels or 'auto', not {resolution!r}")
    if resolution % _RESOLUTION_STEP or not 0 < resolution <= MAX_RESOLUTION:
        below = min(max(resolution // _RESOLUTION_STEP, 1) * _RESOLUTION_STEP, MAX_RESOLUTION)
        raise ConfigError(
            f"resolution must be a multiple of {_RESOLUTION_STEP} from {_RESOLUTION_STEP} to {MAX_RESOLUTION}, "
            f"not {resolution}; try {below}"
        )
    return resolution


def auto_resolution(size: tuple[int, int], native: int) -> int:
    """The smallest resolution that shows a picture of `size` (W, H) without reducing it, from 256 up to `native`."""
    steps = -(-max(size) // _RESOLUTION_STEP)
    return min(max(steps * _RESOLUTION_STEP, MIN_AUTO_RESOLUTION), native)


def choose_resolution(images: list[Image], resolution: int | Literal["auto"] | None, native: int) -> int:
    """The resolution that all of `images` are shown at: as asked, `native` by default, or automatic.

    Raises:
        ConfigError: If the tower cannot run at it.
    """
    if resolution == "auto":
        return max((auto_resolution(image.size, native) for image in images), default=native)
    return check_resolution(native if resolution is None else resolution)


def _read(source: object, timeout: float) -> tuple[bytes, str]:
    """The encoded bytes of a picture and what to call it in messages."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source), f"image of {len(source)} bytes"
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        return _fetch(source, timeout), source
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _read_data_url(source), f"{source[:40]}…"
    if isinstance(source, (str, os.PathLike)):
        return _read_file(os.fspath(source)), os.fspath(source)
    if callable(read := getattr(source, "read", None)):
        name = str(getattr(source, "name", "image file"))
        try:
            return _read_limited(read, MAX_FILE_BYTES, name), name
        except OSError as err:
            raise ImageError(f"{name}: cannot be read ({err.strerror or err})") from err
    raise ImageError(
        f"an image must be a path, URL, bytes, binary file, PIL image or array, not {type(source).__name__}"
    )


def _read_file(path: str) -> bytes:
    if "://" in path:
        raise ImageError(f"{path}: only http://, https:// and data: URLs can be fetched")
    try:
        with Path(path).expanduser().open("rb") as file:
            return _read_limited(file.read, MAX_FILE_BYTES, path)
    except FileNotFoundError as err:
        raise ImageError(f"{path}: no such file") from err
    except IsADirectoryError as err:
        raise ImageError(f"{path}: is a folder, not an image; name the files in it") from err
    except (OSError, ValueError, RuntimeError) as err:
        raise ImageError(f"{path!r}: cannot be opened ({getattr(err, 'strerror', None) or err})") from err


def _read_limited(read: Any, limit: int, name: str, deadline: float = float("inf")) -> bytes:
    """Everything that `read(size)` gives, unless it is more than `limit` bytes or lasts beyond `deadline`."""
    buffer = io.BytesIO()
    while chunk := read(1 << 20):
        if isinstance(chunk, str):
            raise ImageError(f"{name}: opened as text; open it in binary mode ('rb')")
        buffer.write(chunk)
        if buffer.tell() > limit:
            raise ImageError(f"{name}: larger than {limit >> 20} MiB, the most that is read")
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
    return buffer.getvalue()


def _read_data_url(url: str) -> bytes:
    from urllib.parse import unquote_to_bytes

    header, comma, payload = url.partition(",")
    if not comma:
        raise ImageError(f"{url[:40]!r}: a data: URL has the form data:image/png;base64,…")
    data = unquote_to_bytes(payload)
    if not header.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as err:
        raise ImageError(f"{header},…: not valid base64 ({err})") from err


def _fetch(url: str, timeout: float) -> bytes:
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.parse import quote
    from urllib.request import Request, urlopen

    deadline = time.monotonic() + timeout
    try:
        request = Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers={"User-Agent": "fastvlm-mlx"})
        with urlopen(request, timeout=timeout) as response:
            # read1 returns what has arrived, so that a server that trickles cannot outlast the deadline.
            data = _read_limited(response.read1, MAX_DOWNLOAD_BYTES, url, deadline)
            expected = int(response.headers.get("Content-Length", len(data)))
            kind = response.headers.get_content_type()
    except HTTPError as err:
        raise ImageError(f"{url}: the server answered {err.code} {err.reason}") from err
    except (URLError, HTTPException, OSError, ValueError) as err:
        reason = getattr(err, "reason", None) or err
        if isinstance(reason, TimeoutError):
            raise ImageError(f"{url}: not fetched within {timeout:g} s") from err
        raise ImageError(f"{url}: cannot be fetched ({reason})") from err
    if expected != len(data):
        raise ImageError(f"{url}: the connection broke after {len(data)} of {expected} bytes; try again")
    if kind.startswith("text/"):
        raise ImageError(f"{url}: is a {kind} page, not an image; use the address of the picture itself")
    return data


def _decode(data: bytes, name: str) -> Image:
    from PIL import Image

    if not data:
        raise ImageError(f"{name}: is empty (0 bytes)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes below the limit and harmless metadata
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except Image.DecompressionBombError as err:
            raise ImageError(f"{name}: has more than {MAX_PIXELS:,} pixels, the most that is read; reduce it") from err
        except _DECODER_ERRORS as err:
            hint = (
                "HEIC is not supported; save it as JPEG" if data[4:12] in _HEIC else "it is damaged or something else"
            )
            raise ImageError(f"{name}: not an image in a known format ({', '.join(_FORMATS)}); {hint}") from err
        return _to_rgb(image, name)


def _to_rgb(image: Image, name: str) -> Image:
    """The picture in RGB and upright; itself if it is so already."""
    from PIL import Image

    width, height = image.size
    if not width or not height:
        raise ImageError(f"{name}: has no pixels ({width}×{height})")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: has more than {MAX_PIXELS:,} pixels, the most that is read ({width}×{height})")
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{name}: is {width}×{height}; a side may have at most {MAX_SIDE:,} pixels; cut or reduce it")
    try:
        image.load()
        if image.mode == "F":
            raise ImageError(f"{name}: holds floating-point samples of unknown range; save it with 8 bits per channel")
        if image.mode.startswith("I"):
            # The high byte, which is what Pillow keeps of 16-bit RGB; its own conversion would clip to white.
            samples = np.asarray(image).clip(0, 65_535) >> 8
            rgb = Image.fromarray(samples.astype(np.uint8)).convert("RGB")
        else:
            rgb = image if image.mode == "RGB" else image.convert("RGB")
    except _DECODER_ERRORS as err:
        raise ImageError(f"{name}: damaged, incomplete or of an unknown kind ({err}); export it again") from err
    except MemoryError as err:
        raise ImageError(f"{name}: does not fit into memory ({width}×{height} pixels)") from err
    return _upright(rgb, image)


def _upright(rgb: Image, original: Image) -> Image:
    """`rgb` turned as the EXIF orientation of `original` says; damaged EXIF data count as none.

    What was turned has no metadata, so that nobody turns it again.
    """
    from PIL import ExifTags
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(original.getexif().get(ExifTags.Base.Orientation, 1))
    except _DECODER_ERRORS:
        return rgb
    if turn is None:
        return rgb
    turned = rgb.transpose(turn)
    turned.info = {}  # Pillow finds the orientation in here, as EXIF or as XMP
    return turned


def _array_to_rgb(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The array as (H, W, 3) uint8."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        raise ImageError(
            f"an array must have shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) and pixels, not {array.shape}"
        )
    if array.shape[0] * array.shape[1] > MAX_PIXELS or max(array.shape) > MAX_SIDE:
        raise ImageError(
            f"an array of shape {array.shape} is too large: at most {MAX_PIXELS:,} pixels and {MAX_SIDE:,} a side"
        )
    array = array[..., :3]
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0.0 and high <= 1.0):
            raise ImageError(f"a float array must hold values in [0, 1], not [{low:g}, {high:g}]; divide or clip it")
        array = np.rint(array.astype(np.float32) * np.float32(255)).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(f"an array must be uint8 or float in [0, 1], not {array.dtype}")
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
