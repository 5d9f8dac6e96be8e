"""A model card says how to use the checkpoint where it lies: in a folder, or in its repository on the Hub."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastvlm_mlx.cli import app
from fastvlm_mlx.convert import quantize_checkpoint
from fastvlm_mlx.convert.export.mlx_vlm import MLX_VLM
from fastvlm_mlx.convert.quantize.scheme import Quantization
from fastvlm_mlx.convert.write.card import FASTVLM, Reader, for_repository
from fastvlm_mlx.convert.write.upload import check_repository
from fastvlm_mlx.errors import ConversionError
from tests.checkpoints import SOURCES
from tests.conftest import Converted
from tests.hub import pretended_hub

FOLDER_LINE = "PATH is this folder or the id of its repository on the Hub."


def test_a_card_names_no_place_that_only_its_writer_has(converted: Converted) -> None:
    card = (converted("apple") / "README.md").read_text()
    assert "fastvlm generate photo.jpg --model PATH" in card
    assert 'load("PATH")' in card
    assert FOLDER_LINE in card
    assert "uv tool install" in card
    assert str(converted("apple").parent) not in card


def test_the_layout_of_the_source_is_called_the_same_after_quantization(tmp_path: Path, converted: Converted) -> None:
    quantize_checkpoint(converted("apple-train"), tmp_path / "int8", quantization=Quantization(preset="int8"))
    rows = [
        next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| source layout"))
        for folder in (converted("apple-train"), tmp_path / "int8")
    ]
    assert rows == ["| source layout | Apple, train-time branches |"] * 2


class Api:
    def create_repo(self, repository: str, *, exist_ok: bool) -> str:
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, *, folder_path: Path, repo_id: str, commit_message: str) -> None:
        pass


def test_an_uploaded_card_names_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["convert", str(SOURCES["apple"]), str(out), "--upload-repo", "me/my-model"])
    assert result.exit_code == 0
    card = (out / "README.md").read_text()
    assert "fastvlm generate photo.jpg --model me/my-model" in card
    assert 'load("me/my-model")' in card


@pytest.mark.parametrize("reader", [FASTVLM, MLX_VLM], ids=["fastvlm", "mlx-vlm"])
def test_no_place_stays_open_in_the_card_of_a_repository(reader: Reader) -> None:
    usage = for_repository(f"{reader.usage}\n\n", "me/my-model")
    assert "--model me/my-model" in usage
    assert "PATH" not in usage


def test_an_upload_without_network_says_that_the_folder_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended_hub(tmp_path / "hub", monkeypatch) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        out = tmp_path / "out"
        result = CliRunner().invoke(app, ["convert", str(SOURCES["apple"]), str(out), "--upload-repo", "me/my-model"])
        assert hub.requests == []
    assert result.exit_code == 1
    first, *_, last = result.stderr.splitlines()
    assert first == "not logged in to the Hub, so the upload at the end will fail; log in with `hf auth login`"
    assert last.startswith("error: me/my-model: the upload failed (")
    assert last.endswith(f"; the folder {out} is complete: upload it with `hf upload me/my-model {out}`")
    assert json.loads((out / "config.json").read_text())["fastvlm_format"]


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/", "me/a..b", "me/-a", "me/" + "x" * 100, "", "me/a b"])
def test_a_name_that_cannot_be_a_repository_is_refused(name: str) -> None:
    with pytest.raises(ConversionError, match="cannot be uploaded to; "):
        check_repository(name)
