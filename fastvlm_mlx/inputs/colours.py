"""Colours by their names and codes."""

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.schema import shown


def parse_colour(text: str) -> tuple[int, int, int]:
    """The levels of a colour's name, such as `white`, or of its code, such as `#f0f0f0`.

    Raises:
        ConfigError: If it is neither.
    """
    from PIL import ImageColor

    try:
        red, green, blue = ImageColor.getrgb(text if isinstance(text, str) else "")[:3]
    except ValueError as err:
        raise ConfigError(f"background must be a colour such as white or #f0f0f0, not {shown(text)}") from err
    return red, green, blue
