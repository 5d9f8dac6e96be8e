"""Values are converted as Typer would, without what takes it long."""

import json
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from fastvlm_mlx.cli.usage import Command


class Colour(str, Enum):
    red = "red"
    green = "green"


def doubled(text: str) -> str:
    if text == "bad":
        raise typer.BadParameter("not this one")
    return 2 * text


def application(cls: Any) -> typer.Typer:
    app = typer.Typer(rich_markup_mode=None, add_completion=False)

    def show(
        names: Annotated[list[str] | None, typer.Argument()] = None,
        count: Annotated[int, typer.Option(min=1, max=9)] = 3,
        share: Annotated[float | None, typer.Option(min=0.0)] = None,
        flag: Annotated[bool, typer.Option("--flag/--no-flag", envvar="SHOW_FLAG")] = False,
        colour: Annotated[Colour | None, typer.Option()] = None,
        path: Annotated[Path | None, typer.Option()] = None,
        twice: Annotated[Any, typer.Option(parser=doubled)] = None,
        more: Annotated[list[str] | None, typer.Option()] = None,
    ) -> None:
        typer.echo(repr((names, count, share, flag, colour, path, twice, more)))

    app.command(cls=cls)(show)
    return app


OURS, TYPERS = application(Command), application(None)


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "a b",
        "--count 7",
        "--count 0",
        "--count 10",
        "--count 1e1",
        "--count ' 7'",
        "--count 7.0",
        "--count many",
        "--share 0.25",
        "--share 3",
        "--share -1",
        "--share nan",
        "--share 1e3",
        "--share x",
        "--flag",
        "--no-flag",
        "--colour red",
        "--colour blue",
        "--path here/there",
        "--twice ab",
        "--twice bad",
        "--more a --more b",
    ],
)
def test_a_value_is_what_typer_makes_of_it(arguments: str) -> None:
    words = [word.strip("'") for word in arguments.replace("' 7'", "'_7'").split(" ") if word]
    words = [word.replace("_", " ") for word in words]
    ours, typers = (CliRunner().invoke(app, words) for app in (OURS, TYPERS))
    assert (ours.exit_code, ours.stdout) == (typers.exit_code, typers.stdout)
    assert ours.stderr.splitlines()[-1:] == typers.stderr.splitlines()[-1:]


@pytest.mark.parametrize("value", ["0", "1", "yes", "maybe", ""])
def test_a_variable_is_what_typer_makes_of_it(value: str) -> None:
    ours, typers = (CliRunner().invoke(app, [], env={"SHOW_FLAG": value}) for app in (OURS, TYPERS))
    assert (ours.exit_code, ours.stdout) == (typers.exit_code, typers.stdout)


def test_a_command_whose_values_are_plain_imports_no_pydantic() -> None:
    code = """
import json, sys
from fastvlm_mlx.cli import app
try:
    app(["generate", "nowhere.png", "-n", "5", "--temp", "0.5", "--dtype", "float32", "-m", "nowhere/nothing"])
except SystemExit:
    print(json.dumps([name for name in ("pydantic", "typer") if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["typer"]
    assert "nowhere.png: no such file" in done.stderr
