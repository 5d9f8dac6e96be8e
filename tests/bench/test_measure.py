import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import fastvlm_mlx
from fastvlm_mlx.backend import mx
from fastvlm_mlx.bench import measure as bench
from fastvlm_mlx.bench import plot, report, statistics
from fastvlm_mlx.bench.candidate import PARTS, Candidate
from fastvlm_mlx.bench.conditions import conditions, power
from fastvlm_mlx.bench.images import Pictures
from fastvlm_mlx.bench.measure import STAGES, measure, time_cold, time_generate, time_stages
from fastvlm_mlx.bench.random_model import SIZES, WordTokenizer, full_size, random_model
from fastvlm_mlx.bench.statistics import Statistics
from fastvlm_mlx.cli import app
from fastvlm_mlx.config import ActivationScales, ModelConfig, TextConfig, VisionConfig
from fastvlm_mlx.errors import CheckpointError, ConfigError, ImageError
from fastvlm_mlx.generation import generate as generation
from tests.checkpoints import APPLE, TESTS

PROMPT = "Describe the image."


@pytest.fixture(scope="module")
def candidate() -> Candidate:
    """A tiny model with random weights."""
    depths = (1, 1, 1, 1, 1)
    config = ModelConfig(
        vision_config=VisionConfig(
            embed_dims=(16, 32, 64, 128, 256), depths=depths, image_size=64, scales=ActivationScales.ones(depths)
        ),
        text_config=TextConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=151936,
        ),
        dtype="float32",
        eos_token_id=(151645,),
    )
    model, processor = random_model(config)
    return Candidate(name="tiny", model=model, processor=processor)


@pytest.fixture(scope="module")
def picture() -> bytes:
    return Pictures()(0)


def make_report(wall: float, rate: float = 10.0, **changes: Any) -> dict[str, Any]:
    """A report with one row."""
    metrics = {
        "wall_ttft": {"unit": "s", **vars(Statistics.of([wall] * 3)), "samples": [wall] * 3},
        "decode_rate": {"unit": "tokens/s", **vars(Statistics.of([rate])), "samples": [rate]},
        **{
            stage: {"unit": "s", **vars(Statistics.of([wall / 7])), "samples": [wall / 7]}
            for stage in ("load", "decode", "preprocess", "vision", "projector", "prefill", "first_token")
        },
    }
    row = {
        "model": "0.5b",
        "precision": dict.fromkeys(PARTS, "float16"),
        "hidden_size": 896,
        "resolution": 1024,
        "pixels": 1024,
        "tokens": {"visual": 256, "text": 27, "prompt": 283, "generated": 32},
        "memory": {"peak_bytes": 1_500_000_000},
        "metrics": metrics,
        **changes,
    }
    return report.make_report({"chip": "Apple M0", "device": "gpu"}, {"runs": 3, "prompt": PROMPT}, [row])


