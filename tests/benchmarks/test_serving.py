"""The clients and the tables of `benchmarks/serving.py`; what it measures takes minutes."""

import argparse
import io
import sys
from pathlib import Path

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # it runs as a script, beside the others
    import serving

    yield serving
    for name in ("serving", "peers"):
        sys.modules.pop(name)


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (number, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def test_every_measurement_gives_samples_and_a_table(serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "Images", lambda: picture)  # large ones take long to draw
    names = {"resolution": 64, "max_tokens": 40, "clients": 3, "alone": 1, "firsts": 1, "runs": 1}
    options = argparse.Namespace(**names)
    candidate = serving.Candidate.load("demo")
    samples = serving.measure(candidate, options)
    assert {name: len(values) for name, values in vars(samples).items()} == dict.fromkeys(vars(samples), 1)
    assert all(values[0] > 0 for values in vars(samples).values())
    values = serving.report(candidate, options, serving.conditions(), samples)
    text = "\n".join(serving.table(values))
    assert "| 3 clients at once |" in text
    assert "demo, float32, 64 px, answers of 40 tokens" in text
