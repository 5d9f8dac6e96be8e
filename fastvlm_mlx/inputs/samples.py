"""Samples: an image of any mode and any format -> 8-bit RGB; what cannot be read rightly is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.colours import parse_colour
from fastvlm_mlx.inputs.formats import DECODER_ERRORS, MAX_PIXELS, quiet
from fastvlm_mlx.inputs.turned import TurnedImage

if TYPE_CHECKING:
    from PIL.Image import Image, Transpose

MAX_SIDE = 65_535

# The formats whose readers scale 32-bit integers to 16 bits; elsewhere, their range is unknown.
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}

# TIFF's tags.
_SUBFILE_TYPE, _OLD_SUBFILE_TYPE, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 254, 255, 258, 259, 262, 266
_CHANNELS, _PLANAR, _COLOUR_MAP, _INK_SET, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 277, 284, 320, 332, 338, 339
_YCBCR_COEFFICIENTS, _YCBCR_SUBSAMPLING, _REFERENCE_BLACK_WHITE, _DNG_VERSION = 529, 530, 532, 50_706
# Values of Compression and PhotometricInterpretation, and what Pillow supposes of YCbCr.
_UNCOMPRESSED, _OLD_JPEG, _JPEG = 1, 6, 7
_WHITE_IS_ZERO, _SEPARATED, _YCBCR = 0, 5, 6
_BT_601, _FULL_RANGE = (0.299, 0.587, 0.114), (0, 255, 128, 255, 128, 255)


def to_turned(
    image: Image, name: str, *, background: str | None = None, notify: Callable[[str], None] | None = None
) -> TurnedImage:
    """Converts an image to RGB, or takes it itself if it is, and tells how it is turned.

    Args:
        image: As it was opened, or made.
        name: In messages.
        background: The colour that transparent pixels show. By default they show what is stored in them.
        notify: Called with the name if that happens.

    Raises:
        ImageError: If the image is too large or damaged, or its samples are of a kind that is not read rightly.
        ConfigError: If `background` is no colour.
    """
    colour = None if background is None else parse_colour(background)
    _check_size(image, name)
    try:
        with quiet:
            if refusal := _refusal(image):
                raise ImageError(f"{name}: {refusal}")
            image.load()
            _check_size(image, name)  # HEIF's header may be wrong about it
            rgb = _in_rgb(image)
            opacity = None if colour is None and notify is None else _opacity(image)
            if opacity is not None and colour is not None:
                rgb = _on_ground(rgb, opacity, colour)
            elif opacity is not None and notify is not None:
                notify(name)
            return TurnedImage(rgb, _turn(image), name)
    except DECODER_ERRORS as err:
        if getattr(image, "tile", None) and getattr(getattr(image, "fp", None), "closed", True):
            raise ImageError(f"{name}: its file was closed before it was read; call load() on the image first") from err
        reason = printable(err) or type(err).__name__
        raise ImageError(f"{name}: damaged, incomplete or of an unknown kind ({reason}); export it again") from err
    except MemoryError as err:
        raise ImageError(f"{name}: does not fit into memory ({image.width}×{image.height} pixels)") from err


def _check_size(image: Image, name: str) -> None:
    width, height = image.size
    if not width or not height:
        raise ImageError(f"{name}: has no pixels ({width}×{height})")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: has more than {MAX_PIXELS:,} pixels, the most that is read ({width}×{height})")
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{name}: is {width}×{height}; a side may have at most {MAX_SIDE:,} pixels; cut or reduce it")


def _refusal(image: Image) -> str:
    """Why the samples cannot be told, though Pillow decodes them; empty if they can."""
    kind = ""
    if image.format == "TIFF" and hasattr(image, "tag_v2"):
        if _begins_with_preview(image.tag_v2):
            return "is a camera raw file, or begins with a reduced preview as these do; export it as JPEG"
        kind = _unknown_tiff_samples(image.tag_v2)
    elif image.format == "JPEG2000" and (file := getattr(image, "fp", None)):
        kind = _unknown_jpeg2000_samples(file)
    if not kind and image.mode == "F":
        kind = "floating-point samples of unknown range"
    if not kind and image.mode == "I" and image.format not in _SIXTEEN_BIT_FORMATS:
        kind = "32-bit samples of unknown range"
    return f"holds {kind}; save it with 8 bits per channel" if kind else ""


def _begins_with_preview(tags: Mapping[int, Any]) -> bool:
    """Whether the first directory of a TIFF is not the picture itself: bits 0 and 2 are a preview and a mask."""
    return _DNG_VERSION in tags or bool(tags.get(_SUBFILE_TYPE, 0) & 0b101) or tags.get(_OLD_SUBFILE_TYPE) == 2


def _unknown_tiff_samples(tags: Mapping[int, Any]) -> str:
    """What Pillow takes for something else: it looks at fewer of a TIFF's tags than decide."""
    bits, photometric = tags.get(_BITS, (1,)), tags.get(_PHOTOMETRIC)
    compression = tags.get(_COMPRESSION, _UNCOMPRESSED)  # what is compressed, libtiff decodes
    if 2 in tags.get(_SAMPLE_FORMAT, ()):
        return f"signed {max(bits)}-bit samples of unknown range"
    if photometric is None and max(bits) > 1 and compression != _OLD_JPEG:
        return "samples of unknown meaning (PhotometricInterpretation is missing)"
    channels = max(len(bits), tags.get(_CHANNELS, 1))
    if tags.get(_PLANAR) == 2 and channels > 1:
        plain = set(bits) == {8} and tags.get(_FILL_ORDER, 1) == 1
        alpha = channels in (2, 4) and photometric != _SEPARATED and tags.get(_EXTRA_SAMPLES) not in ((0,), (2,))
        if not plain if compression == _UNCOMPRESSED else alpha:
            return "separate planes (PlanarConfiguration 2) of an unusual kind"
    if photometric == _SEPARATED and tags.get(_INK_SET, 1) != 1:
        return "inks other than cyan, magenta, yellow and black"
    if photometric == _YCBCR and compression not in (_OLD_JPEG, _JPEG):
        usual = (
            (compression != _UNCOMPRESSED or tags.get(_YCBCR_SUBSAMPLING, (2, 2)) == (1, 1))
            and np.allclose(tags.get(_YCBCR_COEFFICIENTS, _BT_601), _BT_601, atol=1e-3)
            and np.allclose(tags.get(_REFERENCE_BLACK_WHITE, _FULL_RANGE), _FULL_RANGE)
        )
        return "" if usual else "YCbCr samples of an unusual kind"
    return ""


