"""Images: any source -> upright RGB -> a square of R×R pixels, equal to Apple's preprocessing to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.detail import resolution_for_details
from fastvlm_mlx.inputs.formats import open_image
from fastvlm_mlx.inputs.resizing import resize
from fastvlm_mlx.inputs.resolution import Resolution, auto_detail, check_resolution
from fastvlm_mlx.inputs.samples import array_image, to_turned
from fastvlm_mlx.inputs.sources import DOWNLOAD_TIMEOUT, Allow, Encoded, ImageSource, read
from fastvlm_mlx.inputs.turned import TurnedImage

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image


def load_image(
    source: ImageSource | Encoded,
    *,
    background: str | None = None,
    allow: Allow = Allow.ALL,
    timeout: float = DOWNLOAD_TIMEOUT,
    copy: bool = True,
    notify: Callable[[str], None] | None = None,
) -> Image:
    """Loads an image in RGB, upright (EXIF orientation applied).

    An animation gives its first frame; 16-bit samples keep their high byte. Levels are those of the file: colour
    profiles are not applied. Loading the result once more changes nothing.

    Without a background, alpha is dropped, as Apple drops it: a transparent pixel shows the colour that is stored in
    it, often black.

    HEIC and AVIF images are turned as their container says, not as their EXIF data say. A PIL image is turned as its
    own EXIF data say, even if it was edited since it was opened: Pillow hands these data on, and only
    `PIL.ImageOps.exif_transpose` removes the orientation from them.

    Args:
        source: See `ImageSource`; or what was read already. A URL is fetched.
        background: Colour under transparent pixels, such as `white` or `#f0f0f0`.
        allow: What `source` may refer to.
        timeout: Seconds for fetching a URL.
        copy: Whether to copy a PIL image that is RGB and upright already. If not, it is returned itself.
        notify: Called with the image's name if transparent pixels show the colours stored in them.

    Raises:
        ImageError: If the source is not allowed, cannot be read or is not an image.
        ConfigError: If `background` is no colour.
    """
    picture = load_turned(source, background=background, allow=allow, timeout=timeout, notify=notify)
    image = picture.upright()
    return image.copy() if copy and image is source else image


def load_turned(
    source: ImageSource | Encoded | TurnedImage,
    *,
    background: str | None = None,
    allow: Allow = Allow.ALL,
    timeout: float = DOWNLOAD_TIMEOUT,
    notify: Callable[[str], None] | None = None,
) -> TurnedImage:
    """Loads an image as `load_image` does, but does not turn it, nor copy a PIL image that is RGB.

    What it has loaded before is returned itself.
    """
    opened = open_source(source, allow=allow, timeout=timeout)
    if isinstance(opened, TurnedImage):
        return opened
    if isinstance(opened, Encoded):
        return to_turned(open_image(opened), opened.name, background=background, notify=notify)
    if hasattr(opened, "__array__"):  # NumPy's or MLX's
        return to_turned(array_image(opened), "array", background=background, notify=notify)
    name = printable(getattr(opened, "filename", "") or "PIL image")
    return to_turned(opened, name, background=background, notify=notify)


def open_source(source: Any, *, allow: Allow = Allow.ALL, timeout: float = DOWNLOAD_TIMEOUT) -> Any:
    """What `source` stands for, not decoded: a `TurnedImage`, a PIL image, an array, or an `Encoded`, read if need be.

    Raises:
        ImageError: If it is not allowed or cannot be read.
    """
    from PIL import Image

    if isinstance(source, (TurnedImage, Image.Image)) or hasattr(source, "__array__"):
        return source
    return read(source, allow=allow, timeout=timeout)


def preprocess(image: Image | TurnedImage, resolution: int) -> NDArray[np.uint8]:
    """Centres an image on a black square and resizes it to (R, R, 3), bicubic with antialiasing.

    Bit-equal to padding first and resizing then (`expand2square` and CLIPImageProcessor in apple/ml-fastvlm). Pillow
    filters rows first, columns second, and rounds to 8 bits in between. Here each pass runs by itself, in parts. So
    threads share the work, and the padded square is never made; for an image of 20000×10 it would take 1.6 GB.
    A PIL image is taken for upright. Of a `TurnedImage` the latest results are kept.
    """
    picture = image if isinstance(image, TurnedImage) else TurnedImage(image)
    pixels: NDArray[np.uint8] = picture.resized.get(resolution, lambda: resize(picture, resolution))
    return pixels


def choose_resolution(images: Sequence[Image | TurnedImage], resolution: Resolution, native: int) -> int:
    """The one resolution of all `images`: `native` for None, for `auto` what the image that needs most gets.

    Raises:
        ConfigError: If the tower cannot run at it.
    """
    detail = auto_detail(resolution)
    if detail is not None:
        return max((resolution_for_details(image, native, detail) for image in images), default=native)
    return check_resolution(native if resolution is None else resolution)
