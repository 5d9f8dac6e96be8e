"""House rules that the imports prove: one direction, one way to MLX, no training frameworks, only the CLI prints."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUNTIME = ROOT / "fastvlm_mlx"
CONVERT = ROOT / "convert"

# Each module imports only from those before it. A new module has to be given its place here.
ORDER = (
    *("errors", "formatting", "backend", "machine", "streams", "config"),
    *("engine", "model", "inputs", "checkpoint", "generation", "jobs"),
    *("bench", "cli"),
)
# Inside functions only: `from_pretrained` resolves names, and `checkpoint` converts what is not converted yet.
UPWARD_WHEN_CALLED = {
    ("model", "checkpoint"),
    ("inputs", "checkpoint"),
    ("checkpoint", "convert"),
    ("cli", "convert"),
}
FRAMEWORKS = {"torch", "torchvision", "transformers", "timm", "mlx_vlm", "jax", "tensorflow"}


@dataclass(frozen=True)
class Import:
    target: str
    lazy: bool
    line: int


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file; `from package import name` counts as `package.name` where that is a module of ours."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, lazy, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                module = child.module or ""
                if child.level:
                    module = ".".join(filter(None, ["fastvlm_mlx.convert", module]))
                if module in ("fastvlm_mlx", "fastvlm_mlx.cli", "mlx"):
                    yield from (Import(f"{module}.{alias.name}", lazy, child.lineno) for alias in child.names)
                else:
                    yield Import(module, lazy, child.lineno)
            yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


def layer(path: Path) -> str:
    """The layer that a file belongs to: its own name, or its package's."""
    if path.is_relative_to(CONVERT):
        return "convert"
    return path.relative_to(RUNTIME).parts[0].removesuffix(".py")


def layer_of(target: str) -> str | None:
    """The layer of an imported module of ours; None for others and for the public names of the package itself."""
    parts = target.split(".")
    if parts[0] != "fastvlm_mlx" or len(parts) == 1:
        return None
    return parts[1] if parts[1] in (*ORDER, "convert") else None


FILES = sorted(p for folder in (RUNTIME, CONVERT) for p in folder.rglob("*.py") if p != RUNTIME / "__init__.py")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_module_has_its_place() -> None:
    assert {layer(path) for path in FILES} - {"convert"} <= set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_one_way(path: Path) -> None:
    here = layer(path)
    for found in imports(path):
        there = layer_of(found.target)
        if there is None or there == here or (here, there) == ("engine", "model"):  # the KV cache, until it has a file
            continue
        where = f"{name(path)}:{found.line} imports {found.target}"
        if here == "convert":
            assert there != "cli", where
        elif there == "convert" or ORDER.index(there) > ORDER.index(here):
            assert (here, there) in UPWARD_WHEN_CALLED, where
            assert found.lazy or _type_checking_only(path, found.target), f"{where}: must be inside a function"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_mlx_comes_from_backend(path: Path) -> None:
    """`backend` loads the BLAS before MLX, so nothing else may load MLX before it."""
    direct = [f.line for f in imports(path) if f.target.split(".")[0] == "mlx" and f.target != "mlx.utils"]
    assert layer(path) == "backend" or not direct, f"{name(path)}: lines {direct}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_imports_a_training_framework(path: Path) -> None:
    assert not {f.target.split(".")[0] for f in imports(path)} & FRAMEWORKS


@pytest.mark.parametrize("path", FILES, ids=name)
def test_mlx_lm_is_imported_only_where_it_is_used(path: Path) -> None:
    """Importing any part of mlx_lm takes about a second."""
    assert all(f.lazy for f in imports(path) if f.target.split(".")[0] == "mlx_lm")


@pytest.mark.parametrize("path", [p for p in FILES if layer(p) == "cli"], ids=name)
def test_the_command_line_imports_the_runtime_inside_commands(path: Path) -> None:
    instant = {"cli", "errors", "formatting", None}
    eager = [f.target for f in imports(path) if not f.lazy and layer_of(f.target) not in instant]
    checked = [target for target in eager if not _type_checking_only(path, target)]
    assert not checked


def _type_checking_only(path: Path, target: str) -> bool:
    """Whether a module is imported under `if TYPE_CHECKING:` alone."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return any(isinstance(child, ast.ImportFrom) and child.module == target for child in node.body)
    return False


@pytest.mark.parametrize("path", [p for p in FILES if layer(p) != "cli"], ids=name)
def test_only_the_command_line_prints_or_exits(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"print", "exit", "quit", "sys.exit", "os._exit", "sys.stdout.write", "sys.stderr.write"}
    assert not {f.target.split(".")[0] for f in imports(path)} & {"typer", "rich", "click"}