def _unknown_jpeg2000_samples(file: IO[bytes]) -> str:
    """What Pillow reads wrongly: it rounds light samples of more than 8 bits up to black, and leaves few bits dark."""
    file.seek(0)
    data = file.read()
    at = data.find(b"\xff\x4f\xff\x51") + 42  # the header of the codestream: 3 bytes for each channel from here on
    channels = int.from_bytes(data[at - 2 : at], "big")
    bits = {(size & 0x7F) + 1 for size in data[at : at + 3 * channels : 3]}
    if bits == {8} or (channels == 1 and bits <= set(range(9, 17))):
        return ""
    return f"samples of {max(bits, default=0)} bits"


def _in_rgb(image: Image) -> Image:
    from PIL import Image as PillowImage

    tags = getattr(image, "tag_v2", {})
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # The high byte, which Pillow keeps of 16-bit RGB, too; its own conversion would clip to white.
        bits = tags.get(_BITS, (16,))[0]
        levels = np.asarray(image).clip(0, 65_535) >> (bits - 8)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            levels = 255 - levels
        return PillowImage.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA") and max(tags.get(_COLOUR_MAP, (256,))) < 256:
        # Some programs write 8-bit colours into a TIFF's 16-bit map.
        colours = np.array(tags[_COLOUR_MAP], dtype=np.uint8).reshape(3, -1).T
        return PillowImage.fromarray(colours[np.asarray(image.getchannel(0))])
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # Pillow warns of a palette with alpha otherwise
    rgb = image.convert("RGB")
    rgb.info.pop("transparency", None)
    return rgb


def _opacity(image: Image) -> Image | None:
    """How opaque each pixel is, in the mode L; None if all are wholly."""
    from PIL import Image as PillowImage

    if not image.has_transparency_data:
        return None
    if image.mode.startswith("I"):
        visible = np.asarray(image) != image.info["transparency"]
        opacity = PillowImage.fromarray(np.where(visible, 255, 0).astype(np.uint8))
    elif image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        opacity = image.getchannel(image.getbands()[-1])
    else:
        opacity = image.convert("RGBA").getchannel("A")
    if opacity.getextrema() == (255, 255) or (image.format == "TGA" and opacity.getextrema() == (0, 0)):
        return None  # a TGA may leave its fourth channel empty
    return opacity


def _on_ground(rgb: Image, opacity: Image, colour: tuple[int, int, int]) -> Image:
    from PIL import Image as PillowImage

    ground = PillowImage.new("RGB", rgb.size, colour)
    ground.paste(rgb, mask=opacity)
    return ground


def _turn(image: Image) -> Transpose | None:
    """What turns an image upright, as its EXIF orientation says; damaged EXIF data count as none."""
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
        return turns.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DECODER_ERRORS:
        return None


def array_image(source: Any) -> Image:
    """An image of the mode L, RGB or RGBA of an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).

    Raises:
        ImageError: If the array has another shape, or is neither uint8 nor float in [0, 1].
    """
    from PIL import Image as PillowImage

    try:
        array = np.asarray(source)
    except (TypeError, ValueError, RuntimeError) as err:  # MLX's bfloat16, for one
        raise ImageError(f"an array cannot be read ({printable(err)}); convert it to uint8 or float32") from err
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or not array.size:
        raise ImageError(
            f"an array must have shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) and pixels, not {array.shape}"
        )
    if array.shape[0] * array.shape[1] > MAX_PIXELS or max(array.shape) > MAX_SIDE:
        raise ImageError(
            f"an array of shape {array.shape} is too large: at most {MAX_PIXELS:,} pixels and {MAX_SIDE:,} a side"
        )
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0.0 and high <= 1.0):
            raise ImageError(f"a float array must hold values in [0, 1], not [{low:g}, {high:g}]; divide or clip it")
        array = np.rint(array.astype(np.float32) * np.float32(255)).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(f"an array must be uint8 or float in [0, 1], not {array.dtype}")
    return PillowImage.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
