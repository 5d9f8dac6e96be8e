"""`fastvlm convert` and `fastvlm quantize`: options that would change nothing, and what is said beforehand."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fastvlm_mlx.cli import app, options
from fastvlm_mlx.convert.compare.gates import METRICS
from tests.checkpoints import APPLE

SOURCE = str(APPLE / "reparam")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("command", "arguments", "option"),
    [
        ("quantize", ["-d", "--q-bits", "4"], "--q-bits"),
        ("quantize", ["-d", "--q-preset", "int8"], "--q-preset"),
        ("quantize", ["-d", "--q-vision", "none"], "--q-vision"),
        ("quantize", ["-d", "--q-method", "gptq"], "--q-method"),
        ("quantize", ["-d", "--target-bpw", "4.5"], "--target-bpw"),
        ("quantize", ["-d", "--gate", "top1>=0.9"], "--gate"),
        ("quantize", ["-d", "--json"], "--json"),
        ("convert", ["--gate", "top1>=0.9"], "--gate"),
        ("convert", ["--gate", "top1>=0.9", "--dry-run"], "--gate"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    tmp_path: Path, command: str, arguments: list[str], option: str
) -> None:
    result = invoke(command, SOURCE, str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2
    assert f"Invalid value for {option}: would change nothing" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--revision", "main"], "is on this disk, where revision 'main' would change nothing", 1),
        (["--dtype", "float32", "--calibration", str(APPLE / "images")], "float32 needs no scaling, and nothing is", 1),
        (
            ["--q-bits", "4", *(f"--q-{part}=8" for part in ("decoder", "embed", "projector", "vision"))],
            "so bits 4 would",
            2,
        ),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_so_is_one_that_would_change_nothing_for_this_source(
    tmp_path: Path, arguments: list[str], message: str, code: int, dry: list[str]
) -> None:
    result = invoke("convert", SOURCE, str(tmp_path / "out"), *arguments, *dry)
    assert result.exit_code == code
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_revision_of_a_folder_is_refused_by_every_command(tmp_path: Path) -> None:
    for arguments in (["quantize", "demo", str(tmp_path / "out")], ["info", "demo"]):
        result = invoke(*arguments, "--revision", "abc")
        assert result.exit_code == 1
        assert result.stderr.startswith("error: demo: is on this disk, where revision 'abc' would change nothing")


def test_a_dry_run_plans_quantization_and_upload_too() -> None:
    result = invoke("convert", SOURCE, "--dry-run", "--q-bits", "4", "--q-group-size", "32", "--upload-repo", "me/x")
    assert result.exit_code == 0
    *_, quantize, first, last, upload = result.stdout.splitlines()
    assert quantize == "then quantize 4 bits, groups of 32, rtn: 36 of 42 layers, 356 kB in all"
    assert first.startswith("              in floating point (16 inputs, which groups of 32 do not divide): ")
    assert last.startswith("              in floating point (8 inputs, which groups of 32 do not divide): ")
    assert upload == "then upload   to me/x"


def test_help_lists_the_metrics_of_gates_and_says_what_takes_minutes() -> None:
    assert options.METRICS == METRICS
    for command in ("convert", "quantize"):
        text = " ".join(invoke(command, "--help").stdout.split())
        assert ", ".join(METRICS) in text
        assert "auto measures what each layer is worth, which takes minutes" in text
        assert "gptq compensates for rounding errors, which takes minutes" in text


def test_what_takes_minutes_is_said_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastvlm_mlx.convert.pipeline.convert_and_quantize", work)
    slow = invoke("convert", SOURCE, str(tmp_path / "out"), "--target-bpw", "4.5", "--q-method", "gptq")
    assert slow.exit_code == 130
    assert slow.stderr.splitlines()[0] == (
        "auto measures every layer by itself and gptq calibrates layer after layer: this takes minutes at full size"
    )
    assert "minutes" not in invoke("convert", SOURCE, str(tmp_path / "out"), "-q").stderr
