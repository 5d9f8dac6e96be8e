"""The export for mlx-vlm: its keys, its configs, and nothing lost on the way there and back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fastvlm_mlx.checkpoint.safetensors import Tensor
from fastvlm_mlx.cli import app
from fastvlm_mlx.convert import convert_checkpoint
from fastvlm_mlx.convert.export import mlx_vlm
from fastvlm_mlx.convert.export.mlx_vlm import export_mlx_vlm
from fastvlm_mlx.convert.pipeline import convert_and_quantize
from fastvlm_mlx.convert.quantize.scheme import Quantization
from fastvlm_mlx.convert.write.files import REPORTS, folder_bytes
from fastvlm_mlx.convert.write.shards import ShardWriter
from fastvlm_mlx.errors import ConversionError, GateError
from tests.checkpoints import APPLE, SOURCES, changed, tensors
from tests.conftest import Converted


@pytest.mark.parametrize("name", ["apple", "apple-untied", "apple-hot"])
def test_an_export_converts_back_to_the_same_weights(name: str, tmp_path: Path) -> None:
    dtype = "float32"
    convert_checkpoint(SOURCES[name], tmp_path / "ours", dtype=dtype)
    export_mlx_vlm(tmp_path / "ours", tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "back", dtype=dtype)
    first, second = tensors(tmp_path / "ours"), tensors(tmp_path / "back")
    assert first.keys() == second.keys()
    for key, value in first.items():
        # Not to the bit: the variance of a BatchNorm that changes nothing, 1 - 1e-5, is rounded.
        np.testing.assert_allclose(second[key], value, rtol=1e-6, err_msg=key)


def test_scaling_for_float16_is_taken_out(tmp_path: Path) -> None:
    convert_checkpoint(SOURCES["apple-hot"], tmp_path / "exact", dtype="float32")
    convert_checkpoint(SOURCES["apple-hot"], tmp_path / "scaled", dtype="float16")
    export_mlx_vlm(tmp_path / "scaled", tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "back", dtype="float32")
    first, second = tensors(tmp_path / "exact"), tensors(tmp_path / "back")
    for key in ("vision_tower.stages.3.downsample.proj.weight", "mm_projector.0.weight"):
        np.testing.assert_allclose(second[key], first[key], atol=2**-10 * np.abs(first[key]).max(), err_msg=key)


def test_keys_shapes_and_configs_are_mlx_vlms(converted: Converted, tmp_path: Path) -> None:
    export_mlx_vlm(converted("apple"), tmp_path / "out")
    ours, theirs = tensors(tmp_path / "out"), tensors(SOURCES["mlx-vlm"])
    head = "vision_tower.vision_model.head.proj"  # as wide as the released ones'
    assert ours.pop(head).shape == (theirs.pop(head).shape[0], 768)
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    folders = tmp_path / "out", SOURCES["mlx-vlm"]
    config, golden = (json.loads((folder / "config.json").read_text()) for folder in folders)
    same = ["model_type", "hidden_size", "num_attention_heads", "image_token_index", "eos_token_id", "mm_hidden_size"]
    assert {key: config[key] for key in same} == {key: golden[key] for key in same}
    vision = config["vision_config"]
    assert (vision["layers"], vision["embed_dims"]) == ([1, 2, 2, 1, 1], [8, 16, 32, 64, 128])
    for name in ("processor_config.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["processor_class"] == "FastVLMProcessor"


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower of a released checkpoint takes 0.5 GB in float32."""
    unwritten: list[str] = []
    read, write = Tensor.read, ShardWriter.write

    def reading(tensor: Tensor, *rows: int) -> Any:
        unwritten.append(tensor.name)
        assert len(unwritten) == 1
        return read(tensor, *rows)

    def writing(writer: ShardWriter, *arguments: Any) -> None:
        write(writer, *arguments)
        unwritten.clear()

    convert_checkpoint(SOURCES["apple"], tmp_path / "ours")
    monkeypatch.setattr(mlx_vlm, "check_converted", lambda _: None)  # reads every tensor before the first is written
    monkeypatch.setattr(Tensor, "read", reading)
    monkeypatch.setattr(ShardWriter, "write", writing)
    export_mlx_vlm(tmp_path / "ours", tmp_path / "theirs")
    assert (tmp_path / "theirs" / "model.safetensors").is_file()


