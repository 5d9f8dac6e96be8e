"""Reads dataclasses from the JSON objects of reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, TypeVar

from fastvlm_mlx.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    _T = TypeVar("_T", bound=DataclassInstance)


def record(kind: type[_T], values: Mapping[str, Any], **converted: Any) -> _T:
    """Builds a dataclass from a JSON object; keys that are not fields of it are ignored, absent ones have defaults.

    Args:
        kind: The dataclass.
        values: The JSON object.
        converted: Fields whose JSON values are not the field's type, already converted.

    Raises:
        ConfigError: If a field without a default is missing.
    """
    known = {field.name: values[field.name] for field in fields(kind) if field.name in values} | converted
    missing = [field.name for field in fields(kind) if field.name not in known and field.default is MISSING]
    if missing:
        raise ConfigError(f"the report is damaged: {kind.__name__.lower()} without {', '.join(missing)}")
    return kind(**known)
