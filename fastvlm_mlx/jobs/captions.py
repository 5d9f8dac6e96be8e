"""The text around captions: a prompt for each picture, and captions without their opening phrases."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastvlm_mlx.errors import ImageError, PromptError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.formats import DECODER_ERRORS, open_image, quiet
from fastvlm_mlx.inputs.sources import Encoded

FIELDS = MappingProxyType(
    {
        "name": "the file's name without its extension",
        "directory": "the name of its folder",
        "date": "the day on which it was taken, such as 2026-11-26",
        "camera": "the camera's maker and model",
        "gps": "the place in decimal degrees, such as 48.85837, 2.29448",
        "existing": "what somebody has written about it",
        "tags": "its keywords",
    }
)
"""What a prompt may have in braces, and what it stands for."""

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")

# Only words that say nothing: who removes "painting" or "black and white" loses something.
_PICTURE = r"(?:image|picture|photo(?:graph)?|snapshot|scene)"
_SHOWS = (
    r"(?:shows?|showing|depicts?|depicting|features?|featuring|displays?|captures?|portrays?|presents?|illustrates?"
    rf"|showcases?|contains?|is of|is showing|is an? {_PICTURE} of|that (?:shows|depicts|features))"
)
_OPENINGS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?:sure|certainly|of course)[!,.]\s+(?=(?:here|the|this|in)\b)",
        rf"here(?:'s|’s| is) (?:a|an|the) (?:[\w-]+ )?(?:description|caption)(?: (?:of|for) (?:the|this) {_PICTURE})?"
        r"[:.]\s*",
        r"(?:\*\*)?(?:caption|description)(?:\*\*)?:(?:\*\*)?\s+",
        rf"(?:the|this) (?:provided |given )?{_PICTURE} (?:clearly |prominently |simply )?{_SHOWS}(?: us)?(?::| that)?"
        r"\s+",
        rf"(?:this|it) is an? {_PICTURE} (?:of|{_SHOWS})\s+",
        rf"an? {_PICTURE} (?:of|{_SHOWS})\s+",
        rf"in (?:the|this) {_PICTURE}(?:\s*,\s*|\s+)(?:we|you|one)(?: can)? (?:see|observe)(?: that)?\s+",
        rf"in (?:the|this) {_PICTURE}(?:\s*,\s*|\s+(?=there (?:is|are)\b))",
        r"(?:we|you|one) can see(?: that)?\s+",
    )
)

_DATE = re.compile(r"(\d{4})[:-](\d\d)[:-](\d\d)\b")
_EXIF, _MAKE, _MODEL, _TAKEN, _CHANGED = 0x8769, 0x010F, 0x0110, 0x9003, 0x0132
_GPS = 0x8825
_PLACE = ((1, 2, {"N": 1, "S": -1}, 90), (3, 4, {"E": 1, "W": -1}, 180))
"""For latitude and longitude: the tags of hemisphere and angle, the signs, and the most degrees."""


def remove_opening(caption: str) -> str:
    """Returns a caption without phrases such as "The image shows" at its beginning, with a capital letter instead.

    A caption that is nothing else stays as it is.

    >>> remove_opening("This is a photo of two dogs on a beach.")
    'Two dogs on a beach.'
    """
    length = opening_length(caption)
    return _capitalized(caption[length:]) if length else caption


def opening_length(caption: str) -> int:
    """Returns how many characters at the beginning of a caption `remove_opening` removes."""
    text = caption
    while (shorter := _without_opening(text)) != text:
        text = shorter
    return len(caption) - len(text)


def _without_opening(text: str) -> str:
    for opening in _OPENINGS:
        match = opening.match(text.lstrip())
        rest = text.lstrip()[match.end() :] if match else ""
        if re.search(r"\w", rest):
            return rest
    return text


def _capitalized(text: str) -> str:
    """The text with its first letter in upper case, unless its first word is written like iPhone."""
    first = text.split(maxsplit=1)[0]
    return text[:1].upper() + text[1:] if first.islower() else text


class PromptTemplate:
    """A prompt with some of `FIELDS` in braces, such as `Describe {name}, taken on {date}`.

    Attributes:
        fields: The names of those that it has.

    Raises:
        PromptError: If it is empty, has another field, or a brace alone; `{{` and `}}` stand for braces.
    """

    def __init__(self, text: str) -> None:
        if not text.strip():
            raise PromptError("the prompt is empty; give a question")
        known = ", ".join(f"{{{field}}}" for field in FIELDS)
        for match in _PLACEHOLDER.finditer(text):
            if match.group() not in ("{{", "}}") and match[1] not in FIELDS:
                raise PromptError(
                    f"the prompt has {printable(match.group(), 60)} at character {match.start() + 1}; the fields are "
                    f"{known}; write {{{{ and }}}} for braces"
                )
        self._text = text
        self.fields = frozenset(match[1] for match in _PLACEHOLDER.finditer(text) if match[1])

    def render(self, values: Mapping[str, str]) -> str:
        """Returns the prompt for one picture. A field without a value is empty; braces in a value are its text."""

        def value(match: "re.Match[str]") -> str:
            return values.get(match[1], "") if match[1] else match.group()[0]

        return _PLACEHOLDER.sub(value, self._text).strip()


def path_values(picture: str) -> dict[str, str]:
    """Returns the fields that a picture's path gives: `name` and `directory`."""
    path = Path(picture).absolute()
    return {"name": _one_line(path.stem), "directory": _one_line(path.parent.name)}


def exif_values(data: bytes) -> dict[str, str]:
    """Returns the fields that a picture's EXIF data give: `date`, `camera` and `gps`, if they are there."""
    try:
        with quiet, open_image(Encoded(data, "")) as image:
            exif = image.getexif()
            taken = exif.get_ifd(_EXIF).get(_TAKEN) or exif.get(_CHANGED)
            place = _decimal_degrees(exif.get_ifd(_GPS))
            make, model = (_one_line(str(exif.get(tag, ""))) for tag in (_MAKE, _MODEL))
    except (*DECODER_ERRORS, ImageError):
        return {}
    date = _DATE.match(str(taken))
    camera = model if make and model.casefold().startswith(make.split()[0].casefold()) else f"{make} {model}".strip()
    values = {"date": "-".join(date.groups()) if date and date[1] != "0000" else "", "camera": camera, "gps": place}
    return {name: value for name, value in values.items() if value}


def _decimal_degrees(gps: Mapping[int, Any]) -> str:
    """Latitude and longitude of GPS data; empty if they are missing, impossible or both 0, as without a fix."""
    degrees = []
    for hemisphere, angle, signs, most in _PLACE:
        sign, parts = signs.get(str(gps.get(hemisphere, "")).strip("\0 ").upper()), gps.get(angle)
        if sign is None or not isinstance(parts, (tuple, list)) or len(parts) != 3:
            return ""
        try:
            value = sum(float(part) / 60**place for place, part in enumerate(parts))
        except (ArithmeticError, TypeError, ValueError):
            return ""
        if not 0 <= value <= most:  # nor NaN, as of 0/0
            return ""
        degrees.append(sign * value)
    return ", ".join(f"{value:.5f}" for value in degrees) if any(degrees) else ""


def _one_line(text: str) -> str:
    """A text that a prompt can hold: without control characters, line ends and bytes that are not UTF-8."""
    text = text.encode("utf-8", "replace").decode()
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:200]
