"""What is asked of a model on the Hub before anybody decided to download it costs next to nothing."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fastvlm_mlx.cli import app
from tests.checkpoints import APPLE, SOURCES
from tests.hub import PretendedHub, pretended_hub

NAME = "apple/FastVLM-0.5B"
PICTURE = str(APPLE / "images" / "square.png")
HEADERS = 300_000
"""More bytes than headers and configs take, and a sixth of the model."""


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedHub]:
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTVLM_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "existing").mkdir()
    (tmp_path / "existing" / "file").write_text("text")
    (tmp_path / "text.png").write_text("text")
    row = {"image": PICTURE, "question": "What?", "answers": ["that"]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "lost.jsonl").write_text(json.dumps({**row, "image": "lost.png"}) + "\n")
    with pretended_hub(tmp_path / "hub", monkeypatch) as pretended:
        pretended.put(NAME, SOURCES["apple"])
        yield pretended


MISTAKES = [
    ("generate typo.png -m HUB", "typo.png: no such file"),
    ("generate text.png -m HUB", "text.png: not an image"),
    ("generate PICTURE -m HUB --resolution 100", "neither a positive multiple of 64 nor"),
    ("eval -m HUB --data typo.jsonl", "typo.jsonl"),
    ("eval -m HUB --data lost.jsonl", "none of its images exists"),
    ("eval -m HUB --data data.jsonl --metric typo", "'typo' is not one of"),
    ("eval -m HUB --data data.jsonl --baseline ./typo", "./typo: no such folder"),
    ("eval -m HUB --data data.jsonl --baseline existing --revision v1 -n 0", "must be at least 1"),
    ("caption typo.png -m HUB", "typo.png"),
    ("caption PICTURE -m HUB --output nowhere/x.jsonl", "nowhere"),
    ("bench -m HUB --image typo.png", "typo.png"),
    ("bench -m HUB --image text.png", "text.png: "),
    ("bench -m HUB -m ./typo", "./typo: no such folder"),
    ("bench -m HUB --json nowhere/x.json", "nowhere"),
    ("convert HUB existing", "existing: exists already"),
    ("convert HUB out --calibration typo.png", "typo.png: no such image"),
    ("convert HUB out --calibration text.png", "text.png: not an image"),
    ("convert HUB out -q --gate top1>=typo", "top1>=typo"),
    ("convert HUB out --vision-from ./typo", "./typo: no such folder"),
    ("convert HUB out --upload-repo typo", "'typo' cannot be uploaded to"),
    ("convert HUB existing/file/out", "existing/file"),
    ("quantize HUB existing", "existing: exists already"),
    ("quantize HUB out --calibration text.png", "text.png: not an image"),
    ("quantize HUB out --gate top1>=typo", "top1>=typo"),
    ("verify typo --against HUB", "typo: no such folder"),
    ("verify HUB --against ./typo", "./typo: no such folder"),
]
NEED_THE_HUB = [
    ("eval -m HUB --data data.jsonl --baseline nobody/nothing", "nobody/nothing: no such folder, and no such"),
    ("bench -m HUB -m nobody/nothing", "nobody/nothing: no such folder, and no such"),
    ("verify HUB --against nobody/nothing", "nobody/nothing: no such folder, and no such"),
    ("convert HUB out --vision-from HUB", "has a vision tower of its own"),
    ("convert HUB out --dequantize", "is not quantized; there is nothing to dequantize"),
    ("quantize HUB out --dequantize", "is not quantized; there is nothing to dequantize"),
    ("quantize HUB out --revision v9", "has no revision v9"),
]


def run(command: str) -> Result:
    return invoke(*[{"HUB": NAME, "PICTURE": PICTURE}.get(word, word) for word in command.split()])


@pytest.mark.parametrize(("command", "message"), MISTAKES + NEED_THE_HUB)
def test_a_mistake_costs_neither_a_download_nor_a_conversion(
    command: str, message: str, hub: PretendedHub, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = run(command)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "downloading" not in result.stderr
    assert hub.sent < HEADERS
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("command", "message"), MISTAKES)
def test_offline_the_mistake_is_named_and_not_the_hub(command: str, message: str, hub: PretendedHub) -> None:
    hub.down = True
    result = run(command)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "Hub" not in result.stderr.replace("a Hub id", "")


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("info HUB", "1.91 MB as published (Apple, as released), not converted yet"),
        ("info HUB --json", '"folder": null'),
        ("convert HUB --dry-run", "Apple, as released, 1.91 MB"),
        ("convert HUB --dry-run -q", "then quantize"),
        ("bench --cost -m HUB", "prefill"),
    ],
)
def test_a_look_at_a_model_reads_headers_only(command: str, output: str, hub: PretendedHub, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = run(command)
    assert result.exit_code == 0, result.stderr
    assert output in result.stdout
    assert hub.sent < HEADERS
    assert sorted(tmp_path.rglob("*")) == before


def test_info_of_a_source_converts_nothing_and_gives_the_figures_of_its_conversion(
    hub: PretendedHub, tmp_path: Path
) -> None:
    before = json.loads(invoke("info", str(SOURCES["apple"]), "--json").stdout)
    assert not (tmp_path / "cache").exists()
    assert invoke("convert", str(SOURCES["apple"]), "out").exit_code == 0
    after = json.loads(invoke("info", "out", "--json").stdout)
    assert before["parts"] == after["parts"]
    assert before["resolutions"] == after["resolutions"]
    assert before["folder"] is None
    assert after["unconverted"] is None
    text = invoke("info", "out").stdout
    assert " 128 px (its own)" in text
    assert text.index("128 px (its own)") < text.index("256 px")
    assert "generate, by `fastvlm generate`" in text


def test_downloading_and_then_converting_are_said(hub: PretendedHub) -> None:
    lines = run("generate PICTURE -m HUB -n 1").stderr.splitlines()
    assert lines[0] == f"downloading {NAME} from the Hub: 1.93 MB; Apple's research licence: for research only"
    assert lines[1].startswith(f"converting {NAME} once, into ")
    shutil.rmtree("cache")
    again = run("generate PICTURE -m HUB -n 1").stderr.splitlines()
    assert again[0].startswith(f"converting {NAME} once, into ")
    assert run("convert HUB out").stderr.splitlines()[0].startswith("wrote out")
