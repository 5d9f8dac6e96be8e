"""Reads the keys of a JSON object one by one: each has the right kind, or the error names it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fastvlm_mlx.formatting import names
from fastvlm_mlx.schema import shown
from fastvlm_mlx.server.api import ApiError


class Fields:
    """The keys of a JSON object, each read once; null counts as absent.

    Args:
        values: The object.
        where: What its keys are called in errors: `stream_options.`, or nothing for the body itself.

    Raises:
        ApiError: From every method, with status 400 and the key's name, if a value is not what it should be.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self._values = {key: value for key, value in values.items() if value is not None}
        self._where = where
        self._read: set[str] = set()
        self._nested: list[Fields] = []

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def value(self, name: str) -> Any:
        """Whatever a key has; None if it is absent."""
        self._read.add(name)
        return self._values.get(name)

    def text(self, name: str, default: str | None = None, *, among: Collection[str] = ()) -> str | None:
        """A text, one of `among` if there are any."""
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "a text")
        if among and value not in among:
            raise self.wrong(name, f"one of {names(among, 20)}")
        return value

    def whole(self, name: str, default: int | None = None, *, least: int = 0, most: int | None = None) -> int | None:
        """A whole number from `least` to `most`."""
        value = self.value(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # some clients write 64.0
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        if not isinstance(value, int) or isinstance(value, bool) or value < least or (most or value) < value:
            raise self.wrong(name, f"a whole number, {bounds}")
        return value

    def number(
        self, name: str, default: float | None = None, *, least: float = -math.inf, most: float = math.inf
    ) -> float | None:
        """A number from `least` to `most`."""
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"a number{_bounds(least, most)}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def array(self, name: str) -> list[Any] | None:
        """A list."""
        value = self.value(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, "a list")
        return value

    def object(self, name: str) -> Fields | None:
        """An object; its keys that are not read count among `unknown`, too."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        fields = Fields(value, f"{self._where}{name}.")
        self._nested.append(fields)
        return fields

    def texts(self, name: str, most: int = 16) -> tuple[str, ...]:
        """A text or a list of at most `most` texts, none of them empty."""
        value = self.value(name)
        texts = [value] if isinstance(value, str) else [] if value is None else value
        if (
            not isinstance(texts, list)
            or len(texts) > most
            or not all(isinstance(each, str) and each for each in texts)
        ):
            raise self.wrong(name, f"a text or a list of at most {most} texts, none of them empty")
        return tuple(texts)

    def ignore(self, *keys: str) -> None:
        """Leaves out keys that change nothing here and need no warning."""
        self._read.update(keys)

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Refuses keys that would change what is asked, unless they are empty or false.

        Args:
            reasons: Why, by key: `this server calls no tools`.
        """
        for name, reason in reasons.items():
            if self.value(name) not in (None, False, [], {}, ""):
                raise ApiError(
                    400,
                    f"{self._where}{name} is not supported: {reason}; leave it out",
                    param=self._where + name,
                    code="unsupported_parameter",
                )

    def unknown(self) -> tuple[str, ...]:
        """The keys that were never read, those of nested objects too."""
        own = [self._where + name for name in self._values if name not in self._read]
        return (*own, *(name for fields in self._nested for name in fields.unknown()))

    def wrong(self, name: str, expected: str) -> ApiError:
        """The error for a key whose value is not what was expected."""
        path = self._where + name
        if name not in self._values:
            return ApiError(400, f"{path} is missing; it must be {expected}", param=path, code="missing_parameter")
        value = self._values[name]
        return ApiError(400, f"{path} must be {expected}, not {shown(value)}", param=path, code="invalid_parameter")


def _bounds(least: float, most: float) -> str:
    if math.isinf(least) and math.isinf(most):
        return ""
    if math.isinf(most):
        return f" of at least {least:g}"
    return f" from {least:g} to {most:g}"
