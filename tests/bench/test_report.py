import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx.bench.report import Report, compare_reports, different_conditions, read_report
from fastvlm_mlx.bench.statistics import Metric
from fastvlm_mlx.errors import ConfigError
from tests.checkpoints import TESTS
from tests.reports import make_report, make_row

RESULTS = TESTS.parent / "benchmarks" / "results"


def test_a_report_survives_the_way_to_disk_and_back(tmp_path: Path) -> None:
    report = make_report(make_row(1.0), make_row(2.0, resolution="auto", pixels=512))
    (tmp_path / "a.json").write_text(json.dumps(report.to_dict()))
    assert read_report(tmp_path / "a.json") == report


@pytest.mark.parametrize("path", sorted(RESULTS.glob("bench-*.json")), ids=lambda path: path.name)
def test_committed_reports_are_read_without_loss(path: Path) -> None:
    values = json.loads(path.read_text())
    values["rows"] = [{"megapixels": 1.2, "form": "JPEG", **row} for row in values["rows"]]  # older ones do not say so
    assert Report.from_dict(values).to_dict() == values


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"rows": None}, "the report is damaged: 'NoneType' object is not iterable"),
        (
            {"settings": {"runs": 3}},
            "the report is damaged: settings without prompt, image_sha256, warmup",
        ),
        ({"conditions": {}}, "the report is damaged: machine without device, chip"),
        ({"conditions": []}, "the report is damaged: machine without device, chip"),
        ({"fastvlm_bench": 2}, "not a report of `fastvlm bench --json` in format 1"),
    ],
)
def test_a_damaged_report_is_refused(damage: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Report.from_dict(make_report().to_dict() | damage)


def test_a_metric_without_samples_is_refused() -> None:
    values = make_report().to_dict()
    values["rows"][0]["metrics"]["vision"]["samples"] = []
    with pytest.raises(ConfigError, match="a metric has no samples"):
        Report.from_dict(values)


def test_comparison_tells_what_was_not_the_same() -> None:
    first, second = make_report(), make_report(make_row(model="7b"), runs=5, chip="Apple M9")
    assert list(different_conditions(first, second)) == [
        "model: '0.5b', '7b'",
        "chip: Apple M0, Apple M9",
        "runs: 3, 5",
    ]


def test_other_weights_of_the_same_name_are_told() -> None:
    first, second = (make_report(make_row(model="int4", weights_sha256=64 * digit)) for digit in "ab")
    assert list(different_conditions(first, second)) == ["weights of 'int4': aaaaaaaaaaaa, bbbbbbbbbbbb"]


def test_memory_counts_as_the_same_within_one_per_cent() -> None:
    first = make_report(memory=16_000_000_000)
    assert list(different_conditions(first, make_report(memory=16_000_012_000))) == []
    assert list(different_conditions(first, make_report(memory=17_000_000_000))) == ["memory: 16000000000, 17000000000"]


def test_reports_without_a_common_row_are_not_compared() -> None:
    with pytest.raises(ConfigError, match="no row in common"):
        compare_reports(make_report(), make_report(make_row(resolution=512, pixels=512)))


def test_single_models_are_compared_whatever_their_names_and_several_by_name() -> None:
    renamed = make_row(2.0, model="another folder")
    changes = compare_reports(make_report(), make_report(renamed))
    assert [(change.metric, change.slower) for change in changes] == [("wall_ttft", 1.0), ("decode_rate", 0.0)]
    several = compare_reports(make_report(make_row()), make_report(make_row(), renamed))
    assert [change.slower for change in several] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([1.0, 1.01, 0.99, 1.0, 1.02], [1.08, 1.09, 1.07, 1.1, 1.08], "slower"),
        ([1.08, 1.09, 1.07, 1.1, 1.08], [1.0, 1.01, 0.99, 1.0, 1.02], "faster"),
        ([1.0, 1.3, 0.9, 1.1, 1.2], [1.2, 1.0, 1.4, 1.3, 1.1], "noise"),
        ([1.0, 1.3, 0.9, 1.1, 1.2], [1.1, 1.2, 1.0, 0.9, 1.3], ""),
        ([1.0], [1.08], "slower"),
    ],
)
def test_a_change_counts_if_the_scatter_of_the_samples_does_not_explain_it(
    before: list[float], after: list[float], verdict: str
) -> None:
    def report(samples: list[float]) -> Report:
        return make_report(make_row(metrics={"wall_ttft": Metric(unit="s", samples=tuple(samples))}))

    (change,) = compare_reports(report(before), report(after))
    assert change.verdict(0.05) == verdict
    assert change.low <= change.slower <= change.high


def test_a_lower_rate_is_slower_with_the_interval_on_the_same_side() -> None:
    *_, rate = compare_reports(make_report(make_row(rate=10.0)), make_report(make_row(rate=8.0)))
    assert (rate.slower, rate.low, rate.high) == (0.25, 0.25, 0.25)


def test_another_load_is_told() -> None:
    first, second = make_report(), make_report()
    busy = replace(second, conditions=replace(second.conditions, load_average=(3.5, 1.0, 1.0)))
    assert list(different_conditions(first, busy)) == ["load_average: [0.0, 0.0, 0.0], [3.5, 1.0, 1.0]"]
    idle = replace(second, conditions=replace(second.conditions, load_average=(0.9, 0.0, 0.0)))
    assert list(different_conditions(first, idle)) == []


def test_changes_are_sorted_by_resolution() -> None:
    rows = [make_row(resolution=side, pixels=side) for side in (1024, 256, 512)]
    changes = compare_reports(make_report(*rows), make_report(*rows))
    assert [change.row for change in changes[::2]] == [f"0.5b, float16, {side} px" for side in (256, 512, 1024)]
