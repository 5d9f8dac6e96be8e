import pytest

from fastvlm_mlx.bench import report
from fastvlm_mlx.errors import ConfigError
from tests.reports import make_report


def test_comparison_tells_what_was_not_the_same() -> None:
    first, second = make_report(1.0), make_report(1.0)
    second["conditions"]["chip"] = "Apple M9"
    second["settings"]["runs"] = 5
    assert list(report.different_conditions(first, second)) == ["chip: Apple M0, Apple M9", "runs: 3, 5"]


def test_reports_without_a_common_row_are_not_compared() -> None:
    with pytest.raises(ConfigError, match="no row in common"):
        report.compare_reports(make_report(1.0), make_report(1.0, resolution=512, pixels=512))
    renamed = report.compare_reports(make_report(1.0), make_report(1.0, model="another folder"))
    assert [change.slower for change in renamed] == [0.0, 0.0]
