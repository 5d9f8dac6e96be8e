import math

import pytest

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.jobs.scores import Answer, EvaluationReport, Share


def test_wilson_interval_matches_the_published_example() -> None:
    # 15 of 148 (Newcombe 1998, table I, method 3): 0.0624 to 0.1605.
    share = Share.of([1.0] * 15 + [0.0] * 133)
    assert (share.low, share.high) == (pytest.approx(0.0624, abs=1e-4), pytest.approx(0.1605, abs=1e-4))
    assert Share.of([1.0] * 20).high == 1
    for n in range(1, 300):
        for score in (0.0, 1.0):
            share = Share.of([score] * n)
            assert share.low <= share.score <= share.high


def report(*predictions: str | None) -> EvaluationReport:
    return EvaluationReport(
        metric="exact",
        answers=tuple(
            Answer(line=i, kind="k", prediction=p, score=float(p == "cat"), error="gone" if p is None else None)
            for i, p in enumerate(predictions)
        ),
    )


def test_comparison_is_paired() -> None:
    comparison = report("cat", "cat", "dog", "Cow", None).against(report("cat", "dog", "cat", "cow", None))
    assert comparison.agreement.score == 0.6
    assert (comparison.difference, comparison.won, comparison.lost) == (0, 1, 1)
    # Differences 0, 1, -1, 0, 0: standard error sqrt(0.5 / 5).
    assert comparison.high == pytest.approx(1.96 * math.sqrt(0.1), rel=1e-3)
    assert comparison.low == -comparison.high


def test_reports_on_different_rows_cannot_be_compared() -> None:
    with pytest.raises(ConfigError, match="only on the same questions and metric"):
        report("cat").against(report("cat", "dog"))
