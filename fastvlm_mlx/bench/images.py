"""Pictures to measure with: as many as there are runs, so that no cache can answer for the model."""

import hashlib
import io
from typing import TYPE_CHECKING

import numpy as np

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.inputs.images import load_image

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = (1280, 960)
_MARK = 32
"""Side in pixels of the square that tells a copy from the others."""


class Pictures:
    """Encoded pictures, a different one for every number: synthetic photographs, or copies of one, each marked.

    Args:
        source: The encoded picture to copy; JPEG, PNG and WebP keep their format, others become PNG.
        name: What to call it in messages.

    Raises:
        ImageError: If it is not a picture.
    """

    def __init__(self, source: bytes | None = None, name: str = "image") -> None:
        self.sha256 = None if source is None else hashlib.sha256(source).hexdigest()
        self._picture: Image | None = None
        self._format = "JPEG"
        if source is not None:
            import PIL.Image

            try:
                self._picture = load_image(source)
            except ImageError as err:
                raise ImageError(f"{name}: {err}") from err
            with PIL.Image.open(io.BytesIO(source)) as opened:
                self._format = opened.format if opened.format in ("JPEG", "WEBP") else "PNG"

    def __call__(self, number: int) -> bytes:
        """The encoded bytes of picture `number`."""
        random = np.random.default_rng(number)
        picture = _synthetic(random) if self._picture is None else self._picture.copy()
        picture.paste(tuple(random.integers(0, 256, 3).tolist()), (0, 0, _MARK, _MARK))
        encoded = io.BytesIO()
        picture.save(encoded, self._format, quality=90)
        return encoded.getvalue()


def _synthetic(random: np.random.Generator) -> "Image":
    """A picture that costs a JPEG decoder about as much as a photograph: clouds of colour under fine grain."""
    from PIL import Image

    width, height = SIZE
    clouds = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(SIZE)
    grain = random.normal(0, 6, (height, width, 1))
    return Image.fromarray((np.asarray(clouds) + grain).clip(0, 255).astype(np.uint8))
