"""Checks of the arguments of public functions: the wrong kind of value is an error that names the argument.

What is accepted comes back in Python's own type, so that NumPy's scalars are as good as Python's numbers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeAlias, Union

from fastvlm_mlx.errors import ConfigError, FastVLMError, PromptError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.schema import shown

StrPath: TypeAlias = Union[str, "os.PathLike[str]"]
"""A path, or a name that may be one."""


def as_whole(value: object) -> int | None:
    """A whole number, Python's or NumPy's, as an `int`; None for everything else, truth values included."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def as_real(value: object) -> float:
    """A real number, Python's or NumPy's, as a `float`; NaN for everything else, truth values included."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def whole(value: object, name: str, least: int = 1, most: int | None = None) -> int:
    """A whole number from `least` to `most`.

    Raises:
        ConfigError: If `value` is none; the message calls it `name`.
    """
    number = as_whole(value)
    if number is None or number < least or (most is not None and number > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name} must be a whole number, {bounds}, not {shown(value)}")
    return number


def flag(value: object, name: str) -> bool:
    """A truth value, Python's or NumPy's; None is False.

    Raises:
        ConfigError: If `value` is none; the message calls it `name`.
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise ConfigError(f"{name} must be True or False, not {shown(value)}")


def choice(value: object, name: str, possible: Collection[str], error: type[FastVLMError] = ConfigError) -> str:
    """One of several texts.

    Raises:
        FastVLMError: `error`, if `value` is none of them; the message calls it `name`.
    """
    if not isinstance(value, str) or value not in possible:
        *others, last = possible
        raise error(f"{name} must be {', '.join(others)} or {last}, not {shown(value)}")
    return value


def check_kind(value: object, name: str, kind: type | tuple[type, ...], expected: str) -> None:
    """Checks that an argument is an instance of `kind`.

    Raises:
        ConfigError: If it is not; the message calls it `name` and says what was `expected`.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{name} must be {expected}, not {type(value).__name__}")


def check_callable(value: object, name: str) -> None:
    """Checks that an argument is a function or None.

    Raises:
        ConfigError: If it is not; the message calls it `name`.
    """
    if value is not None and not callable(value):
        raise ConfigError(f"{name} must be a function or None, not {type(value).__name__}")


def file_path(value: object, name: str) -> Path:
    """The path that a text or a `PathLike` is.

    Raises:
        ConfigError: If `value` is none, or one that no system can have; the message calls it `name`.
    """
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise ConfigError(f"{name} must be a path, not {type(value).__name__}")
    if not text or "\0" in text:
        raise ConfigError(f"{name} must be a path, not {shown(text)}")
    return Path(text)


def items(value: object, name: str, expected: str = "a list") -> list[Any]:
    """The elements of a list, tuple or other collection that is no text.

    Raises:
        ConfigError: If `value` is none; the message calls it `name` and says what was `expected`.
    """
    found = elements(value)
    if found is None or isinstance(value, (Mapping, os.PathLike)):
        raise ConfigError(f"{name} must be {expected}, not {type(value).__name__}")
    return found


def elements(value: Any) -> list[Any] | None:
    """What an iterable yields; None for a text and for what is not iterable."""
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return None
    try:
        return list(value)
    except TypeError:  # a number, or an array without axes
        return None


def valid_text(value: object, name: str) -> str:
    """A text that can be encoded.

    Raises:
        PromptError: If `value` is none; the message calls it `name`.
    """
    if not isinstance(value, str):
        raise PromptError(f"{name} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as err:
        code = ord(value[err.start])
        raise PromptError(
            f"{name} is not valid Unicode: half a character (U+{code:04X}) at position {err.start}"
        ) from err
    return value


def whole_ids(values: Any) -> list[int]:
    """The token ids of one row, in whatever vocabulary.

    Raises:
        PromptError: If `values` are no whole numbers.
    """
    is_array = hasattr(values, "tolist") and not isinstance(values, type)
    ids = elements(values.tolist() if is_array else values)
    if ids is None:
        raise PromptError(f"token ids must be a list of whole numbers, not {type(values).__name__}")
    for position, value in enumerate([] if set(map(type, ids)) <= {int} else ids):
        if as_whole(value) is None:
            raise PromptError(f"token ids must be whole numbers, not {shown(value)} (at position {position})")
    return list(map(int, ids))


def checked_ids(values: Any, vocabulary: int, *others: int) -> list[int]:
    """The token ids of one row, all of them below `vocabulary` or among `others`.

    Raises:
        PromptError: If they are not.
    """
    ids = whole_ids(values)
    if wrong := [each for each in set(ids) if not 0 <= each < vocabulary and each not in others]:
        raise PromptError(f"token id {shown(wrong[0])} is outside the vocabulary of {vocabulary}")
    return ids


def check_choices(choices: Sequence[str]) -> None:
    """Checks the choices of a question.

    Raises:
        PromptError: If there are fewer than two, or one is no text, empty or given twice.
    """
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise PromptError("choices must be a list of texts")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise PromptError(f"a choice must be a text that is not empty, not {printable(repr(choice), 60)}")
    if len(choices) < 2:
        raise PromptError("give at least two choices")
    for place, choice in enumerate(choices):
        if choice in choices[:place]:
            raise PromptError(f"the choice {printable(choice, 60)} is given twice")
