"""Reads dataclasses from the JSON objects of reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from fastvlm_mlx.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    _T = TypeVar("_T", bound=DataclassInstance)


def record(kind: type[_T], values: Mapping[str, Any], **converted: Any) -> _T:
    """Builds a dataclass from a JSON object; keys that are not fields of it are ignored.

    Args:
        kind: The dataclass.
        values: The JSON object.
        converted: Fields whose JSON values are not the field's type, already converted.

    Raises:
        ConfigError: If a field is missing.
    """
    missing = [field.name for field in fields(kind) if field.name not in values and field.name not in converted]
    if missing:
        raise ConfigError(f"the report is damaged: {kind.__name__.lower()} without {', '.join(missing)}")
    return kind(**{field.name: values.get(field.name) for field in fields(kind)} | converted)
