"""The samples and the table of `benchmarks/pictures.py`, of small pictures."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import pictures

    yield pictures
    for name in ("pictures", "recording", "peers"):
        sys.modules.pop(name, None)


def test_every_picture_has_a_row(script, monkeypatch: pytest.MonkeyPatch) -> None:
    images = script.Images
    monkeypatch.setattr(script, "Images", lambda megapixels: images(megapixels=megapixels / 100))
    monkeypatch.setattr(script, "find_spec", lambda name: None)  # without pillow-heif
    samples = script.measure(2)
    assert {step: len(times) for step, times in samples["JPEG, 12 megapixels, sideways"].items()} == {
        "decode": 2,
        "256": 2,
        "512": 2,
        "1024": 2,
    }
    values = {"conditions": script.conditions().to_dict(), "runs": 2, "cores": 2, "samples": samples}
    lines = next(iter(script.table(values))).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(samples)
