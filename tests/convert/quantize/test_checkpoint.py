"""Quantizing converted checkpoints: what is written, what it is said to cost, and gates and verification on it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fastvlm_mlx import convert
from fastvlm_mlx.backend import mx
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.cli import app
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.convert import convert_checkpoint, verify
from fastvlm_mlx.convert.compare.layerwise import module_at
from fastvlm_mlx.convert.export.mlx_vlm import export_mlx_vlm
from fastvlm_mlx.convert.parts import PARTS
from fastvlm_mlx.convert.pipeline import convert_and_quantize
from fastvlm_mlx.convert.progress import Layers
from fastvlm_mlx.convert.quantize import checkpoint as quantize
from fastvlm_mlx.convert.quantize.auto_bits import quantized_layer
from fastvlm_mlx.convert.quantize.report import QuantizationReport
from fastvlm_mlx.convert.quantize.scheme import Quantization
from fastvlm_mlx.convert.request import planned_request
from fastvlm_mlx.convert.write import upload as hub
from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.resolve import load
from tests.checkpoints import GOLDEN, SOURCES, changed, tensors

INT4 = Quantization(bits=4, group_size=32)
IMAGE = GOLDEN / "apple" / "images" / "landscape.png"


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact") / "apple"
    convert_checkpoint(SOURCES["apple"], folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def quantized(exact: Path) -> tuple[Path, QuantizationReport]:
    folder = exact.parent / "int4"
    before = {path.name: path.stat().st_mtime_ns for path in exact.iterdir()}
    report = convert_and_quantize(exact, folder, quantization=INT4)
    assert report is not None
    assert {path.name: path.stat().st_mtime_ns for path in exact.iterdir()} == before  # only read
    return folder, report


def test_a_quantized_checkpoint_answers_and_says_what_was_lost(quantized: tuple[Path, QuantizationReport]) -> None:
    folder, report = quantized
    model, processor = load(folder)
    assert model.generate(**processor([IMAGE], "Describe the image."), max_tokens=3)
    stored = json.loads((folder / "quantization_report.json").read_text())
    assert stored == json.loads(json.dumps(report.to_dict()))
    assert stored["parts"]["decoder"]["bits_per_weight"] == pytest.approx(6, abs=0.3)  # float32 scales, and norms
    assert 0.05 < stored["parts"]["vision"]["weight_error"] < 0.12
    assert stored["agreement"]["positions"] > 30
    assert 0 < stored["kl"] < 1
    assert stored["size_ratio"] < 0.4
    assert stored["kept"]["vision_tower.stem.2"] == "8 inputs, which groups of 32 do not divide"
    card = (folder / "README.md").read_text()
    assert "## What quantization cost" in card
    assert "| decoder | 6." in card
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == {"group_size": 32, "bits": 4, "mode": "affine"}


def test_the_planned_size_is_the_size(exact: Path, quantized: tuple[Path, QuantizationReport]) -> None:
    planned = planned_request(exact, quantization=INT4, dtype="float32")
    assert planned.output_bytes == sum(values.nbytes for values in tensors(quantized[0]).values())


def test_dequantizing_leaves_exactly_the_error_of_quantization(
    exact: Path, quantized: tuple[Path, QuantizationReport], tmp_path: Path
) -> None:
    folder, report = quantized
    convert_and_quantize(folder, tmp_path / "back", dequantize=True)
    assert ModelConfig.from_path(tmp_path / "back").quantization is None
    found = verify(tmp_path / "back", exact)
    for part, error in found.weight_errors.items():
        assert error == pytest.approx(report.parts[part].weight_error, rel=1e-4)
    assert found.agreement.kl == pytest.approx(report.agreement.kl, rel=1e-3)
    assert found.agreement.top1 == report.agreement.top1
    # The tower's stem is no quantized layer: nothing is off there.
    assert found.segments[0].output_error == found.segments[0].weight_error == 0


def test_a_conversion_to_float16_is_verified_against_its_source(tmp_path: Path) -> None:
    convert_checkpoint(SOURCES["apple-hot"], tmp_path / "hot")
    result = invoke("verify", tmp_path / "hot", "--against", SOURCES["apple-hot"], "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["first_drift"] is None
    assert found["agreement"]["top1"] > 0.95
    # float16 rounds by at most 2⁻¹¹; scaling by powers of two adds nothing
    assert max(found["weight_errors"].values()) < 2**-11


def test_quantized_layers_are_within_what_their_bits_allow(
    exact: Path, quantized: tuple[Path, QuantizationReport]
) -> None:
    result = invoke("verify", quantized[0], "--against", exact)
    assert result.exit_code == 0, result.output
    assert "weights off by: decoder" in result.stdout
    *_, top1, cosine, verdict = result.stdout.splitlines()
    assert top1.startswith("the gate top1>=0.5 is met: top1 is 0.")
    assert cosine.startswith("the gate visual_cosine>=0.9 is met: visual_cosine is 0.9")
    assert verdict == "the same within rounding: no segment is off by more than allowed, and all gates are met"
    assert max(map(len, result.stdout.splitlines()[:20])) <= 80


def test_answers_that_differ_too_much_fail_though_every_segment_is_within_its_bits(exact: Path, tmp_path: Path) -> None:
    convert_and_quantize(exact, tmp_path / "int3", quantization=Quantization(bits=3, group_size=32))
    result = invoke("verify", tmp_path / "int3", "--against", exact)
    assert result.exit_code == 3
    errors = result.stderr.splitlines()
    assert errors[0].startswith("error: the answers differ too much: the gate top1>=0.5 is not met: top1 is 0.")
    assert "the same within rounding" not in result.stdout
    gates = ("--gate", "top1>=0.01", "--gate", "weight_error<0.5")
    told = invoke("verify", tmp_path / "int3", "--against", exact, *gates, "--json")
    assert told.exit_code == 0
    found = json.loads(told.stdout)
    assert found["gates"] == {"top1>=0.01": True, "weight_error<0.5": True}
    assert found["holds"] is True


def test_verify_reads_whatever_can_be_converted(exact: Path, tmp_path: Path) -> None:
    quantization = Quantization(bits=8, group_size=32, parts={"vision": 0, "projector": 0})
    convert_and_quantize(exact, tmp_path / "int8", quantization=quantization)
    export_mlx_vlm(tmp_path / "int8", tmp_path / "export")
    result = invoke("verify", tmp_path / "export", "--against", exact)
    assert result.exit_code == 0, result.output
    assert "the gate top1>=0.9 is met" in result.stdout
    other = invoke("verify", "demo", "--against", exact)
    assert (other.exit_code, other.stderr) == (1, f"error: demo and {exact} are models of different architectures\n")


def test_verify_names_a_folder_without_tokenizer_or_with_another_one(exact: Path, tmp_path: Path) -> None:
    without = changed(exact, tmp_path / "without")
    (without / "tokenizer.json").unlink()
    result = invoke("verify", without, "--against", exact)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {without}: has no tokenizer")
    other = changed(exact, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:1]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConversionError, match="have different tokenizers: they encode a prompt differently"):
        verify(other, exact)


LAYERS = ("language_model.model.layers.1.mlp.down_proj", "vision_tower.stages.3.blocks.0.token_mixer.proj")


@pytest.mark.parametrize("layer", LAYERS)
def test_verify_names_the_layer_whose_scales_are_doubled(
    exact: Path, quantized: tuple[Path, QuantizationReport], tmp_path: Path, layer: str
) -> None:
    def double(values: dict[str, Any]) -> None:
        for part in ("scales", "biases"):
            values[f"{layer}.{part}"] = values[f"{layer}.{part}"] * 2

    broken = changed(quantized[0], tmp_path / "broken", edit=double)
    result = invoke("verify", broken, "--against", exact)
    assert result.exit_code == 3
    assert f"error: {layer} is the first part that drifts: its segment's output is off by " in result.stderr
    assert re.search(r"its weights by [\d.]+ \([\d.]+ allowed\)", result.stderr)


def test_the_gate_stops_a_broken_layer(exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = quantize.rounded

    def broken(tensor: Any, settings: Any) -> Any:
        parts, squares = rounded(tensor, settings)
        if tensor.name == f"{LAYERS[0]}.weight":
            parts |= {name: parts[name] * 2 for name in ("scales", "biases")}
        return parts, squares

    quantization = Quantization(bits=8, group_size=32)
    gate = "kl<0.05"
    assert convert_and_quantize(exact, tmp_path / "good", quantization=quantization, gates=[gate]) is not None
    monkeypatch.setattr(quantize, "rounded", broken)
    with pytest.raises(ConversionError, match=r"the gate kl<0.05 is not met: kl is .*; nothing was written"):
        convert_and_quantize(exact, tmp_path / "bad", quantization=quantization, gates=[gate])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good"]


def test_a_gate_that_is_not_met_ends_with_exit_code_3(exact: Path, tmp_path: Path) -> None:
    gates = ("--gate", "top1>1", "--gate", "kl<0", "--gate", "weight_error<1")
    result = invoke("quantize", exact, tmp_path / "out", "--q-group-size", 32, *gates)
    assert result.exit_code == 3
    *report, error = result.stderr.splitlines()
    assert error.startswith("error: the gate top1>1 is not met: top1 is ")
    assert "; the gate kl<0 is not met: kl is " in error
    assert error.endswith("; nothing was written")
    assert not list(tmp_path.iterdir())
    assert result.stdout == ""
    rows = {line.partition("  ")[0] for line in report}
    assert {"part", *PARTS, "quantized layers", "all files"} <= rows
    assert any(line.startswith("the gate weight_error<1 is met: weight_error is 0.00") for line in report)
    (met,) = (line for line in report if line.startswith("the gate top1>1"))
    assert re.search(r"top1 is [\d.]+ \(95% interval 0\.\d+ to [01]\.?\d*\)$", met)


def test_compensation_loses_less_than_rounding(
    exact: Path, quantized: tuple[Path, QuantizationReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "CALIBRATION_SEEDS", range(1000, 1004))
    quantization = Quantization(bits=4, group_size=32, method="gptq")
    calls: list[tuple[int, int, str]] = []
    better = convert_and_quantize(
        exact, tmp_path / "out", quantization=quantization, progress=lambda *call: calls.append(call)
    )
    assert better is not None
    layers = quantization.allocate(ModelConfig.from_path(exact)).linears
    expected = [(number, len(layers), "compensating layers") for number in range(len(layers))]
    assert [call for call in calls if isinstance(call[1], Layers)] == expected
    plain = quantized[1]
    assert better.folder_bytes_after == pytest.approx(plain.folder_bytes_after, abs=10)
    assert better.agreement.kl < 0.7 * plain.agreement.kl
    assert better.agreement.visual_cosine > plain.agreement.visual_cosine


@pytest.mark.parametrize(
    ("quantization", "most"),
    [(Quantization(bits=8, group_size=32), 2), (Quantization(bits=8, group_size=32, method="gptq"), 3)],
    ids=["rtn", "gptq"],
)
def test_a_model_is_loaded_no_more_often_than_it_is_changed(
    exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: Quantization, most: int
) -> None:
    """The exact model and the result; with GPTQ also one whose layers are replaced on the way."""
    loads: list[Path] = []

    def counted(folder: Path, **options: Any) -> Any:
        loads.append(folder)
        return load_model(folder, **options)

    for module in ("quantize.checkpoint", "compare.agreement"):
        monkeypatch.setattr(f"fastvlm_mlx.convert.{module}.load_model", counted)
    monkeypatch.setattr(quantize, "CALIBRATION_SEEDS", range(1000, 1002))
    convert_and_quantize(exact, tmp_path / "out", quantization=quantization)
    assert len(loads) == most


def test_a_layer_is_exact_again_after_it_was_measured(exact: Path) -> None:
    config = ModelConfig.from_path(exact)
    allocation = Quantization(preset="auto", target_bpw=5.0, group_size=32).allocate(config)
    path = next(iter(allocation.layers))
    model = load_model(exact)
    before = module_at(model, path).weight
    quantized = quantized_layer(model, allocation, path, lambda _: None)
    quantized.__enter__()
    assert not mx.array_equal(module_at(model, path).weight, before)
    quantized.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert mx.array_equal(module_at(model, path).weight, before)


def test_auto_spends_its_bits_where_they_matter(
    exact: Path, quantized: tuple[Path, QuantizationReport], tmp_path: Path
) -> None:
    quantization = Quantization(preset="auto", target_bpw=6.0, group_size=32)
    calls: list[tuple[int, int, str]] = []
    report = convert_and_quantize(
        exact, tmp_path / "out", quantization=quantization, progress=lambda *call: calls.append(call)
    )
    assert report is not None
    layers = Quantization(bits=4, group_size=32).allocate(ModelConfig.from_path(exact)).layers
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    bits = {path: entry.get(path, entry)["bits"] for path in layers}
    assert len(set(bits.values())) > 1
    measured = [done for done, total, label in calls if (total, label) == (len(layers), "measuring layers")]
    assert measured == list(range(len(layers)))
    assert report.agreement.kl < quantized[1].agreement.kl  # at the same 4 + 2 bits per weight
    assert quantized[1].quantized_layers.bits_per_weight == 6
    assert 5.9 < report.quantized_layers.bits_per_weight <= 6
    assert "target of 6 bits per weight met: the quantized layers take 6.00" in report.lines()
    assert report.rows()[-2][:2] == ("quantized layers", "6.00")


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_floating_point_modes_are_written_and_read(exact: Path, tmp_path: Path, mode: str) -> None:
    report = convert_and_quantize(exact, tmp_path / "out", quantization=Quantization(mode=mode))
    assert report is not None
    assert report.weight_error < 0.15
    entry = ModelConfig.from_path(tmp_path / "out").quantization
    assert entry is not None
    assert entry.default.mode == mode
    assert entry.for_layer("language_model.model.embed_tokens").mode == "affine"


def test_bfloat16_checkpoints_are_quantized(tmp_path: Path) -> None:
    convert_checkpoint(SOURCES["apple"], tmp_path / "source", dtype="bfloat16")
    report = convert_and_quantize(
        tmp_path / "source", tmp_path / "out", quantization=Quantization(preset="int8", group_size=32)
    )
    assert report is not None
    assert report.weight_error < 0.01
    scales = mx.load(str(tmp_path / "out" / "model.safetensors"))["mm_projector.2.scales"]
    assert scales.dtype == mx.bfloat16


def test_weights_are_rounded_as_mlx_does(exact: Path, quantized: tuple[Path, QuantizationReport]) -> None:
    source, result = tensors(exact), tensors(quantized[0])
    name = "language_model.model.layers.0.mlp.up_proj"
    for part, value in zip(
        ("weight", "scales", "biases"), mx.quantize(mx.array(source[f"{name}.weight"]), 32, 4), strict=True
    ):
        np.testing.assert_array_equal(result[f"{name}.{part}"], np.array(value))


def test_convert_quantizes_in_one_command(tmp_path: Path) -> None:
    result = invoke(
        *("convert", SOURCES["apple"], tmp_path / "out", "-q", "--q-group-size", 32, "--q-vision", "none"),
        *("--q-embed", 6, "--gate", "top1>=0.5"),
    )
    assert result.exit_code == 0, result.output
    assert "KL divergence" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    names = {name for name in tensors(tmp_path / "out") if name.endswith(".scales")}
    assert names
    assert not any(name.startswith("vision_tower") for name in names)
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert entry["language_model.model.embed_tokens"] == {"group_size": 32, "bits": 6, "mode": "affine"}
    model = load_model(tmp_path / "out")
    assert model.encode_image(np.zeros((1, 128, 128, 3), np.uint8)).shape == (1, 4, 64)


def empty_folder(path: Path) -> Path:
    path.mkdir()
    (path / "notes.txt").write_text("no image")
    return path


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (lambda _: ["--q-bits", "7"], "bits in mode affine must be one of 2, 3, 4, 5, 6, 8, not 7", 2),
        (lambda _: ["--gate", "beauty>=1"], "there is no metric 'beauty'; there are visual_cosine, kl, top1", 2),
        (lambda _: ["--gate", "top1=1"], "gate 'top1=1' cannot be read; write for instance 'top1>=0.95'", 2),
        (lambda path: ["--calibration", path / "none"], "no such image or folder of calibration images", 1),
        (lambda path: ["--calibration", empty_folder(path / "e")], "holds no image to calibrate on (.avif, .bmp", 1),
        (lambda _: ["--dequantize"], "is not quantized; there is nothing to dequantize", 1),
        (lambda _: ["--upload-repo", "nowhere"], "'nowhere' cannot be uploaded to; write it as owner/name", 2),
        (lambda _: ["--format", "mlx-vlm", "--q-vision", "8"], "mlx-vlm's readers need tower and projector in", 1),
        (lambda _: [f"--q-{part}=none" for part in PARTS], "no layer of this checkpoint can be quantized like this", 1),
    ],
)
def test_bad_input_is_an_error_before_any_work(
    exact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: Callable[[Path], list[object]],
    message: str,
    code: int,
) -> None:
    """With exit code 2 where the options alone are wrong, whatever the source."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("work has started")

    monkeypatch.setattr("fastvlm_mlx.convert.pipeline.quantize_checkpoint", work)
    monkeypatch.setattr("fastvlm_mlx.convert.pipeline.convert_checkpoint", work)
    result = invoke("quantize", exact, tmp_path / "out", *arguments(tmp_path))
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_nothing_is_converted_for_what_cannot_be_written_or_measured_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(*_: Any, **__: Any) -> None:
        raise AssertionError("a conversion has begun")

    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(convert, "convert_checkpoint", begin)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").touch()
    typo = tmp_path / "typo.png"
    taken = invoke("quantize", SOURCES["apple"], tmp_path / "taken")
    assert (taken.exit_code, taken.stderr.partition(";")[0]) == (1, f"error: {tmp_path / 'taken'}: exists already")
    missing = invoke("quantize", SOURCES["apple"], tmp_path / "out", "--calibration", typo)
    assert missing.exit_code == 1
    assert missing.stderr == f"error: {typo}: no such image or folder of calibration images\n"


