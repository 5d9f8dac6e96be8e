"""The command line of `benchmarks/quantization.py`; what it measures takes minutes."""

import sys
from pathlib import Path

import pytest

from benchmarks import quantization


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: source"),
        (["a"], "the folder for the quantized checkpoints is missing"),
        (["a", "."], "int8 exists already; remove it or choose another folder, so that all is measured"),
    ],
)
def test_wrong_usage_prints_the_usage(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "int8").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quantization.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        quantization.main()
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("usage: quantization.py SOURCE WORK")
    assert message in errors
