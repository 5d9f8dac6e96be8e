"""Help in a user's words, wrong usage in one line, and options that would change nothing."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main
from typer.testing import CliRunner, Result

import fastvlm_mlx.cli
from fastvlm_mlx.cli import app
from fastvlm_mlx.cli.evaluate import Metric
from fastvlm_mlx.cli.options import complete_model, user_path
from fastvlm_mlx.jobs.metrics import METRICS
from tests.checkpoints import APPLE

PICTURE = str(APPLE / "images" / "square.png")
ROOT: Any = typer.main.get_command(app)


def invoke(*arguments: str, **variables: str) -> Result:
    return CliRunner().invoke(app, arguments, env=variables, prog_name="fastvlm")


def commands(group: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


@pytest.mark.parametrize("command", list(commands()), ids=lambda path: " ".join(path) or "fastvlm")
def test_help_says_what_values_are_and_not_which_type_python_gives_them(command: tuple[str, ...]) -> None:
    text = invoke(*command, "--help", COLUMNS="80").stdout
    assert text.startswith(f"Usage: {' '.join(('fastvlm', *command))}")
    assert not re.search(r"<(?!=)|[{}]|list\[|\bint\b|\bstr\b|\bfloat\b|\bINT\b|TEXT\.\.\.", text)
    assert max(map(len, text.splitlines())) <= 80
    first = text.partition("Commands:")[2]
    assert "..." not in first  # each command says in one line what it does


def test_no_command_is_left_out_of_the_list() -> None:
    folder = Path(fastvlm_mlx.cli.__file__).parent
    texts = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    files = {name for name, text in texts.items() if f"\ndef {name}(" in text or "\napp = typer.Typer(" in text}
    listed = {word for path in commands() for word in path}
    assert files - {"app"} <= {"evaluate" if name == "eval" else name for name in listed}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", PICTURE, "-n", "0"], "Invalid value for '--max-tokens' / '-n' (env var: 'FASTVLM_MAX_TOKENS'): "),
        (["generate", PICTURE, "-n", "many"], "'many' is not a"),
        (["generate", PICTURE, "--temp", "warm"], "'warm' is not a"),
        (["generate", PICTURE, "--top-p", "2"], "Invalid value for '--top-p': "),
        (["generate", PICTURE, "--repetition-penalty", "0"], "repetition_penalty must be above 0, not 0.0"),
        (["generate", PICTURE, "--seed", str(2**64), "--temp", "1"], "seed must be from 0 to 2**64 - 1"),
        (["generate", PICTURE, "--stop", ""], "a stop string is empty"),
        (["generate", PICTURE, "-r", "8192"], "resolution must be a multiple of 64 from 64 to 4096, not 8192"),
        (["generate", PICTURE, "-r", "9" * 5000], "is neither a positive multiple of 64 nor 'auto'"),
        (["convert", "demo", "out", "--dtype", "int8"], "'int8' is not one of 'float16', 'bfloat16', 'float32'"),
        (["convert", "demo", "out", "--q-bits", "7"], "7"),
        (["convert", "demo", "out", "-q", "--gate", "good"], "gate 'good' cannot be read"),
        (["convert", "demo", "out", "--upload-repo", "name"], "write it as owner/name"),
        (["quantize", "demo", "out", "--target-bpw", "99"], "99"),
        (["quantize", "demo", "~nobody-of-this-name/out"], "there is no such home folder; give the whole path"),
        (["bench", "-m", "demo", "--plot", "x.jpg"], "ends in none of .svg, .png, .pdf"),
        (["bench", "-m", "demo", "--json", ""], "the path is empty"),
        (["eval", "-m", "demo", "--data", "x", "--metric", "luck"], "luck"),
        (["generate", "\x1b]0;title\x07\n", "--nonsense\x1b"], r"--nonsense\x1b"),
        (["generate", PICTURE, "--dtype", "\x1b[2J" + "x" * 10_000], r"'\x1b[2Jxxx"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_2(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    line = result.stderr.removesuffix("\n")
    assert line.startswith("error: ")
    assert line.isprintable()
    assert len(line) <= 500
    assert message in line or message in line.replace("\\\\", "\\")
    assert "Value error" not in line
    assert "Input should" not in line


def test_wrong_usage_says_where_the_options_are_listed() -> None:
    assert invoke("bench", "compare", "a", "b", "--x").stderr.endswith("; see `fastvlm bench compare --help`\n")
    assert invoke("generate", PICTURE, FASTVLM_DEBUG="maybe").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["generate", PICTURE, "--seed", "1"], "--seed"),
        (["generate", PICTURE, "--top-p", "0.9"], "--top-p"),
        (["generate", PICTURE, "--top-k", "5"], "--top-k"),
        (["generate", PICTURE, "--min-p", "0.1"], "--min-p"),
        (["generate", "-p", "Hello", "-r", "256"], "--resolution"),
        (["info", "--revision", "main"], "--revision"),
        (["bench", "--cost", "-m", "demo", "--runs", "3"], "--runs"),
        (["bench", "--cost", "-m", "demo", "--dtype", "float16"], "--dtype"),
        (["bench", "--random-weights", "0.5b", "--revision", "x"], "--revision"),
        (["bench", "-m", "demo", "compare", "a.json", "b.json"], "--model"),
        (["cache", "--json", "rm", "demo"], "--json"),
        (["cache", "rm", "demo", "--all"], "--all"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(arguments: list[str], option: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert f"Invalid value for {option}: would change nothing " in result.stderr


def test_each_report_of_a_measurement_needs_a_file_of_its_own() -> None:
    result = invoke("bench", "-m", "demo", "--json", "x", "--csv", "./x")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "each report needs a file of its own" in result.stderr


def test_a_tilde_leads_home_unless_something_here_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.chdir(tmp_path)
    assert user_path("~/out") == Path("/home/someone/out")
    assert user_path("a~/out") == Path("a~/out")
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "out").touch()
    assert user_path("~/out") == Path("~/out")
    with pytest.raises(typer.BadParameter, match="no such home folder"):
        user_path("~nobody-of-this-name/out")


def test_a_model_is_completed_by_name_cache_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".apple--FastVLM-0.5B@main-0123.used").write_text("apple/FastVLM-0.5B@main")
    (tmp_path / "cache" / ".apple--FastVLM-1.5B@main-0123.lock").touch()
    here = tmp_path / "here"
    (here / "checkpoints" / "int4").mkdir(parents=True)
    (here / "model.zip").touch()
    (here / "photo.jpg").touch()
    monkeypatch.chdir(here)
    assert complete_model("") == ["demo", "0.5b", "1.5b", "7b", "apple/FastVLM-0.5B", "checkpoints/", "model.zip"]
    assert complete_model("a") == ["apple/FastVLM-0.5B"]
    assert complete_model("checkpoints/") == ["checkpoints/int4/"]
    assert complete_model("nowhere/") == []


@pytest.mark.parametrize("command", ["generate", "eval", "bench"])
def test_commands_that_ask_a_model_share_their_options(command: str) -> None:
    options = {name for option in ROOT.commands[command].params for name in option.opts}
    assert {"-m", "--model", "--revision", "-r", "--resolution", "--dtype"} <= options
    (resolution,) = (option for option in ROOT.commands[command].params if "-r" in option.opts)
    assert resolution.envvar == "FASTVLM_RESOLUTION"


def test_every_metric_can_be_chosen() -> None:
    assert {metric.value for metric in Metric} == set(METRICS)


@pytest.mark.parametrize("command", ["generate", "caption", "bench", "convert"])
def test_an_argument_that_no_file_name_can_be_is_wrong_usage(command: str) -> None:
    result = invoke(command, "\ud800")
    assert result.exit_code == 2
    assert "\\ud800 is not valid Unicode" in result.stderr
