"""An image as it is stored, and what turns it upright."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.inputs.recent import Recent

if TYPE_CHECKING:
    from PIL.Image import Image, Transpose


@dataclass(frozen=True)
class TurnedImage:
    """An RGB image that is not turned yet, so that a photograph which is made smaller is not turned at full size.

    Attributes:
        stored: As the file holds it.
        turn: What makes it upright, if it is not.
        name: In messages.
        resized: What the model saw of it, by resolution: more questions may follow.
    """

    stored: Image
    turn: Transpose | None = None
    name: str = "image"
    resized: Recent[int, Any] = field(default_factory=lambda: Recent(2), compare=False, repr=False)

    @property
    def sideways(self) -> bool:
        """Whether its rows are stored as columns."""
        from PIL.Image import Transpose

        return self.turn in (Transpose.TRANSPOSE, Transpose.ROTATE_90, Transpose.ROTATE_270, Transpose.TRANSVERSE)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright image."""
        width, height = self.stored.size
        return (height, width) if self.sideways else (width, height)

    def reduced(self, factor: int) -> Image:
        """The stored image, `factor` times smaller; turned upright, it equals the upright image made smaller.

        Each pixel is the mean of a whole box. Pixels at the right and bottom that fill none are left out.
        """
        from PIL.Image import Transpose

        if factor == 1:
            return self.stored
        width, height = self.stored.size
        across, down = min(factor, width), min(factor, height)
        right, bottom = width % across, height % down
        from_right = (Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.ROTATE_90, Transpose.TRANSVERSE)
        from_below = (Transpose.FLIP_TOP_BOTTOM, Transpose.ROTATE_180, Transpose.ROTATE_270, Transpose.TRANSVERSE)
        left = right if self.turn in from_right else 0
        top = bottom if self.turn in from_below else 0
        return self.stored.reduce((across, down), box=(left, top, left + width - right, top + height - bottom))

    def upright(self) -> Image:
        """The image turned upright, without metadata, so that it is not turned again; itself if it is upright.

        Raises:
            ImageError: If it does not fit into memory.
        """
        if self.turn is None:
            return self.stored
        try:
            turned = self.stored.transpose(self.turn)
        except MemoryError as err:
            width, height = self.size
            raise ImageError(f"{self.name}: does not fit into memory ({width}×{height} pixels)") from err
        turned.info = {}  # Pillow looks for the orientation here, as EXIF or as XMP
        return turned
