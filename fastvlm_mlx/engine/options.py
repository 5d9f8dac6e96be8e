"""How an answer is generated: the settings of one row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, TypedDict

from fastvlm_mlx.errors import ConfigError, PromptError


class GenerationOptions(TypedDict, total=False):
    """The fields of `GenerationConfig` as keyword arguments."""

    max_tokens: int
    temperature: float
    top_p: float
    min_p: float
    top_k: int
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    ignore_eos: bool


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How an answer is generated.

    The filters act on the distribution before the temperature does, in the order of the fields, as mlx-lm's do.

        generate(model, processor, image="photo.jpg", config=GenerationConfig(max_tokens=64, temperature=0.7, seed=1))
        generate(model, processor, image="photo.jpg", max_tokens=64, temperature=0.7, seed=1)  # the same

    Attributes:
        max_tokens: The most tokens of the answer; less where the context ends before.
        temperature: 0 takes the most probable token.
        top_p: Keep the most probable tokens up to this total probability; 1 keeps all.
        min_p: Keep tokens at least this fraction as probable as the most probable one; 0 keeps all.
        top_k: Keep this many tokens; 0 keeps all.
        repetition_penalty: Divide positive and multiply negative logits of every token seen in prompt or answer; 1 is
            off.
        seed: Makes sampling repeatable; None draws one.
        stop: Strings that end the answer and are not part of it.
        ignore_eos: Whether to go on after an end token, for measurements.

    Raises:
        ConfigError: If a value is out of range.
        PromptError: If a stop string is empty.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Rejects values that mean nothing; `stop` becomes a tuple."""
        bounds = {
            "max_tokens": (_is_int(self.max_tokens) and self.max_tokens >= 1, "at least 1"),
            "temperature": (_is_number(self.temperature) and 0.0 <= self.temperature < math.inf, "at least 0"),
            "top_p": (_is_number(self.top_p) and 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            "min_p": (_is_number(self.min_p) and 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            "top_k": (_is_int(self.top_k) and self.top_k >= 0, "at least 0"),
            "repetition_penalty": (
                _is_number(self.repetition_penalty) and 0.0 < self.repetition_penalty < math.inf,
                "above 0",
            ),
            "seed": (self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**64), "from 0 to 2**64 - 1"),
        }
        for name, (allowed, rule) in bounds.items():
            if not allowed:
                raise ConfigError(f"{name} must be {rule}, not {getattr(self, name)!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) for text in stop):
            raise ConfigError(f"stop must be strings, not {stop!r}")
        if not all(stop):
            raise PromptError("a stop string is empty; every answer would end at once")
        object.__setattr__(self, "stop", stop)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return tuple(self.stop)

    @classmethod
    def of(cls, config: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig:
        """`config`, by default the defaults, with `options` in the place of its fields; an option of None changes none.

        Raises:
            TypeError: If an option is no field.
        """
        return replace(config or cls(), **{name: value for name, value in options.items() if value is not None})


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
