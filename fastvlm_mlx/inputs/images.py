"""Images: any source -> upright RGB -> a square of R×R pixels, equal to Apple's preprocessing to the bit."""

from __future__ import annotations

import io
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from fastvlm_mlx.errors import ConfigError, ImageError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.resampling import RowFilter
from fastvlm_mlx.inputs.sources import DOWNLOAD_TIMEOUT, Allow, Encoded, ImageSource, read
from fastvlm_mlx.machine import cpu_threads

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

Resolution: TypeAlias = int | Literal["auto"] | None
"""A multiple of 64; `auto`, the smallest one that keeps the details; or None, the one that the weights are tuned at."""

MAX_PIXELS = 178_956_970
"""Images with more pixels are refused; a 16-bit RGB file of that size decodes to 1 GiB."""
MAX_SIDE = 65_535
MIN_AUTO_RESOLUTION = 256
MAX_RESOLUTION = 4096
"""The largest resolution in pixels: 4096 visual tokens, half of the context."""
_RESOLUTION_STEP = 64

# The formats to try, those that need no plugin search first. EPS is left out: Pillow starts Ghostscript for it.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "ICO", "TGA", "JPEG2000", "QOI", "AVIF")
# What Pillow's decoders raise on damaged data, each its own.
DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, RuntimeError),
    struct.error,
)
_HEIC = (b"ftypheic", b"ftypheix", b"ftypmif1")
# These decoders scale integer samples to 16 bits; elsewhere, their range is unknown.
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
_BAND_PIXELS = 1 << 24


