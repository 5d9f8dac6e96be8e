"""What an answer has to follow, token by token. Shapes: B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.backend import mx


class Constraint(Protocol):
    """Follows the tokens of one answer.

    Attributes:
        allowed: (V,), the tokens that may follow; at least one.
        complete: Whether nothing may follow but an end token.
    """

    allowed: NDArray[np.bool_]
    complete: bool

    def advance(self, token: int) -> None:
        """Goes on behind a token, which was allowed."""


def masked(logits: mx.array, constraints: Sequence[Constraint | None]) -> mx.array:
    """Logits (B, V) with -inf for the tokens that the constraint of a row does not allow."""
    if all(constraint is None for constraint in constraints):
        return logits
    allowed = np.ones(logits.shape, dtype=np.bool_)
    for row, constraint in enumerate(constraints):
        if constraint is not None:
            allowed[row] = constraint.allowed
    return mx.where(mx.array(allowed), logits, -mx.inf)
