"""With the background server and without, a command line gives the same: stdout, stderr, exit code."""

import base64
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from fastvlm_mlx import backend
from fastvlm_mlx.cli import app
from fastvlm_mlx.warm import client
from tests.warm.background import DEMO, background, fastvlm

DATA_URL = "data:image/png;base64," + base64.b64encode((DEMO / "sample-1.png").read_bytes()).decode()

# $1 and $2 are pictures, $DATA is a data: URL; what stands behind < goes to stdin.
LINES = """
$1
$2
$1 $2 -p 'What changed?'
$1 $1 $1
-p 'Hello'
$1 -p 'How many shapes are there?'
$1 -p 'Is there a cross?' --system 'Be brief.'
$1 -n 1
$1 -n 3
$1 -n 3 --json
$1 --json
$1 $2 --json
$1 -v
$1 --json -v
$1 -t 1 --seed 1
$1 -t 1 --seed 2
$1 -t 0.7 --seed 3 --top-p 0.9 --top-k 40 --min-p 0.05 --repetition-penalty 1.1
$1 -t 3 --seed 4 -n 20 --json
$1 --repetition-penalty 1.3
$1 --stop triangle
$1 --stop cross --stop black --json
$1 -r 64
$1 -r 128 -n 8
$1 -r auto
$1 --dtype float32
$1 --dtype float16
-m ./own $1
-m $OWN $1 --json
$1 -p 'Is there a cross?' --choice yes --choice no
$1 -p 'Is there a cross?' --choice yes --choice no --json
-p 'Yes?' --choice yes --choice no --json
$1 --choice yes --choice $LONG
logo.png
logo.png --background white
logo.png logo.png -v
logo.png --background '#00ff00' --json
'with blank.png'
$DATA
$DATA --json
data:image/png;base64,!!!
- < picture
- $2 --json < picture
$1 -p - < question
$1 -p - < latin1
- < nothing
- < text
missing.png
$1 missing.png
damaged.png
damaged.png missing.png
logo.png damaged.png
$1 damaged.png
. $1
text.txt
'What is it?'
$1 'Count the shapes'
ftp://example.com/a.png
$1 -p ''
$1 -p '   '
$1 -p $VERY_LONG
$1 -r 100
$1 -n 0
$1 --stop ''
$1 --seed 1
- - < picture
"""
STDIN = {
    "picture": (DEMO / "sample-2.png").read_bytes(),
    "question": "How many shapes are there?\r\n".encode("utf-8-sig"),
    "latin1": b"caf\xe9",
    "nothing": b"",
    "text": b"no picture",
}
MASKED = ("timings", "tokens_per_second", "peak_memory_bytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in."""
    folder = tmp_path_factory.mktemp("work")
    image = Image.new("RGBA", (40, 30), (200, 30, 30, 0))
    image.paste((0, 0, 0, 255), (5, 2, 15, 8))
    image.save(folder / "logo.png")
    shutil.copy(DEMO / "sample-1.png", folder / "with blank.png")
    (folder / "damaged.png").write_bytes((DEMO / "sample-1.png").read_bytes()[:500])
    (folder / "text.txt").write_text("no picture")
    shutil.copytree(DEMO, folder / "own")
    return folder


@pytest.fixture(scope="module", autouse=True)
def converted(folder: Path, cache: Path) -> None:
    """Converts the checkpoint beside the pictures, of which only the first run would tell."""
    assert fastvlm(cache, "generate", "-m", str(folder / "own"), "-p", "Hello", "-n", "1").returncode == 0


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder in which a background server holds the demo model."""
    cache = tmp_path_factory.mktemp("cache")
    with background(cache, "demo"):
        yield cache


@pytest.fixture(autouse=True)
def prepared(cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FASTVLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FASTVLM_CACHE", str(cache))
    monkeypatch.setenv("FASTVLM_MODEL", "demo")
    monkeypatch.chdir(folder)


def run(text: str, folder: Path, *more: str) -> Result:
    text, _, source = text.partition(" < ")
    names = {
        "$1": str(DEMO / "sample-1.png"),
        "$2": os.path.relpath(DEMO / "sample-2.png", folder),
        "$DATA": DATA_URL,
        "$OWN": str(folder / "own"),
        "$LONG": "word " * 3000,
        "$VERY_LONG": "word " * 30_000,
    }
    words = [names.get(word, word) for word in shlex.split(text)]
    return CliRunner().invoke(app, ["generate", *words, *more], input=STDIN.get(source))


def masked(result: Result, *, json_output: bool) -> tuple[Any, list[str], int]:
    """What has to be the same: without times, and without what --verbose says of the server."""
    stdout: Any = result.stdout
    if json_output and result.exit_code == 0:
        stdout = {key: value for key, value in json.loads(stdout).items() if key not in MASKED}
    numbers = ("time: ", "memory: ", "server: ")
    return stdout, [line for line in result.stderr.splitlines() if not line.startswith(numbers)], result.exit_code


@pytest.mark.parametrize("text", [line for line in LINES.splitlines() if line])
def test_a_command_line_gives_the_same_with_and_without_the_server(text: str, folder: Path) -> None:
    words = text.partition(" < ")[0].split()
    cold, warm = run(text, folder, "--no-warm"), run(text, folder)
    assert masked(warm, json_output="--json" in words) == masked(cold, json_output="--json" in words)


@pytest.mark.parametrize(
    ("text", "is_used"),
    [
        ("$1 --dtype float32 -v", True),
        ("$1 --dtype float32 --json -v", True),
        ("logo.png - --dtype float32 -v < picture", True),
        ("-p Hello --dtype float32 -v", True),
        ("$1 --dtype float16 -v", False),
        ("$1 --no-warm -v", False),
        ("$1 -m $OWN -v", False),
    ],
)
def test_the_server_answers_what_it_holds_and_nothing_else(text: str, is_used: bool, folder: Path) -> None:
    result = run(text, folder)
    assert result.exit_code == 0
    assert ("server: process" in result.stderr) == is_used


@pytest.mark.parametrize(("name", "value"), [("FASTVLM_WARM", "0"), ("FASTVLM_BLAS", "none"), ("MLX_ENABLE_TF32", "0")])
def test_a_variable_that_may_change_answers_keeps_the_server_out(
    name: str, value: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "blas", lambda: backend.BLAS(name="fast"))
    monkeypatch.setenv(name, value)
    assert "server: process" not in run("$1 -v", folder).stderr


def test_a_server_of_another_version_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "__version__", "0.0.0")
    result = run("$1 -v", folder)
    assert result.exit_code == 0
    assert "server: process" not in result.stderr
