"""What is built: every package under its own name, the data beside it, and nothing else in site-packages."""

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import entry_points, requires, version
from pathlib import Path

import pytest

import fastvlm_mlx

ROOT = Path(__file__).parent.parent
PACKAGES = {"fastvlm_mlx": ROOT / "fastvlm_mlx", "fastvlm_mlx/convert": ROOT / "convert"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy of the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    for folder in ("fastvlm_mlx", "convert"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for kind in ("wheel", "sdist"):
        code = f"from setuptools import build_meta; build_meta.build_{kind}('.')"
        done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return tree


def modules() -> set[str]:
    """Every Python file of the package by the path it installs to."""
    return {
        f"{name}/{file.relative_to(folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for file in folder.rglob("*.py")
    }


def test_the_wheel_holds_every_module_and_no_top_level_convert(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert modules() <= names
    assert {"fastvlm_mlx/py.typed", "fastvlm_mlx/server/page.html", "fastvlm_mlx/album/page.html"} <= names
    assert {f"fastvlm_mlx/demo_model/{name}" for name in ("model.safetensors", "vocab.json", "samples.jsonl")} <= names
    assert not [name for name in names if name.endswith(".md")]  # convert/README.md is for readers of the repository
    top = {name.split("/")[0] for name in names}
    assert top == {"fastvlm_mlx", f"fastvlm_mlx-{fastvlm_mlx.__version__}.dist-info"}


def test_the_sdist_holds_every_source(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(file.relative_to(ROOT)) for folder in PACKAGES.values() for file in folder.rglob("*.py")}
    assert sources | {"pyproject.toml", "README.md", "LICENSE", "fastvlm_mlx/demo_model/model.safetensors"} <= names


def test_the_installed_converter_is_this_one() -> None:
    found = importlib.util.find_spec("fastvlm_mlx.convert")
    assert found is not None
    assert found.origin is not None
    assert Path(found.origin) == ROOT / "convert" / "__init__.py"


def test_the_version_has_one_source() -> None:
    assert version("fastvlm-mlx") == fastvlm_mlx.__version__


@pytest.mark.parametrize("command", ["fastvlm", "fastvlm-mlx"])
def test_both_commands_are_the_same_entry_point(command: str) -> None:
    assert [point.value for point in entry_points(group="console_scripts", name=command)] == ["fastvlm_mlx.cli:main"]


def test_the_runtime_does_not_depend_on_training_frameworks() -> None:
    needed = [line for line in requires("fastvlm-mlx") or [] if "extra ==" not in line]
    assert not [line for line in needed if line.startswith(("torch", "transformers", "timm", "mlx-vlm"))]
