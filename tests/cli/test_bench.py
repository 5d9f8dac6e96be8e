import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fastvlm_mlx.bench import measure as bench
from fastvlm_mlx.bench.candidate import Candidate
from fastvlm_mlx.bench.report import Row
from fastvlm_mlx.bench.statistics import Metric
from fastvlm_mlx.cli import app
from fastvlm_mlx.errors import CheckpointError
from tests.checkpoints import APPLE
from tests.reports import make_report, make_row


def written(folder: Path, name: str, *rows: Row) -> str:
    path = folder / name
    path.write_text(json.dumps(make_report(*rows).to_dict()))
    return str(path)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_the_command_measures_a_checkpoint_warm_and_cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    files = {name: str(tmp_path / f"report.{name}") for name in ("json", "csv", "svg")}
    result = invoke(
        *("-m", str(APPLE / "reparam"), "-r", "auto", "--runs", "1", "--warmup", "0", "-n", "2"),
        *("--image", str(APPLE / "images" / "square.png"), "--cold", "--markdown"),
        *("--json", files["json"], "--csv", files["csv"], "--plot", files["svg"]),
    )
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("| ") for line in lines)
    assert "cold TTFT" in lines[0]
    assert "auto: 128" in lines[2]
    written_report = json.loads(Path(files["json"]).read_text())
    (row,) = written_report["rows"]
    assert (row["resolution"], row["pixels"]) == ("auto", 128)
    assert len(row["weights_sha256"]) == 64
    assert row["metrics"]["cold_ttft"]["median"] > row["metrics"]["wall_ttft"]["median"]
    assert row["metrics"]["load"]["n"] == 1
    assert written_report["settings"]["image_sha256"]
    assert written_report["conditions"]["chip"]
    assert str(tmp_path) not in Path(files["json"]).read_text()
    assert "cold_ttft,s,1," in Path(files["csv"]).read_text()
    assert "wall TTFT, measured whole" in Path(files["svg"]).read_text()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that the command has loaded; each measurement of one is made up."""
    names: list[str] = []

    def load(name: str, **_: Any) -> SimpleNamespace:
        names.append(name)
        return SimpleNamespace(name=name)

    monkeypatch.setattr(Candidate, "load", load)
    monkeypatch.setattr(bench, "measure", lambda *_, **__: make_row())
    return names


@pytest.mark.parametrize(("option", "name"), [("--json", "x.json"), ("--csv", "x.csv"), ("--plot", "x.svg")])
def test_a_report_that_cannot_be_written_is_refused_before_the_measurement(
    tmp_path: Path, measured: list[str], option: str, name: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder" / name).mkdir(parents=True)
    for folder, reason in (
        ("missing", "No such file or directory"),
        ("file", "Not a directory"),
        ("folder", "Is a directory"),
    ):
        path = tmp_path / folder / name
        result = invoke("-m", "demo", option, str(path))
        assert (result.exit_code, result.stderr) == (1, f"error: {path}: cannot be written ({reason})\n")
    assert measured == []


def test_a_path_without_a_name_is_no_file_for_a_report(measured: list[str]) -> None:
    result = invoke("-m", "demo", "--json", "/")
    assert (result.exit_code, result.stderr, measured) == (1, "error: /: cannot be written (Is a directory)\n", [])


def test_a_report_stays_until_there_is_a_new_one(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"--json": "x.json", "--csv": "x.csv", "--plot": "x.svg"}
    for name in files.values():
        (tmp_path / name).write_text("earlier")
    (tmp_path / "linked.json").symlink_to("x.json")
    files["--json"] = "linked.json"
    arguments = ["-m", "demo", *(part for option, name in files.items() for part in (option, str(tmp_path / name)))]

    def fail(*_: Any, **__: Any) -> None:
        raise CheckpointError("damaged")

    with monkeypatch.context() as patch:
        patch.setattr(bench, "measure", fail)
        assert invoke(*arguments).stderr == "error: damaged\n"
    assert all((tmp_path / name).read_text() == "earlier" for name in files.values())
    assert invoke(*arguments).exit_code == 0
    assert measured == ["demo", "demo"]
    assert not any((tmp_path / name).read_text() == "earlier" for name in files.values())
    assert (tmp_path / "linked.json").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linked.json", "x.csv", "x.json", "x.svg"]


def test_the_table_is_printed_whatever_becomes_of_the_report(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        result = invoke("-m", "demo", "--json", str(tmp_path / "x.json"))
    assert result.exit_code == 1
    assert "1000" in result.stdout
    assert result.stderr == f"error: {tmp_path / 'x.json'}: cannot be written (No space left on device)\n"
    assert list(tmp_path.iterdir()) == []


def test_one_report_that_cannot_be_written_does_not_take_the_others_with_it(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def refusing(source: Path, target: str) -> None:
        if target.endswith(".json"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", refusing)
    result = invoke("-m", "demo", "--json", str(tmp_path / "x.json"), "--csv", str(tmp_path / "x.csv"))
    assert result.exit_code == 1
    assert result.stderr == f"error: {tmp_path / 'x.json'}: cannot be written (No space left on device)\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


def test_a_report_may_go_to_stdout_and_the_table_then_goes_to_stderr(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("-m", "demo", "--json", "-")
    assert json.loads(result.stdout)["rows"][0]["model"] == "0.5b"
    assert result.stderr.startswith("0.5b, float16: medians of 10 runs, times in ms\n")
    assert invoke("-m", "demo", "--csv", "-").stdout.startswith(
        "model,precision,resolution,pixels,megapixels,format,metric,unit,run"
    )
    assert invoke("-m", "demo", "--csv", "-", "--json", "-").exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_models_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unused: Any = None
    candidate = Candidate(name="int4", model=unused, processor=unused)
    monkeypatch.setattr(Candidate, "load", lambda *_, **__: candidate)
    monkeypatch.setattr("fastvlm_mlx.resolve.check_names", lambda _: None)  # neither is on disk or on the Hub
    monkeypatch.setattr(bench, "measure", lambda candidate, **_: make_row(model=candidate.name))
    assert invoke("-m", "a/int4", "-m", "b/int4", "--json", str(tmp_path / "x.json")).exit_code == 0
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["int4", "int4 (2)"]


def test_images_of_several_sizes_have_a_row_each(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_, images, **__: make_row(megapixels=images.megapixels))
    lines = invoke("-m", "demo", "--megapixels", "1.2", "--megapixels", "12", "--markdown").stdout.splitlines()
    assert [line.split("|")[4].strip() for line in lines if "0.5b" in line] == ["1.2", "12"]
    assert "megapixels" not in invoke("-m", "demo").stdout


def test_images_of_several_formats_have_a_row_each(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench, "measure", lambda *_, images, **__: make_row(megapixels=images.megapixels, form=images.form)
    )
    options = ("-m", "demo", "--megapixels", "1.2", "--megapixels", "12", "--format", "jpeg", "--format", "webp")
    lines = invoke(*options, "--markdown").stdout.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[4:6]] for line in lines if "0.5b" in line]
    assert cells == [["1.2", "JPEG"], ["1.2", "WebP"], ["12", "JPEG"], ["12", "WebP"]]
    assert "format" not in invoke("-m", "demo").stdout


def test_the_size_of_a_given_image_is_its_own(measured: list[str]) -> None:
    result = invoke("-m", "demo", "--image", str(APPLE / "images" / "tiny.png"), "--megapixels", "12")
    assert result.exit_code == 2
    assert "--megapixels" in result.stderr


def test_a_report_may_go_to_a_device(measured: list[str]) -> None:
    assert invoke("-m", "demo", "--json", os.devnull).exit_code == 0
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--random-weights", "0.5b", "--model", "x"), "not both"),
        (("--random-weights", "0.5b", "--cold"), "a cold start needs a model on disk"),
        (("--cost", "--json", "x.json"), "Invalid value for --json: --cost prints its tables and writes no file"),
        (("--cost", "--csv", "x.csv"), "Invalid value for --csv: --cost prints its tables and writes no file"),
        (("--cost", "--plot", "x.svg"), "Invalid value for --plot: --cost prints its tables and writes no file"),
        (("--resolution", "100"), "neither a positive multiple of 64"),
        (("compare", "a.json", "b.json", "--threshold", "much"), "'much' is not a percentage"),
    ],
)
def test_wrong_usage_is_refused(arguments: tuple[str, ...], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_comparison_finds_a_regression(tmp_path: Path) -> None:
    before, after = written(tmp_path, "a.json", make_row(1.0)), written(tmp_path, "b.json", make_row(1.07))
    result = invoke("compare", before, after)
    assert result.exit_code == 3
    wall, rate = (line.split() for line in result.stdout.splitlines()[1:])
    assert wall[-7:] == ["wall_ttft", "1000.0", "ms", "1070.0", "ms", "+7.0%", "slower"]
    assert rate[-6:] == ["decode_rate", "10.0", "tokens/s", "10.0", "tokens/s", "+0.0%"]
    assert result.stderr == "1 of 2 metrics are worse by more than 5%\n"
    assert invoke("compare", before, after, "--threshold", "10%").exit_code == 0
    assert invoke("compare", after, before).exit_code == 0


def test_comparison_calls_noise_what_scatter_explains(tmp_path: Path) -> None:
    scattered = Metric(unit="s", samples=(1.0, 1.3, 0.9, 1.1, 1.2)), Metric(unit="s", samples=(1.2, 1.0, 1.4, 1.3, 1.1))
    files = [
        written(tmp_path, f"{number}.json", make_row(metrics={"wall_ttft": samples}))
        for number, samples in enumerate(scattered)
    ]
    result = invoke("compare", *files)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1].endswith("+9.1%  noise")
    assert result.stderr == "noise: 1 of 1 medians differ by more, but no more than their samples scatter\n"


def test_comparison_counts_a_lower_decode_rate_as_slower(tmp_path: Path) -> None:
    before, after = written(tmp_path, "a.json", make_row(rate=10.0)), written(tmp_path, "b.json", make_row(rate=8.0))
    result = invoke("compare", before, after)
    assert result.exit_code == 3
    assert "-20.0%" in result.stdout


def test_comparison_says_when_the_models_differ(tmp_path: Path) -> None:
    result = invoke("compare", written(tmp_path, "a.json"), written(tmp_path, "b.json", make_row(model="7b")))
    assert (result.exit_code, result.stderr) == (0, "not the same: model: '0.5b', '7b'\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not JSON"),
        ("{}", "not a report"),
        ('{"fastvlm_bench": 1}', "the report is damaged: 'conditions' is missing"),
    ],
)
def test_a_file_that_holds_no_report_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    result = invoke("compare", str(path), str(path))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {path}: ")
    assert message in result.stderr


def test_many_questions_at_once_are_measured_in_one_process_and_through_a_server(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ("-m", str(APPLE / "reparam"), "-b", "1", "-c", "2", "--runs", "1", "-n", "2", "-r", "64")
    result = invoke("throughput", *options, "--megapixels", "0.01", "--json", str(report), "--markdown")
    assert result.exit_code == 0, result.stderr
    assert [line.split("|")[1].strip() for line in result.stdout.splitlines()[4:]] == ["one process", "server"]
    values = json.loads(report.read_text())
    assert values["settings"]["max_tokens"] == 2
    assert [(row["way"], row["at_once"]) for row in values["rows"]] == [("one process", 1), ("server", 2)]
    assert str(tmp_path) not in report.read_text()
