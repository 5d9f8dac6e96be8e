"""The samples and the table of `benchmarks/structured.py`; what it measures takes minutes."""

import argparse
import sys
from pathlib import Path

import pytest

pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def structured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # it runs as a script, beside the others
    import structured

    yield structured
    for name in ("structured", "peers"):
        sys.modules.pop(name)


def test_every_measurement_gives_samples_and_a_table(structured) -> None:
    options = argparse.Namespace(resolution=64, rows=[1, 2], steps=2, runs=1)
    candidate = structured.Candidate.load("demo")
    measured = structured.measure(candidate, options)
    steps, processor, masks, _ = measured
    assert processor.keys() == steps.keys()
    assert {kind: {rows: len(samples) for rows, samples in each.items()} for kind, each in steps.items()} == {
        kind: {"1": 1, "2": 1} for kind in ("free", "one", "all")
    }
    assert len(masks) == 2 * (options.steps + 2)
    text = "\n".join(structured.table(structured.report(candidate, options, structured.conditions(), measured)))
    assert "ms a step, every row has one" in text
    assert "ms of processor time, one row has one" in text
