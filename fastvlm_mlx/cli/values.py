"""Plain values of options without pydantic, whose import would take longer than the rest of a start.

Newer versions of Typer convert every value with pydantic, defaults too. Here, what is of the right type already or can
be converted in one obvious way is converted at once. Everything else, errors above all, is left to Typer, and so are
versions of it that have no pydantic or another inside.
"""

import re
from collections.abc import Callable, Iterable
from enum import Enum
from functools import partial
from types import NoneType
from typing import Any, get_args, get_origin

_INTEGER = re.compile(r"-?[0-9]{1,15}", re.ASCII)
_NUMBER = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,15})?", re.ASCII)


class _Unclear(Exception):
    """A value that Typer has to look at."""


class PlainValues:
    """Converts the values of a parameter; takes the place of what Typer does that with.

    Args:
        typers: Gives Typer's own way, by importing pydantic.
        annotation: The type of the values.
        info: What the option or argument says about them.
    """

    def __init__(self, typers: Callable[[], Any], annotation: Any, info: Any) -> None:
        self._typers = typers
        self._annotation = annotation
        self._info = info

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """The value as the command takes it."""
        if value is None:
            return () if param.multiple or param.nargs == -1 else None
        try:
            return self._converted(value, self._annotation)
        except _Unclear:
            return self._typers().coerce(value, param=param, ctx=ctx)

    def _converted(self, value: Any, kind: Any) -> Any:
        if get_origin(kind) is list:
            if not isinstance(value, (list, tuple)):
                raise _Unclear
            return [self._converted(each, get_args(kind)[0]) for each in value]
        kinds = [each for each in get_args(kind) if each is not NoneType]
        if len(kinds) == 1:  # or None
            return self._converted(value, kinds[0])
        if self._info.parser is not None and isinstance(value, str):
            return self._info.parser(value)
        if kind in (str, bool) and type(value) is kind:
            return value
        if kind in (int, float):
            return self._number(value, kind)
        if isinstance(kind, type) and issubclass(kind, Enum):
            return self._member(value, kind)
        raise _Unclear

    def _number(self, value: Any, kind: Callable[[Any], Any]) -> Any:
        pattern = _INTEGER if kind is int else _NUMBER
        is_text = isinstance(value, str) and pattern.fullmatch(value) is not None
        if not is_text and type(value) is not kind:
            raise _Unclear
        number = kind(value)
        least, most = self._info.min, self._info.max
        if self._info.clamp or (least is not None and number < least) or (most is not None and number > most):
            raise _Unclear
        return number

    def _member(self, value: Any, kind: type[Enum]) -> Enum:
        members: Iterable[Enum] = kind
        for member in members:
            if value is member or value == member.value:
                return member
        raise _Unclear


def convert_plainly(parameters: Iterable[Any]) -> None:
    """Lets parameters convert plain values themselves, in versions of Typer that use pydantic."""
    for parameter in parameters:
        descriptor: Any = getattr(parameter, "type_descriptor", None)
        is_done = "get_runtime_param" in vars(parameter)
        if is_done or not hasattr(parameter, "get_runtime_param") or not hasattr(descriptor, "file_annotation"):
            continue
        if descriptor.file_annotation is None:
            plain = PlainValues(parameter.get_runtime_param, descriptor.annotation, descriptor.parameter_info)
            parameter.get_runtime_param = partial(_itself, plain)


def _itself(plain: PlainValues) -> PlainValues:
    return plain
