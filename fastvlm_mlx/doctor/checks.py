"""A check's result, and the examination that goes on when a part of it cannot run."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fastvlm_mlx.errors import FastVLMError

Notify = Callable[[str], None]
"""Called with the name of a step before it runs."""

FAILURES = (FastVLMError, RuntimeError, MemoryError, OSError, ValueError)
"""What a step can end with on a machine that lacks something; MLX raises RuntimeError and ValueError."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        part: `environment`, `answers`, `agreement` or `speed`.
        name: What was looked at; of a part of the model its path.
        value: What was found.
        limit: The most that `value` may be; None where the limit is no number or there is none.
        reason: Why the limit is this one, or what to do.
        ok: Whether the value is right; None where it is only information.
        precision: The dtype of the computation, where it matters.
    """

    part: str
    name: str
    value: float | str
    limit: float | None = None
    reason: str = ""
    ok: bool | None = None
    precision: str = ""

    @property
    def key(self) -> str:
        """Its name in the file of reference figures."""
        return f"{self.precision} {self.name}".strip()

    @classmethod
    def below(cls, part: str, name: str, value: float, limit: float, reason: str, precision: str = "") -> "Check":
        """A check of a number that must not exceed `limit`; NaN does."""
        ok = value <= limit
        return cls(part=part, name=name, value=value, limit=limit, reason=reason, ok=ok, precision=precision)


@dataclass(frozen=True, kw_only=True)
class Undone:
    """A step that did not run to its end, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Step:
    """Some checks that need the same things.

    Attributes:
        name: For the reader who waits.
        run: Yields the checks as they are done.
    """

    name: str
    run: Callable[[], Iterable[Check]]


class Examination:
    """The results of the steps so far; they are there even if a step fails or the run is interrupted.

    Attributes:
        checks: In the order in which they were made.
        undone: Steps that did not run to their end.
    """

    def __init__(self) -> None:
        self.checks: list[Check] = []
        self.undone: list[Undone] = []

    @property
    def wrong(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.ok is False]

    def run(self, steps: Sequence[Step], notify: Notify = lambda name: None) -> None:
        """Runs the steps in order; what ends one of them is noted, and the next one runs."""
        waiting = list(steps)
        try:
            while waiting:
                step = waiting[0]
                notify(step.name)
                try:
                    for check in step.run():
                        self.checks.append(check)
                except FAILURES as err:
                    self.undone.append(Undone(name=step.name, reason=str(err) or type(err).__name__))
                waiting.pop(0)
        finally:
            self.undone += [Undone(name=step.name, reason="interrupted") for step in waiting]
