"""How an answer is generated: the settings of one row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

from fastvlm_mlx.arguments import as_real, as_whole, check_kind, flag, items, valid_text
from fastvlm_mlx.errors import ConfigError, PromptError
from fastvlm_mlx.schema import shown

MOST_LOGPROBS = 20
"""The most alternatives that are reported for a token."""

_REALS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class GenerationOptions(TypedDict, total=False):
    """The fields of `GenerationConfig` as keyword arguments; None is the default."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    min_p: float | None
    top_k: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None
    logprobs: int | None
    seed: int | None
    stop: str | Sequence[str] | None
    ignore_eos: bool | None


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How an answer is generated.

    `logit_bias` acts first, then the penalties, then the filters in the order of the fields, and the temperature last.

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
        presence_penalty: Subtracted from the logit of every token that the answer holds, from -2 to 2.
        frequency_penalty: The same, as often as the answer holds the token.
        logit_bias: What to add to the logits of tokens, from -100 to 100 by token id: a mapping, or pairs; it becomes
            pairs. Ids may be texts, as in JSON.
        logprobs: How many of the most probable tokens to report with each token of the answer, from 0 to 20; None
            reports nothing. See `GenerationResult.logprobs`.
        seed: Makes sampling repeatable; None draws one.
        stop: Strings that end the answer and are not part of it.
        ignore_eos: Whether to go on after an end token, for measurements.

    Raises:
        ConfigError: If a value is out of range or of the wrong kind.
        PromptError: If a stop string is empty.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    logprobs: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Rejects values that mean nothing; None becomes the default, `stop` and `logit_bias` tuples."""
        for each in fields(self):
            if getattr(self, each.name) is None:
                object.__setattr__(self, each.name, each.default)
        wholes = {name: as_whole(getattr(self, name)) for name in ("max_tokens", "top_k", "logprobs", "seed")}
        reals = {name: as_real(getattr(self, name)) for name in _REALS}
        max_tokens, top_k, logprobs, seed = wholes.values()
        rules = {
            "max_tokens": (max_tokens is not None and max_tokens >= 1, "at least 1"),
            "temperature": (0.0 <= reals["temperature"] < math.inf, "at least 0"),
            "top_p": (0.0 < reals["top_p"] <= 1.0, "above 0 and at most 1"),
            "min_p": (0.0 <= reals["min_p"] <= 1.0, "between 0 and 1"),
            "top_k": (top_k is not None and top_k >= 0, "at least 0"),
            "repetition_penalty": (0.0 < reals["repetition_penalty"] < math.inf, "above 0"),
            "presence_penalty": (-2.0 <= reals["presence_penalty"] <= 2.0, "between -2 and 2"),
            "frequency_penalty": (-2.0 <= reals["frequency_penalty"] <= 2.0, "between -2 and 2"),
            "logprobs": (
                self.logprobs is None or (logprobs is not None and 0 <= logprobs <= MOST_LOGPROBS),
                f"from 0 to {MOST_LOGPROBS}",
            ),
            "seed": (self.seed is None or (seed is not None and 0 <= seed < 2**64), "from 0 to 2**64 - 1"),
        }
        for name, (allowed, rule) in rules.items():
            if not allowed:
                raise ConfigError(f"{name} must be {rule}, not {shown(getattr(self, name))}")
        strings = [self.stop] if isinstance(self.stop, str) else items(self.stop, "stop", "strings")
        if not all(isinstance(string, str) for string in strings):
            raise ConfigError(f"stop must be strings, not {shown(self.stop)}")
        if not all(strings):
            raise PromptError("a stop string is empty; every answer would end at once")
        stop = tuple(str(valid_text(string, "a stop string")) for string in strings)
        others = {
            "stop": stop,
            "logit_bias": _biases(self.logit_bias),
            "ignore_eos": flag(self.ignore_eos, "ignore_eos"),
        }
        for name, value in {**wholes, **reals, **others}.items():
            object.__setattr__(self, name, value)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return tuple(self.stop)

    @property
    def biases(self) -> dict[int, float]:
        """`logit_bias` by token id."""
        return dict(self.logit_bias)

    def check_vocabulary(self, size: int) -> None:
        """Checks the token ids of `logit_bias`.

        Raises:
            ConfigError: If one is outside a vocabulary of this size.
        """
        for token in self.biases:
            if token >= size:
                raise ConfigError(f"logit_bias has token id {shown(token)}, outside the vocabulary of {size}")

    @classmethod
    def of(cls, config: GenerationConfig | None, options: Mapping[str, Any]) -> GenerationConfig:
        """`config`, by default the defaults, with `options` in the place of its fields; an option of None changes none.

        Raises:
            ConfigError: If `config` is no `GenerationConfig`, or a value is out of range.
            TypeError: If an option is no field.
        """
        config = cls() if config is None else config
        check_kind(config, "config", GenerationConfig, "a GenerationConfig")
        known = [each.name for each in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise TypeError(f"got an unexpected keyword argument {unknown[0]!r}; the options are {', '.join(known)}")
        return replace(config, **{name: value for name, value in options.items() if value is not None})


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    """The pairs of token ids and biases that `logit_bias` may be, in the order of the ids.

    Raises:
        ConfigError: If it is something else.
    """
    expected = "token ids and numbers from -100 to 100"
    value = list(value.items()) if isinstance(value, Mapping) else value
    pairs = items(value, "logit_bias", f"a mapping of {expected}")
    biases: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ConfigError(f"logit_bias must be pairs of {expected}, not {shown(pair)}")
        key, bias = pair[0], as_real(pair[1])
        is_text = isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10
        token = int(key) if is_text else as_whole(key)
        if token is None or token < 0:
            raise ConfigError(f"logit_bias must map token ids to numbers, not {shown(key)}")
        if not -100.0 <= bias <= 100.0:
            raise ConfigError(f"logit_bias of token {token} must be between -100 and 100, not {shown(pair[1])}")
        biases[token] = bias
    return tuple(sorted(biases.items()))
