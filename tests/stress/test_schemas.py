"""A share of the run over random schemas; `make stress` runs more."""

import pytest

pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

from fastvlm_mlx import load
from tests.stress import schemas


def test_answers_to_random_schemas_are_valid_or_cut() -> None:
    counts = schemas.check(*load("demo"), schemas.requests(12, seed=1))
    assert counts["whole"] + counts["cut"] == 12
    assert counts["whole"] >= 6
