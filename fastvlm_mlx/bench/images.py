"""Images to measure with: a new one for every run, so that no answer can come from a cache."""

import functools
import hashlib
import io
import math
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvlm_mlx.errors import ConfigError, ImageError
from fastvlm_mlx.inputs.images import load_image

if TYPE_CHECKING:
    from PIL.Image import Image

MEGAPIXELS = 1.2
FORMAT = "JPEG"
HEIF = "HEIF"
"""Pillow's name of HEIC's format."""
FORMATS = {FORMAT: "JPEG", HEIF: "HEIC", "WEBP": "WebP", "PNG": "PNG"}
"""By Pillow's names, the usual ones."""
_MARK = 32
"""Side in pixels of the square that makes each copy different."""
_GRID = 64
"""The width of a synthetic image is a multiple of as many pixels."""
_GREY = 128
_ENCODING: dict[str, dict[str, Any]] = {HEIF: {"enc_params": {"preset": "ultrafast"}}}
"""How images are written, by format. With x265's usual preset, 12 megapixels take 17 s instead of 3, and a sixth longer
to read."""


class Images:
    """Encoded images by number, each different: synthetic photographs, or copies of one image.

    Args:
        source: The encoded image to copy, None for synthetic ones; JPEG, PNG and WebP keep their format, others
            become PNG.
        name: The name of `source` in messages.
        megapixels: Of synthetic images; 1.2 are 1280×960, 12 are 4032×3024.
        form: Pillow's name of the format of synthetic images; HEIF needs pillow-heif.

    Attributes:
        megapixels: The same; None for copies.
        form: Of all images.

    Raises:
        ImageError: If `source` is not an image.
        ConfigError: If pillow-heif is needed and not installed.
    """

    def __init__(
        self, source: bytes | None = None, name: str = "image", megapixels: float = MEGAPIXELS, form: str = FORMAT
    ) -> None:
        self.megapixels = megapixels if source is None else None
        width = math.ceil(math.sqrt(megapixels * 1e6 * 4 / 3) / _GRID) * _GRID
        self._size = width, width * 3 // 4
        self.sha256 = None if source is None else hashlib.sha256(source).hexdigest()
        self._original: Image | None = None
        self.form = form
        if source is not None:
            import PIL.Image

            try:
                self._original = load_image(source)
            except ImageError as err:
                raise ImageError(f"{name}: {err}") from err
            with PIL.Image.open(io.BytesIO(source)) as opened:
                self.form = opened.format if opened.format in ("JPEG", "WEBP") else "PNG"
        elif form == HEIF:
            _learn_to_write_heif()

    def __call__(self, number: int) -> bytes:
        """Returns the encoded bytes of image `number`."""
        random = np.random.default_rng(number)
        image = self._synthetic(random) if self._original is None else self._original.copy()
        image.paste(tuple(random.integers(0, 256, 3).tolist()), (0, 0, _MARK, _MARK))
        encoded = io.BytesIO()
        image.save(encoded, self.form, quality=90, **_ENCODING.get(self.form, {}))
        return encoded.getvalue()

    def _synthetic(self, random: np.random.Generator) -> "Image":
        """Draws clouds of colour under fine grain, which take a JPEG decoder about as long as a photograph."""
        from PIL import Image, ImageChops

        clouds = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(self._size)
        return ImageChops.add(clouds, self._grain, offset=-_GREY)

    @functools.cached_property
    def _grain(self) -> "Image":
        """The grain of all synthetic images, which takes longest to draw, around a medium grey."""
        from PIL import Image

        grain = np.random.default_rng(0).normal(_GREY, 6, self._size[::-1])
        return Image.fromarray(grain.clip(0, 255).astype(np.uint8)).convert("RGB")


def _learn_to_write_heif() -> None:
    """Lets Pillow write HEIF; the package itself only reads it.

    Raises:
        ConfigError: If pillow-heif is not installed.
    """
    try:
        pillow_heif = import_module("pillow_heif")
    except ImportError as err:
        raise ConfigError(
            "images in HEIC are written by pillow-heif, which is not installed: pip install pillow-heif"
        ) from err
    pillow_heif.register_heif_opener()