def test_quantized_layers_of_the_decoder_are_exported_as_they_are(tmp_path: Path) -> None:
    quantization = Quantization(bits=4, group_size=32, parts={"vision": 0, "projector": 0})
    convert_and_quantize(SOURCES["apple"], tmp_path / "ours", quantization=quantization)
    export_mlx_vlm(tmp_path / "ours", tmp_path / "theirs")
    first, second = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    names = [name for name in first if name.startswith("language_model.")]
    assert any(name.endswith(".scales") for name in names)
    for name in names:
        np.testing.assert_array_equal(first[name], second[name])
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    convert_checkpoint(tmp_path / "theirs", tmp_path / "back")
    np.testing.assert_array_equal(
        tensors(tmp_path / "back")["language_model.model.embed_tokens.weight"],
        first["language_model.model.embed_tokens.weight"],
    )


@pytest.mark.parametrize("text", ["[" * 5000, "[]", "{}", '{"parts": 5}', '{"a": Infinity}'])
def test_a_report_that_cannot_be_shown_is_left_out_of_an_export(
    text: str, converted: Converted, tmp_path: Path
) -> None:
    folder = changed(converted("apple"), tmp_path / "ours")
    (folder / "quantization_report.json").write_text(text)
    assert export_mlx_vlm(folder, tmp_path / "theirs") is None
    assert not (tmp_path / "theirs" / "quantization_report.json").exists()


def test_the_report_card_and_gates_of_an_export_are_about_the_export(
    converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvlm_mlx.convert.request.check_readable", lambda vision: None)
    quantization = Quantization(bits=8, group_size=32, parts={"vision": 0, "projector": 0})
    ours = convert_and_quantize(converted("apple"), tmp_path / "ours", quantization=quantization)
    theirs = convert_and_quantize(converted("apple"), tmp_path / "theirs", quantization=quantization, mlx_vlm=True)
    assert ours is not None
    assert theirs is not None
    assert theirs.folder_bytes_after == folder_bytes(tmp_path / "theirs", without=REPORTS) > ours.folder_bytes_after
    assert theirs.parts["vision"].bytes_after > ours.parts["vision"].bytes_after
    assert theirs.parts["decoder"] == ours.parts["decoder"]
    assert json.loads((tmp_path / "theirs" / "quantization_report.json").read_text()) == json.loads(
        json.dumps(theirs.to_dict())
    )
    card = (tmp_path / "theirs" / "README.md").read_text()
    assert "python -m mlx_vlm.generate --model PATH" in card
    assert f"| {theirs.rows()[-1][3]} | worst part" in card
    assert "fastvlm generate" not in card
    assert "- fastvlm-mlx" not in card
    between = f"size_ratio<={(ours.size_ratio + theirs.size_ratio) / 2}"
    with pytest.raises(GateError, match=r"the gate size_ratio<=.* is not met") as raised:
        convert_and_quantize(
            converted("apple"), tmp_path / "no", quantization=quantization, mlx_vlm=True, gates=[between]
        )
    assert raised.value.report.size_ratio == theirs.size_ratio
    assert not (tmp_path / "no").exists()


def test_calibration_images_for_an_export_alone_are_refused(
    converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvlm_mlx.convert.request.check_readable", lambda vision: None)
    with pytest.raises(ConversionError, match="calibration images would change nothing: nothing is to be converted"):
        convert_and_quantize(
            converted("apple", "float16"), tmp_path / "out", mlx_vlm=True, calibration=[APPLE / "images"]
        )


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
def test_a_tower_that_mlx_vlm_cannot_load_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["convert", "demo", str(tmp_path / "out"), "--format", "mlx-vlm", *arguments])
    assert result.exit_code == 1
    assert "error: mlx-vlm loads only the released vision tower, of depths [2, 12, 24, 4, 2]" in result.stderr
    assert list(tmp_path.iterdir()) == []
