"""The settings of a conversation that `/set` changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.colours import parse_colour
from fastvlm_mlx.inputs.resolution import Resolution, as_resolution

_CONFIG = (
    "max_tokens temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty seed stop".split()
)
NAMES = (*_CONFIG, "resolution", "background")
"""The names of the settings."""
_ALIASES = {"temp": "temperature"}
_DEFAULTS = ("default", "none", "")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How answers are chosen and pictures are shown.

    Attributes:
        config: How tokens are chosen.
        resolution: Side in pixels.
        background: Colour under transparent pixels.
    """

    config: GenerationConfig = field(default_factory=GenerationConfig)
    resolution: Resolution = None
    background: str | None = None

    def get(self, name: str) -> Any:
        """A setting by its name."""
        return getattr(self, name) if name in ("resolution", "background") else getattr(self.config, name)

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        defaults = Settings()
        values = {name: self.get(name) for name in NAMES if self.get(name) != defaults.get(name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def with_text(self, name: str, text: str) -> Settings:
        """The settings with one of them as a person writes it; `default` takes a change back.

        Raises:
            FastVLMError: If there is no such setting, or it cannot have this value.
        """
        name = _ALIASES.get(name, name).replace("-", "_")
        if name not in NAMES:
            raise ConfigError(f"there is no setting {printable(name, 40)}; there are {', '.join(NAMES)}")
        if text.lower() in _DEFAULTS:
            return self.with_value(name, Settings().get(name))
        return self.with_value(name, text if name in ("stop", "background") else _number(text))

    def with_value(self, name: str, value: Any) -> Settings:
        """The settings with another value for one of them.

        Raises:
            FastVLMError: If it cannot have this value.
        """
        if name == "resolution":
            return replace(self, resolution=None if value is None else as_resolution(value))
        if name == "background":
            if value is not None:
                parse_colour(value)
            return replace(self, background=value)
        return replace(self, config=replace(self.config, **{name: value}))

    def with_values(self, values: Mapping[str, Any]) -> Settings:
        """The settings with those of `values` whose names are known.

        Raises:
            FastVLMError: If one cannot have its value.
        """
        changed = self
        for name in NAMES:
            if values.get(name) is not None:
                changed = changed.with_value(name, values[name])
        return changed


def _number(text: str) -> int | float | str:
    """The number that a text is; the text itself if it is none."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