def load_image(
    source: ImageSource, *, allow: Allow = Allow.ALL, timeout: float = DOWNLOAD_TIMEOUT, copy: bool = True
) -> Image:
    """Loads an image in RGB, upright (EXIF orientation applied), without alpha, which Apple drops, too.

    An animation gives its first frame; 16-bit samples keep their high byte. Loading the result once more changes
    nothing. A PIL image is turned as its own EXIF data say, even if it was edited since it was opened: Pillow hands
    these data on, and only `PIL.ImageOps.exif_transpose` removes the orientation from them.

    Args:
        source: See `ImageSource`. A URL is fetched.
        allow: What `source` may refer to.
        timeout: Seconds for fetching a URL.
        copy: Whether to copy a PIL image that is RGB and upright already. If not, it is returned itself.

    Raises:
        ImageError: If the source is not allowed, cannot be read or is not an image.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        image = _to_rgb(source, printable(getattr(source, "filename", "") or "PIL image"))
        return image.copy() if copy and image is source else image
    if hasattr(source, "__array__"):  # NumPy's or MLX's
        return Image.fromarray(_array_to_rgb(source))
    return _decode(read(source, allow=allow, timeout=timeout))


def preprocess(image: Image, resolution: int) -> NDArray[np.uint8]:
    """Centres an image on a black square and resizes it to (R, R, 3), bicubic with antialiasing.

    Bit-equal to padding first and resizing then (`expand2square` and CLIPImageProcessor in apple/ml-fastvlm). Pillow
    filters rows first, columns second, and rounds to 8 bits in between. Here each pass runs by itself, in bands: rows
    first, then columns. So threads share the work, and the padded square is never made; for an image of 20000×10 it
    would take 1.6 GB. The black beside a tall image is not filtered either.
    """
    from PIL import Image

    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    tall = RowFilter(left=left, width=width, side=side, resolution=resolution) if 5 * width < 2 * height else None
    first, count = (tall.first, tall.count) if tall else (0, resolution)
    narrow = Image.new("RGB", (count, side))
    pixels = np.zeros((resolution, resolution, 3), dtype=np.uint8)

    def filter_rows(start: int, end: int) -> None:
        if tall:
            filtered = Image.fromarray(tall(np.asarray(image.crop((0, start, width, end)))))
        else:
            band = image.crop((-left, start, side - left, end))  # black outside the image
            filtered = band.resize((resolution, end - start), Image.Resampling.BICUBIC)
        narrow.paste(filtered, (0, top + start))

    def filter_columns(start: int, end: int) -> None:
        band = narrow.crop((start, 0, end, side)).resize((end - start, resolution), Image.Resampling.BICUBIC)
        pixels[:, first + start : first + end] = np.asarray(band)

    with ThreadPoolExecutor(cpu_threads()) as threads:
        for run, length in ((filter_rows, height), (filter_columns, count)):
            for done in [threads.submit(run, *band) for band in _bands(length, side)]:
                done.result()
    return pixels


def _bands(length: int, side: int) -> list[tuple[int, int]]:
    """Cuts `length` rows (or columns) of `side` pixels into a band for each thread, or more if those are large."""
    step = max(1, min(-(-length // cpu_threads()), _BAND_PIXELS // side))
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def check_resolution(resolution: int) -> int:
    """Returns the resolution if the tower can run at it.

    Raises:
        ConfigError: If it cannot.
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
    """The smallest resolution that does not reduce an image of `size` (W, H), from 256 up to `native`."""
    steps = -(-max(size) // _RESOLUTION_STEP)
    return min(max(steps * _RESOLUTION_STEP, MIN_AUTO_RESOLUTION), native)


def choose_resolution(images: list[Image], resolution: Resolution, native: int) -> int:
    """The one resolution of all `images`: `native` for None, for `auto` what the largest image needs.

    Raises:
        ConfigError: If the tower cannot run at it.
    """
    if resolution == "auto":
        return max((auto_resolution(image.size, native) for image in images), default=native)
    return check_resolution(native if resolution is None else resolution)


def _decode(encoded: Encoded) -> Image:
    from PIL import Image

    data, name, media_type = encoded
    if not data:
        raise ImageError(f"{name}: is empty (0 bytes)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes below the limit and harmless metadata
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except Image.DecompressionBombError as err:
            raise ImageError(f"{name}: has more than {MAX_PIXELS:,} pixels, the most that is read; reduce it") from err
        except DECODER_ERRORS as err:
            if media_type.startswith("text/"):
                raise ImageError(
                    f"{name}: is a {media_type} page, not an image; use the address of the image itself"
                ) from err
            hint = (
                "HEIC is not supported; save it as JPEG" if data[4:12] in _HEIC else "it is damaged or something else"
            )
            raise ImageError(f"{name}: not an image in a known format ({', '.join(_FORMATS)}); {hint}") from err
        return _to_rgb(image, name)


def _to_rgb(image: Image, name: str) -> Image:
    """Converts an image to RGB and turns it upright; returns it itself if it is both."""
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
        if image.mode == "F" or (image.mode == "I" and image.format not in _SIXTEEN_BIT_FORMATS):
            samples = "floating-point" if image.mode == "F" else "32-bit"
            raise ImageError(f"{name}: holds {samples} samples of unknown range; save it with 8 bits per channel")
        if image.mode.startswith("I"):
            # The high byte, which Pillow keeps of 16-bit RGB, too; its own conversion would clip to white.
            high = np.asarray(image).clip(0, 65_535) >> 8
            rgb = Image.fromarray(high.astype(np.uint8)).convert("RGB")
        else:
            rgb = image if image.mode == "RGB" else image.convert("RGB")
    except DECODER_ERRORS as err:
        raise ImageError(f"{name}: damaged, incomplete or of an unknown kind ({err}); export it again") from err
    except MemoryError as err:
        raise ImageError(f"{name}: does not fit into memory ({width}×{height} pixels)") from err
    return _upright(rgb, image)


def _upright(rgb: Image, original: Image) -> Image:
    """Turns `rgb` as the EXIF orientation of `original` says; damaged EXIF data count as none.

    A turned image has no metadata, so that it is not turned again.
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
    except DECODER_ERRORS:
        return rgb
    if turn is None:
        return rgb
    turned = rgb.transpose(turn)
    turned.info = {}  # Pillow looks for the orientation here, as EXIF or as XMP
    return turned


def _array_to_rgb(source: Any) -> NDArray[np.uint8]:
    """Converts an array to (H, W, 3), uint8."""
    try:
        array = np.asarray(source)
    except (TypeError, ValueError, RuntimeError) as err:  # MLX's bfloat16, for one
        raise ImageError(f"an array cannot be read ({err}); convert it to uint8 or float32") from err
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
