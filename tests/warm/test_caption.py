"""Captions of the background server are those that this process would write."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fastvlm_mlx.cli import app
from fastvlm_mlx.warm import engine
from fastvlm_mlx.warm.client import Silent, status
from tests.warm.background import DEMO, background, environment, place_in

# Options, and how many answers there are to six pictures: one is a copy, two are none.
OPTIONS = {
    "-n 8": 3,
    "-p 'Describe {name}' --ask 'count=How many shapes are there?' -n 8 --background white": 8,  # its name counts
    "-p 'What is it?' --ask 'count=How many shapes are there?' -n 8 --resolution 64": 6,
    "--prefix 'A red' -n 8 --txt --csv table.csv": 3,
    "--max-words 3 --batch 2": 3,
    "--sentence --keep-openings --system 'Be brief.' -r auto": 3,
    "--schema json -n 12": 3,
    "--schema schema.json --dtype float32": 3,
}
SCHEMA = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder in which a background server holds the demo model."""
    cache = tmp_path_factory.mktemp("cache")
    with background(cache, "demo"):
        yield cache


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Callable[[str], Path]]:
    """Lets commands use a cache folder; returns what makes a folder with the pictures and goes there."""
    for name in [name for name in os.environ if name.startswith("FASTVLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FASTVLM_MODEL", "demo")

    def within(name: str) -> Path:
        photos = tmp_path / name / "photos"
        photos.mkdir(parents=True)
        for number, target in enumerate(("b", "d", "f"), 1):
            shutil.copy(DEMO / f"sample-{number}.png", photos / f"{target}.png")
        shutil.copy(photos / "b.png", photos / "c.png")
        (photos / "a.png").write_bytes((photos / "b.png").read_bytes()[:500])
        (photos / "e.jpg").write_text("no picture")
        (photos.parent / "schema.json").write_text(json.dumps(SCHEMA))
        monkeypatch.chdir(photos.parent)
        return photos.parent

    def use(cache: Path) -> Callable[[str], Path]:
        monkeypatch.setenv("FASTVLM_CACHE", str(cache))
        return within

    return use


@pytest.fixture
def within(cache: Path, prepare: Callable[[Path], Callable[[str], Path]]) -> Callable[[str], Path]:
    return prepare(cache)


def run(options: str) -> Result:
    return CliRunner().invoke(app, ["caption", "photos", *shlex.split(options)])


def answered(cache: Path) -> int:
    """How many questions the server has answered so far."""
    return int((status(place_in(cache)) or {})["answered"])


def records(file: Path) -> list[dict[str, Any]]:
    """What a file holds, without times and the numbers of the pictures' files."""
    return [
        {key: value for key, value in json.loads(line).items() if key not in ("seconds", "stat")}
        for line in file.read_text().splitlines()
    ]


def said(result: Result) -> tuple[str, str, int]:
    """What a command has said and its exit code, without times."""
    stderr = re.sub(r"in [0-9.]+ s, [0-9.e+]+ pictures", "in N s, N pictures", result.stderr)
    return re.sub(r'"seconds": [0-9.]+', '"seconds": 0', result.stdout), stderr, result.exit_code


@pytest.mark.parametrize("options", OPTIONS)
def test_the_server_gives_the_same_records(options: str, cache: Path, within: Callable[[str], Path]) -> None:
    cold = within("cold")
    expected = said(run(f"{options} -o out.jsonl --no-warm"))
    warm, before = within("warm"), answered(cache)
    assert said(run(f"{options} -o out.jsonl")) == expected
    assert answered(cache) - before == OPTIONS[options]
    assert expected[2] == 3
    assert records(warm / "out.jsonl") == records(cold / "out.jsonl")
    for path in (*cold.glob("*.csv"), *cold.glob("photos/*.txt")):
        assert (warm / path.relative_to(cold)).read_bytes() == path.read_bytes()


def test_the_server_gives_the_same_lines_on_stdout(within: Callable[[str], Path]) -> None:
    within("here")
    assert said(run("-n 8")) == said(run("-n 8 --no-warm"))


@pytest.mark.parametrize(("first", "second"), [("", "--no-warm"), ("--no-warm", "")])
def test_a_run_goes_on_with_or_without_the_server(
    first: str, second: str, cache: Path, within: Callable[[str], Path]
) -> None:
    folder = within("here")
    run(f"-n 8 -o out.jsonl --include '[abc]*' {first}")
    half, before = (folder / "out.jsonl").read_text(), answered(cache)
    again = run(f"-n 8 -o out.jsonl {second}")
    assert "6 pictures, 2 done, 1 failed before" in again.stderr
    assert answered(cache) - before == (0 if second else 2)
    assert (folder / "out.jsonl").read_text().startswith(half)
    run("-n 8 -o whole.jsonl --no-warm")
    assert records(folder / "out.jsonl") == records(folder / "whole.jsonl")


@pytest.mark.parametrize("options", ["--no-warm", "-m ./own", "--dtype float16"])
def test_the_server_is_left_alone(options: str, cache: Path, within: Callable[[str], Path]) -> None:
    shutil.copytree(DEMO, within("here") / "own")
    before = answered(cache)
    assert run(f"-n 2 --include 'b*' {options}").exit_code == 0
    assert answered(cache) == before


def test_this_process_does_not_load_mlx(cache: Path, within: Callable[[str], Path]) -> None:
    within("here")
    code = (
        "import sys; from typer.testing import CliRunner; from fastvlm_mlx.cli import app; "
        "result = CliRunner().invoke(app, ['caption', 'photos', '-n', '2', '--include', 'b*']); "
        "sys.exit(result.exit_code or 'mlx.core' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(cache, FASTVLM_MODEL="demo"), check=False)
    assert done.returncode == 0


def test_pictures_that_a_killed_server_leaves_are_captioned_here(
    tmp_path: Path, prepare: Callable[[Path], Callable[[str], Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare(tmp_path / "cache")("here")
    with background(tmp_path / "cache", "demo") as holder:

        class Killer(Silent):
            seen_before = 0

            def seen(self) -> None:
                Killer.seen_before += 1
                if Killer.seen_before == 2:
                    os.kill(holder, signal.SIGKILL)

        monkeypatch.setattr(engine, "Silent", Killer)
        result = run("-o out.jsonl --batch 1 --ask 'count=How many shapes are there?' --force")
    assert Killer.seen_before == 2
    assert result.exit_code == 3
    assert "the background server does not answer any more; this process goes on\n" in result.stderr
    run("-o whole.jsonl --ask 'count=How many shapes are there?'")
    assert records(folder / "out.jsonl") == records(folder / "whole.jsonl")
    assert sum("error" in record for record in records(folder / "out.jsonl")) == 2
