"""Reads the JSON of checkpoints, and checks the kinds and ranges of its values.

Anyone can have written a checkpoint. So every JSON text of one is decoded here, within bounds of size and depth, and
every value that is used passes one of the checks below.
"""

import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastvlm_mlx.errors import CheckpointError, ConfigError, FastVLMError
from fastvlm_mlx.formatting import printable, readable_bytes

LARGEST_JSON = 16_000_000
"""The most bytes of a JSON text that is decoded here; the largest, Qwen2's vocab.json, has 2.8 MB."""
LARGEST_FILE = 64_000_000
"""The most bytes of any other small file; Qwen2's tokenizer.json, which the tokenizers library decodes, has 7 MB."""
MOST_LEVELS = 32
"""The most objects and lists within each other; real ones have about five."""
LARGEST_INT = 2**31 - 1
"""The largest size, id or count: MLX's sizes have 32 bits."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_small_file(path: Path, most: int = LARGEST_FILE, label: str = "") -> bytes | None:
    """The bytes of a file; None if there is no such file.

    Args:
        path: The file.
        most: The most bytes that it may have.
        label: What messages call it; by default its path.

    Raises:
        CheckpointError: If it cannot be read, is no ordinary file or is too large.
    """
    label = label or printable(path)
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:  # no pipe waits
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{label}: is not an ordinary file")
            if status.st_size > most:
                size, limit = readable_bytes(status.st_size), readable_bytes(most)
                raise CheckpointError(f"{label}: has {size}, expected at most {limit}; fetch it again")
            return file.read(status.st_size)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as err:  # ValueError: a name that the system cannot have
        raise CheckpointError(f"{label}: cannot be read: {getattr(err, 'strerror', None) or printable(err)}") from err


def read_object(path: Path, label: str = "") -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file.

    Args:
        path: The file.
        label: What messages call it; by default its path.

    Raises:
        CheckpointError: If it cannot be read, is too large, or holds something else; see `parse_object`.
    """
    data = read_small_file(path, LARGEST_JSON, label)
    return None if data is None else parse_object(data, label or printable(path))


def parse_object(
    data: bytes | bytearray,
    label: str,
    *,
    unique: bool = False,
    most: int | None = None,
    levels: int = MOST_LEVELS,
    error: Callable[[str], FastVLMError] = CheckpointError,
    advice: str = "; fetch it again",
) -> dict[str, Any]:
    """The object in a JSON text.

    Args:
        data: The text, in UTF-8.
        label: What messages call it.
        unique: Whether to refuse a key that appears twice in an object.
        most: The most bytes that it may have; by default `LARGEST_JSON`.
        levels: The most objects and lists within each other.
        error: Makes the error from its message.
        advice: What messages say can be done.

    Raises:
        FastVLMError: `error`, if it is too large, nested too deep or not valid JSON (a number is too large, a text is
            not Unicode), or is not an object.
    """
    most = LARGEST_JSON if most is None else most
    if len(data) > most:
        size, limit = readable_bytes(len(data)), readable_bytes(most)
        raise error(f"{label}: has {size}, expected at most {limit}{advice}")
    try:
        text = data.decode("utf-8")
        values = json.loads(
            text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_unique if unique else None
        )
        too_deep = is_deeper(values, levels)
        if not too_deep and _SURROGATE.search(text):
            json.dumps(values, ensure_ascii=False).encode()
    except RecursionError:
        too_deep = True
    except ValueError as err:
        raise error(f"{label}: cannot be read as JSON ({printable(err)}){advice}") from err
    if too_deep:
        raise error(f"{label}: cannot be read as JSON (more than {levels} levels deep){advice}")
    if not isinstance(values, dict):
        raise error(f"{label}: must hold a JSON object, not a {type(values).__name__}")
    return values


def _finite(text: str) -> float:
    """A number that JSON allows and a computer has."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key appears twice")
    return values


def is_deeper(values: Any, most: int) -> bool:
    """Whether more than `most` objects and lists are within each other."""
    level = [values]
    for _ in range(most + 1):
        level = [node for node in level if isinstance(node, (dict, list, tuple))]
        if not level:
            return False
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
    return True


def shown(value: Any) -> str:
    """A value as messages show it: its `repr`, shortened to one line."""
    return printable(_SHORT.repr(value), 80)


class _Short(reprlib.Repr):
    """A `repr` whose length, time and errors are bounded."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 80
        self.maxlevel = 3

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() > 1000:  # Python refuses to print thousands of digits
            return f"an integer of {value.bit_length()} bits"
        return super().repr_int(value, level)

    def repr_array(self, value: Any, level: int) -> str:  # MLX's arrays, which are not Python's
        return self.repr_instance(value, level)


_SHORT = _Short()


def integer(value: Any, what: str, least: int = 1, most: int = LARGEST_INT) -> int:
    """Checks that `value` is a whole number from `least` to `most`; returns it.

    Raises:
        ConfigError: If it is not; the message calls it `what`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ConfigError(f"{what} must be {kind}, not {shown(value)}")
    if value > most:
        raise ConfigError(f"{what} must be at most {most}, not {shown(value)}")
    return value


def number(value: Any, what: str, least: float, most: float) -> float:
    """Checks that `value` is a number from `least` to `most`; returns it.

    Raises:
        ConfigError: If it is not; the message calls it `what`.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"{what} must be a number from {least:g} to {most:g}, not {shown(value)}")
    return float(value)


def boolean(value: Any, what: str) -> bool:
    """Checks that `value` is true or false; returns it.

    Raises:
        ConfigError: If it is not; the message calls it `what`.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{what} must be true or false, not {shown(value)}")
    return value


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    """Checks that `value` is a JSON object; returns it.

    Raises:
        ConfigError: If it is not; the message calls it `what`.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{what} must be an object, not {shown(value)}")
    return value


def array(value: Any, what: str) -> list[Any] | tuple[Any, ...]:
    """Checks that `value` is a JSON array; returns it.

    Raises:
        ConfigError: If it is not; the message calls it `what`.
    """
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{what} must be a list, not {shown(value)}")
    return value
