from fastvlm_mlx.bench.measure import PHASES
from fastvlm_mlx.bench.statistics import Metric
from fastvlm_mlx.bench.tables import text
from tests.reports import make_report, make_row

SECONDS = {name: Metric(unit="s", samples=(12.3456,)) for name in ("wall_ttft", "cold_ttft", "paper_ttft", *PHASES)}
METRICS = {**SECONDS, "decode_rate": Metric(unit="tokens/s", samples=(123.4,))}


def test_a_table_of_everything_is_at_most_80_columns_wide() -> None:
    rows = [make_row(model="FastVLM-0.5B-4bit", resolution="auto", metrics=METRICS), make_row(metrics=METRICS)]
    lines = text(make_report(*rows)).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "FastVLM-0.5B-4bit, float16: medians of 3 runs, times in ms"
    shown = " ".join(lines)
    for title in ("wall TTFT", "p90", "cold TTFT", "paper TTFT", "tokens/s", "peak GB", "load", "first token"):
        assert shown.count(title) == 2
    assert sum(line.startswith("auto: 1024  ") for line in lines) == 3
    assert sum(line.startswith("1024  ") for line in lines) == 3


def test_a_usual_table_has_two_parts() -> None:
    metrics = {name: metric for name, metric in METRICS.items() if name != "cold_ttft"}
    first, second = text(make_report(make_row(metrics=metrics))).split("\n\n")
    assert first.splitlines()[1].endswith("paper TTFT  tokens/s  peak GB")
    assert second.splitlines()[0].split()[:3] == ["px", "load", "decode"]
