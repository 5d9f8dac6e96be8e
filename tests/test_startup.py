"""What is imported, and so what a start costs."""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastvlm_mlx
import fastvlm_mlx.errors
from tests.checkpoints import APPLE

RUN = """
import json, sys
sys.argv = {argv!r}
try:
    from fastvlm_mlx.cli import main
    main()
finally:
    with open({report!r}, "w") as file:
        json.dump(sorted({{name.split(".")[0] for name in sys.modules}}), file)
"""


def imported_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after `code`."""
    code += "\nimport sys, json; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def imported_by_command(report: Path, *arguments: str) -> tuple[set[str], str]:
    """The top-level modules that `fastvlm …` has imported at its end, and its stdout."""
    code = RUN.format(argv=["fastvlm", *arguments], report=str(report))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(report.read_text())), done.stdout


def test_importing_the_package_imports_neither_mlx_nor_numpy() -> None:
    assert not imported_by("import fastvlm_mlx") & {"mlx", "numpy", "PIL", "tokenizers", "huggingface_hub", "typer"}


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["convert", "--help"], ["--version"]])
def test_help_imports_no_mlx_numpy_or_transformers(tmp_path: Path, arguments: list[str]) -> None:
    modules, _ = imported_by_command(tmp_path / "modules.json", *arguments)
    assert "typer" in modules
    assert not modules & {"mlx", "mlx_lm", "numpy", "transformers", "PIL", "tokenizers", "huggingface_hub", "rich"}


def test_a_start_imports_only_the_command_that_runs() -> None:
    code = """
import sys
from contextlib import suppress
from fastvlm_mlx.cli import app
for arguments in (["--help"], ["--version"], ["generate", "--help"]):
    with suppress(SystemExit):
        app(arguments)
print(sorted(name for name in sys.modules if name.startswith("fastvlm_mlx.cli.")))
print([name for name in ("concurrent.futures", "json", "logging") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, slow = done.stdout.splitlines()[-2:]
    assert "fastvlm_mlx.cli.generate" in ours
    assert not [name for name in ("bench", "caption", "convert", "doctor", "evaluate") if f"cli.{name}" in ours]
    assert slow == "[]"


def test_a_dry_run_of_convert_imports_no_mlx(tmp_path: Path) -> None:
    modules, plan = imported_by_command(tmp_path / "modules.json", "convert", str(APPLE / "train"), "--dry-run")
    assert "vision tower" in plan
    assert not modules & {"mlx", "transformers", "PIL", "huggingface_hub", "rich"}


def test_generate_imports_neither_mlx_lm_nor_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    image = str(APPLE / "images" / "square.png")
    arguments = ["generate", image, "--model", str(APPLE / "reparam"), "--max-tokens", "2", "--json"]
    imported_by_command(tmp_path / "modules.json", *arguments)  # converts
    modules, answer = imported_by_command(tmp_path / "modules.json", *arguments)
    assert json.loads(answer)["visual_tokens"] == 4
    assert "mlx" in modules
    assert not modules & {"mlx_lm", "transformers", "torch", "rich"}
    assert "tokenizers" not in modules  # its tables lie beside the converted model


def test_the_blas_is_loaded_before_mlx_whatever_is_imported_first() -> None:
    code = "from fastvlm_mlx import load; from fastvlm_mlx.backend import blas; assert 'before mlx' not in blas().hint"
    assert "mlx" in imported_by(code)


@pytest.mark.parametrize("name", ["fastvlm_mlx", "fastvlm_mlx.convert"])
def test_public_names_resolve_and_unknown_ones_do_not(name: str) -> None:
    package = importlib.import_module(name)
    for public in package.__all__:
        value = getattr(package, public)
        assert not inspect.ismodule(value)
        assert inspect.getdoc(value) or not (inspect.isclass(value) or inspect.isfunction(value)), public
    assert dir(package) == sorted(package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


def test_every_error_can_be_imported_from_the_package() -> None:
    errors = {name for name, value in vars(fastvlm_mlx.errors).items() if inspect.isclass(value)} - {"Any"}
    assert errors <= set(fastvlm_mlx.__all__)


def test_the_module_runs_the_command_line() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fastvlm_mlx", "--version"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, f"fastvlm-mlx {fastvlm_mlx.__version__}\n")