def written(folder: Path, name: str, **values: Any) -> str:
    path = folder / name
    path.write_text(json.dumps(make_report(**values)))
    return str(path)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_every_timed_stage_is_closed_by_an_evaluation(
    candidate: Candidate, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    clock, evaluate = statistics.time.perf_counter, mx.eval

    def tick() -> float:
        events.append("clock")
        return clock()

    def evaluated(*arrays: Any) -> None:
        evaluate(*arrays)
        events.append("evaluation")

    monkeypatch.setattr(statistics, "time", SimpleNamespace(perf_counter=tick))
    monkeypatch.setattr(mx, "eval", evaluated)
    stages = time_stages(candidate.model, candidate.processor, picture, PROMPT, 64)
    assert ["load", *stages] == list(STAGES)
    clocks = [place for place, event in enumerate(events) if event == "clock"]
    assert len(clocks) == 2 * len(stages)
    assert all(events[end - 1] == "evaluation" for end in clocks[1::2])


def test_staging_leaves_the_model_as_it_was_and_answers_the_same(candidate: Candidate, picture: bytes) -> None:
    model = candidate.model
    before = sorted(model)
    time_stages(model, candidate.processor, picture, PROMPT, 64)
    assert sorted(model) == before
    assert model.mm_projector is model["mm_projector"]
    assert "encode_image" not in vars(model)


def test_the_benchmark_and_generate_run_the_same_function(
    candidate: Candidate, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fastvlm generate` calls the public name, as tests/test_cli.py shows; the benchmark the same object."""
    assert fastvlm_mlx.stream_generate is generation.stream_generate
    asked: dict[str, Any] = {}

    def stream(model: object, processor: Any, **options: Any) -> Any:
        asked.update(options, eos=processor.eos_token_ids)
        yield "piece"
        yield "last piece"

    monkeypatch.setattr(generation, "stream_generate", stream)
    assert time_generate(candidate.model, candidate.processor, picture, PROMPT, 128, 5) == "last piece"
    assert asked == {"image": picture, "prompt": PROMPT, "resolution": 128, "max_tokens": 5, "eos": ()}


def test_a_row_holds_every_metric_with_its_samples_and_no_picture_is_shown_twice(candidate: Candidate) -> None:
    shown: list[int] = []

    class Recorded(Pictures):
        def __call__(self, number: int) -> bytes:
            shown.append(number)
            return super().__call__(number)

    pictures = Recorded((APPLE / "images" / "square.png").read_bytes())
    row = measure(candidate, pictures=pictures, prompt=PROMPT, resolution=64, runs=2, warmup=1, max_tokens=4)
    assert set(row["metrics"]) == {*STAGES, "wall_ttft", "paper_ttft", "decode_rate"} - {"load"}
    for metric in row["metrics"].values():
        assert len(metric["samples"]) == metric["n"] == 2
        assert min(metric["samples"]) > 0
    assert row["tokens"] == {"visual": 1, "text": 24, "prompt": 25, "generated": 4}
    assert (row["resolution"], row["pixels"]) == (64, 64)
    assert row["memory"]["peak_bytes"] >= row["memory"]["active_bytes"] > 0
    assert set(row["precision"].values()) == {"float32"}
    assert len(shown) == len(set(shown)) == 9


def test_pictures_differ_and_keep_the_format_of_their_source() -> None:
    source = APPLE / "images" / "landscape.png"
    pictures = Pictures(source.read_bytes())
    assert pictures(1) == pictures(1) != pictures(2)
    assert pictures(1).startswith(b"\x89PNG")
    assert Pictures()(1).startswith(b"\xff\xd8")
    with pytest.raises(ImageError, match=r"notes\.txt: "):
        Pictures(b"no picture", "notes.txt")


def test_statistics() -> None:
    found = Statistics.of([4.0, 1.0, 3.0, 2.0])
    assert (found.n, found.median, found.mean, found.min, found.max) == (4, 2.5, 2.5, 1.0, 4.0)
    assert found.std == pytest.approx(np.std([1, 2, 3, 4], ddof=1))
    assert Statistics.of([1.0]).std == 0.0


def test_a_cold_start_that_fails_says_why(tmp_path: Path, picture: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"fastvlm generate failed: error: .*no such folder"):
        time_cold(tmp_path / "missing" / "folder", picture, PROMPT, 64)


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
    found = json.loads(Path(files["json"]).read_text())
    (row,) = found["rows"]
    assert (row["resolution"], row["pixels"]) == ("auto", 128)
    assert len(row["weights_sha256"]) == 64
    assert row["metrics"]["cold_ttft"]["median"] > row["metrics"]["wall_ttft"]["median"]
    assert row["metrics"]["load"]["n"] == 1
    assert found["settings"]["image_sha256"]
    assert found["conditions"]["chip"]
    assert str(tmp_path) not in Path(files["json"]).read_text()
    assert "cold_ttft,s,1," in Path(files["csv"]).read_text()
    assert "wall TTFT, unstaged" in Path(files["svg"]).read_text()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that the command has loaded; each measurement of one is made up."""
    names: list[str] = []

    def load(name: str, **_: Any) -> SimpleNamespace:
        names.append(name)
        return SimpleNamespace(name=name)

    monkeypatch.setattr(Candidate, "load", load)
    monkeypatch.setattr(bench, "measure", lambda *_, **__: make_report(1.0)["rows"][0])
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

    monkeypatch.setattr(report.os, "replace", full)
    result = invoke("-m", "demo", "--json", str(tmp_path / "x.json"))
    assert result.exit_code == 1
    assert "1000" in result.stdout
    assert result.stderr == f"error: {tmp_path / 'x.json'}: cannot be written (No space left on device)\n"
    assert list(tmp_path.iterdir()) == []


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
    before, after = written(tmp_path, "a.json", wall=1.0), written(tmp_path, "b.json", wall=1.07)
    result = invoke("compare", before, after)
    assert result.exit_code == 1
    assert "slower" in result.stdout
    assert "1 of 2 metrics are worse by more than 5%" in result.stderr
    assert invoke("compare", before, after, "--threshold", "10%").exit_code == 0
    assert invoke("compare", after, before).exit_code == 0


def test_comparison_counts_a_lower_decode_rate_as_slower(tmp_path: Path) -> None:
    before, after = written(tmp_path, "a.json", wall=1.0), written(tmp_path, "b.json", wall=1.0, rate=8.0)
    result = invoke("compare", before, after)
    assert result.exit_code == 1
    assert "-20.0%" in result.stdout


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


@pytest.mark.parametrize(("content", "message"), [("[", "not JSON"), ("{}", "not a report")])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    result = invoke("compare", str(path), str(path))
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_plot_names_the_extra_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"written as \.svg, \.png or \.pdf"):
        plot.plot(make_report(1.0), tmp_path / "plot.txt")
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fastvlm-mlx\[plot\]'"):
        plot.plot(make_report(1.0), tmp_path / "plot.svg")


def test_a_plot_labels_the_papers_figure_as_published(tmp_path: Path) -> None:
    plot.plot(make_report(1.0), tmp_path / "plot.svg")
    assert "published, not measured: 0.5B at 1024 px" in (tmp_path / "plot.svg").read_text()


def test_conditions_hold_no_path_and_no_host_name() -> None:
    text = json.dumps(conditions())
    assert os.uname().nodename not in text
    assert sys.prefix not in text


POWER = {
    "-g batt": "Now drawing from 'Battery Power'\n -InternalBattery-0 80%; discharging\n",
    "-g": "System-wide power settings:\n lowpowermode         1\n",
    "-g therm": "Note: No thermal warning level has been recorded\n\tCPU_Speed_Limit \t= 80\n",
}


def test_power_conditions_of_a_mac() -> None:
    found = power(lambda arguments: POWER[" ".join(arguments[1:])])
    assert found == {
        "source": "Battery Power",
        "low_power_mode": True,
        "thermal_warning": False,
        "speed_limit": 80,
    }
    assert set(power(lambda arguments: "").values()) == {None}


@pytest.mark.parametrize("size", SIZES)
def test_random_models_have_the_shapes_of_the_released_ones(size: str) -> None:
    manifest = json.loads((TESTS / "manifests" / f"apple_{size}.json").read_text())["tensors"]
    text = full_size(size).text_config
    assert manifest["model.embed_tokens.weight"][1] == [text.vocab_size, text.hidden_size]
    assert manifest["model.layers.0.mlp.gate_proj.weight"][1] == [text.intermediate_size, text.hidden_size]
    assert manifest["model.layers.0.self_attn.k_proj.weight"][1][0] == text.num_key_value_heads * text.head_dim
    last = f"model.layers.{text.num_hidden_layers - 1}.input_layernorm.weight"
    assert last in manifest
    assert last.replace(str(text.num_hidden_layers - 1), str(text.num_hidden_layers)) not in manifest


def test_random_models_stay_finite_and_tell_pictures_apart(candidate: Candidate) -> None:
    pixels = candidate.processor.prepare_images([Pictures()(0), Pictures()(1)], 128)
    visual = np.array(candidate.model.encode_image(pixels))
    assert np.isfinite(visual).all()
    assert np.abs(visual[0] - visual[1]).max() > 1e-3 * np.abs(visual).max()


def test_the_stand_in_tokenizer_counts_like_qwens() -> None:
    tokenizer = WordTokenizer()
    assert len(tokenizer.encode("system\nYou are a helpful assistant.")) == 8
    assert tokenizer.decode(tokenizer.encode("one two")).count(" ") == 2