def test_quantizing_twice(quantized: tuple[Path, QuantizationReport], tmp_path: Path) -> None:
    for source in (quantized[0], SOURCES["mlx-vlm-q8"]):
        with pytest.raises(ConversionError, match="is quantized already; quantize what it was made from"):
            convert_and_quantize(source, tmp_path / "out", quantization=INT4)


def test_models_of_different_shapes_are_not_compared(exact: Path, tmp_path: Path) -> None:
    convert_checkpoint(SOURCES["apple-untied"], tmp_path / "other")
    with pytest.raises(ConversionError, match="are models of different architectures"):
        verify(tmp_path / "other", exact)


def test_upload_makes_the_repository_and_pushes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class Api:
        def create_repo(self, repository: str, *, exist_ok: bool) -> str:
            calls.append(("create", repository, exist_ok))
            return f"https://huggingface.co/{repository}"

        def upload_folder(self, *, folder_path: Path, repo_id: str, commit_message: str) -> None:
            calls.append(("upload", folder_path, repo_id, commit_message))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert hub.upload(tmp_path, "me/model") == "https://huggingface.co/me/model"
    assert calls == [("create", "me/model", True), ("upload", tmp_path, "me/model", f"Upload {tmp_path.name}")]


def test_a_failed_upload_leaves_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def create_repo(self, *_: object, **__: object) -> str:
            raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    with pytest.raises(
        ConversionError, match=r"me/model: the upload failed \(no network\); the folder .* is complete: "
    ):
        hub.upload(tmp_path, "me/model")
