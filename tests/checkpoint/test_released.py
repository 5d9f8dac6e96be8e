"""One parser decides what the name of a checkpoint means, at once and without asking the Hub."""

import json
from pathlib import Path

import huggingface_hub
import pytest

from fastvlm_mlx.checkpoint.released import SIZES, full_size, parse_name
from fastvlm_mlx.convert import convert_checkpoint, plan
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.resolve import resolve
from tests.checkpoints import TESTS


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))


def test_what_exists_comes_before_the_hub_and_after_the_demo(tmp_path: Path) -> None:
    for folder in ("demo", "0.5b", "apple/FastVLM-7B"):
        Path(folder).mkdir(parents=True)
    for name in ("demo", "DEMO"):
        location = parse_name(name)
        assert location.bundled
        assert location.path is not None
        assert (location.path / "vocab.json").is_file()
    for name in ("./demo", "0.5b", "apple/FastVLM-7B"):
        location = parse_name(name)
        assert (location.name, location.path, location.bundled) == (name, Path(name), False)
    assert not parse_name(Path("demo")).bundled


@pytest.mark.parametrize(
    ("name", "repository"),
    [("0.5b", "apple/FastVLM-0.5B"), ("7B", "apple/FastVLM-7B"), ("mlx-community/It_1.0-4bit", None)],
)
def test_an_alias_or_an_owner_and_a_name_are_on_the_hub(name: str, repository: str | None) -> None:
    location = parse_name(name)
    assert (location.name, location.path) == (repository or name, None)


NOWHERE = (
    *("nope", "./nope", "../nope", "~/nope", "~nobody-of-this-name/nope", "nope/", "/nope", ".hidden/nope", "-x/y"),
    *("a/b/c", "nope.zip", "folder/nope.zip", "owner/name\n", "ówner/name", "a" * 5000, "nul\0"),
)


@pytest.mark.parametrize("name", NOWHERE)
def test_a_missing_folder_is_missing_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    said: list[str] = []
    for use in (parse_name, plan, lambda name: resolve(name, notify=said.append)):
        with pytest.raises(CheckpointError, match=r"no such folder or \.zip archive.* demo, 0\.5b, 1\.5b, 7b"):
            use(name)
    assert not said
    assert not list(tmp_path.iterdir())


def test_a_path_is_never_a_hub_id() -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        parse_name(Path("apple/FastVLM-0.5B"))


@pytest.mark.parametrize("name", ["", " ", "\t\n"])
def test_an_empty_name_is_not_the_current_folder(name: str, tmp_path: Path) -> None:
    for use in (parse_name, resolve, lambda name: convert_checkpoint(name, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"name of the checkpoint is empty; give a folder"):
            use(name)


def test_released_sizes_have_the_shapes_of_the_released_models() -> None:
    shapes = {size: full_size(size).text_config for size in SIZES}
    assert {size: (text.hidden_size, text.num_hidden_layers, text.vocab_size) for size, text in shapes.items()} == {
        "0.5b": (896, 24, 151936),
        "1.5b": (1536, 28, 151936),
        "7b": (3584, 28, 152064),
    }
    assert [text.tie_word_embeddings for text in shapes.values()] == [True, True, False]


@pytest.mark.parametrize("size", SIZES)
def test_released_sizes_have_the_shapes_of_the_released_tensors(size: str) -> None:
    manifest = json.loads((TESTS / "manifests" / f"apple_{size}.json").read_text())["tensors"]
    text = full_size(size).text_config
    assert manifest["model.embed_tokens.weight"][1] == [text.vocab_size, text.hidden_size]
    assert manifest["model.layers.0.mlp.gate_proj.weight"][1] == [text.intermediate_size, text.hidden_size]
    assert manifest["model.layers.0.self_attn.k_proj.weight"][1][0] == text.num_key_value_heads * text.head_dim
    last = f"model.layers.{text.num_hidden_layers - 1}.input_layernorm.weight"
    assert last in manifest
    assert last.replace(str(text.num_hidden_layers - 1), str(text.num_hidden_layers)) not in manifest
