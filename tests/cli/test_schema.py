"""`fastvlm generate --schema`: JSON on stdout, and an exit code that says whether it is whole."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import fastvlm_mlx
from fastvlm_mlx import backend
from fastvlm_mlx.cli import app

pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

PICTURE = str(Path(fastvlm_mlx.__file__).parent / "demo_model" / "sample-2.png")
SCENE = {
    "type": "object",
    "properties": {"shape": {"enum": ["cube", "ball"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["shape", "count"],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that holds the demo model."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTVLM_CACHE", str(folder))
        fastvlm_mlx.load("demo", lazy=True)
    return folder


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("FASTVLM_CACHE", str(cache))
    monkeypatch.setattr(backend, "blas", lambda: backend.BLAS(name="fast"))  # or each answer comes with a note


@pytest.fixture
def schema(tmp_path: Path) -> str:
    path = tmp_path / "scene.json"
    path.write_text(json.dumps(SCENE))
    return str(path)


def ask(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["generate", PICTURE, "-m", "demo", *arguments])


def test_the_answer_is_json_of_the_schema(schema: str) -> None:
    result = ask("--schema", schema)
    assert (result.exit_code, result.stderr) == (0, "")
    value = json.loads(result.stdout)
    assert list(value) == ["shape", "count"]
    described = json.loads(ask("--schema", schema, "--json").stdout)
    assert (described["parsed"], described["valid"], described["text"]) == (value, True, result.stdout.strip())


def test_an_answer_that_is_cut_makes_the_exit_code_3(schema: str) -> None:
    result = ask("--schema", schema, "--max-tokens", "5")
    assert result.exit_code == 3
    assert result.stderr == "the answer was cut after 5 tokens, so it is no JSON; --max-tokens allows more\n"
    described = ask("--schema", "json", "--max-tokens", "5", "--json")
    assert described.exit_code == 3
    assert {key: json.loads(described.stdout)[key] for key in ("parsed", "valid", "finish_reason")} == {
        "parsed": None,
        "valid": False,
        "finish_reason": "length",
    }
    stopped = ask("--schema", schema, "--stop", "shape")
    assert (stopped.exit_code, stopped.stdout) == (3, '{"\n')
    assert stopped.stderr == "the answer was cut by a stop string, so it is no JSON\n"


def test_any_object_needs_no_file() -> None:
    assert isinstance(json.loads(ask("--schema", "json", "--max-tokens", "400").stdout), dict)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"properties": {"a": {"not": {}}}}',
            "--schema: schema at #/properties/a: the keyword 'not' is not",
        ),
        ("{", "scene.json: cannot be read as JSON (Expecting property name"),
        ("[]", "scene.json: must hold a JSON object, not a list; see"),
        ('{"type": "null", "type": "string"}', "scene.json: cannot be read as JSON (a key appears twice); see"),
        (None, "--schema: "),
    ],
)
def test_a_bad_schema_is_wrong_usage(monkeypatch: pytest.MonkeyPatch, schema: str, content: str, message: str) -> None:
    monkeypatch.setattr(fastvlm_mlx, "load", None)  # nothing is loaded for it
    if content is None:
        Path(schema).unlink()
        message += f"{schema}: no such file"
    else:
        Path(schema).write_text(content)
    result = ask("--schema", schema)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_choices_have_no_schema(schema: str) -> None:
    result = ask("--schema", schema, "--choice", "yes", "--choice", "no")
    assert result.exit_code == 2
    assert "--schema: would change nothing with --choice" in result.stderr
