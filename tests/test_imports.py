"""The layout is the architecture: what may import what, and what only some may do at all."""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUNTIME = ROOT / "fastvlm_mlx"
CONVERT = ROOT / "convert"

# A row may import the rows above it; those of one row may not import each other, unless they are in order in a tuple.
LAYERS: tuple[tuple[str | tuple[str, ...], ...], ...] = (
    (("formatting", "errors", "intervals", "outputs", "schema", "arguments"),),
    (("kernels", "backend", "machine", "streams", "projections", "config"),),
    ("inputs", "model"),
    ("checkpoint",),
    ("convert", "engine", "structured"),
    (("cache", "resolve"), "generation"),
    (("jobs", "cluster"), "warm"),
    (("bench", "doctor"), ("album", "server"), "chat", "watch"),
    (("cli", "__main__"),),
)
# The same for the folders and files of convert/.
CONVERT_LAYERS: tuple[tuple[str | tuple[str, ...], ...], ...] = (
    (("arrays", "parts", "progress", "scratch"),),
    ("source", "fold", "write"),
    ("plan",),
    ("conversion",),
    ("compare",),
    ("quantize",),
    ("export",),
    ("request",),
    ("pipeline",),
    ("__init__",),
)
# The only imports upwards, inside functions: what users of this ecosystem type first. Each is a method of one line.
UPWARD = {
    ("model", "resolve"): "FastVLM.from_pretrained",
    ("model", "checkpoint"): "FastVLM.from_pretrained",
    ("inputs", "resolve"): "FastVLMProcessor.from_pretrained",
    ("model", "engine"): "FastVLM.generate",
}
FRAMEWORKS = {"torch", "torchvision", "transformers", "timm", "mlx_vlm", "jax", "tensorflow"}


@dataclass(frozen=True)
class Import:
    target: str
    lazy: bool
    typing: bool
    line: int
    scope: str


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path: Path) -> tuple[Import, ...]:
    """Every import of a file, those in functions and those for type checkers too."""

    def walk(node: ast.AST, scope: tuple[str, ...], lazy: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            where = ".".join(scope)
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, lazy, typing, child.lineno, where) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{path}:{child.lineno}: a relative import"
                module = child.module or ""
                for alias in child.names:
                    # `from package import name` counts as `package.name` if that is a module of ours
                    full = f"{module}.{alias.name}"
                    yield Import(full if is_module(full) else module, lazy, typing, child.lineno, where)
            inside = (*scope, child.name) if isinstance(child, ast.FunctionDef | ast.ClassDef) else scope
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            checking = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from walk(child, inside, lazy or function, typing or checking)

    return tuple(walk(tree_of(path), (), False, False))


@functools.cache
def is_module(dotted: str) -> bool:
    parts = dotted.split(".")
    if parts[:2] == ["fastvlm_mlx", "convert"]:
        place = CONVERT.joinpath(*parts[2:])
    elif parts[0] == "fastvlm_mlx":
        place = RUNTIME.joinpath(*parts[1:])
    else:
        return False
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def dotted(path: Path) -> str:
    """The name of a module: `fastvlm_mlx.convert.plan` for convert/plan.py."""
    inside = path.relative_to(CONVERT) if path.is_relative_to(CONVERT) else path.relative_to(RUNTIME)
    parts = inside.with_suffix("").parts
    return ".".join(["fastvlm_mlx", *(["convert"] if path.is_relative_to(CONVERT) else []), *parts])


def layer_of(module: str) -> str | None:
    """The layer of a module of ours; None for others and for the public names of the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "fastvlm_mlx" and len(parts) > 1 else None


def row(layers: tuple[tuple[str | tuple[str, ...], ...], ...], name: str) -> tuple[int, int, int]:
    """The row of a layer, its place in the row, and its place among those that are in order."""
    for number, siblings in enumerate(layers):
        for place, sibling in enumerate(siblings):
            members = sibling if isinstance(sibling, tuple) else (sibling,)
            if name in members:
                return number, place, members.index(name)
    raise AssertionError(f"{name} has no place yet; give it one in the table of {__file__}")


def may_import(layers: tuple[tuple[str | tuple[str, ...], ...], ...], here: str, there: str) -> bool:
    first, second = row(layers, here), row(layers, there)
    return here == there or second[0] < first[0] or (second[:2] == first[:2] and second[2] < first[2])


FILES = sorted(p for folder in (RUNTIME, CONVERT) for p in folder.rglob("*.py") if p != RUNTIME / "__init__.py")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def layer(path: Path) -> str:
    return layer_of(dotted(path)) or ""


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_one_way(path: Path) -> None:
    here = layer(path)
    for found in imports(path):
        there = layer_of(found.target)
        if there is None or may_import(LAYERS, here, there):
            continue
        where = f"{name(path)}:{found.line} imports {found.target}"
        assert (here, there) in UPWARD, where
        assert found.typing or (found.lazy and found.scope == UPWARD[here, there]), where


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(CONVERT)], ids=name)
def test_the_steps_of_the_converter_point_one_way(path: Path) -> None:
    here = path.relative_to(CONVERT).parts[0].removesuffix(".py")
    for found in imports(path):
        parts = found.target.split(".")
        if parts[:2] == ["fastvlm_mlx", "convert"] and len(parts) > 2:
            assert may_import(CONVERT_LAYERS, here, parts[2]), f"{name(path)}:{found.line} imports {found.target}"


def test_no_import_is_part_of_a_circle() -> None:
    """Of those that run when a module is loaded, and of those inside functions but for the methods named above."""
    arrows = {
        dotted(path): {
            found.target
            for found in imports(path)
            if is_module(found.target) and not found.typing and found.scope not in UPWARD.values()
        }
        for path in FILES
    }
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for target in arrows.get(module, ()):
                visit(target, (*above, module))
            done.add(module)

    for module in arrows:
        visit(module, ())


@pytest.mark.parametrize("path", [p for p in FILES if layer(p) == "inputs"], ids=name)
def test_inputs_never_import_mlx(path: Path) -> None:
    assert not [f.line for f in imports(path) if f.target.split(".")[0] == "mlx" or layer_of(f.target) == "backend"]


@pytest.mark.parametrize("path", [p for p in FILES if layer(p) == "model"], ids=name)
def test_the_model_never_opens_a_file(path: Path) -> None:
    assert not {f.target.split(".")[0] for f in imports(path)} & {"pathlib", "io", "os", "PIL", "tokenizers", "json"}
    assert not calls(path) & {"open", "mx.load", "mx.save", "mx.save_safetensors", "mx.save_gguf"}


@pytest.mark.parametrize("path", [p for p in FILES if layer(p) == "engine"], ids=name)
def test_the_engine_knows_neither_text_nor_files(path: Path) -> None:
    assert not {f.target.split(".")[0] for f in imports(path)} & {"pathlib", "io", "os", "PIL", "tokenizers", "json"}
    ours = {layer_of(f.target) for f in imports(path)} - {None}
    assert ours <= {"engine", "model", "config", "backend", "streams", "errors", "schema", "arguments"}


@functools.cache
def calls(path: Path) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)}


@pytest.mark.parametrize(
    "path", [p for p in FILES if layer(p) not in ("bench", "doctor", "jobs", "warm", "cli")], ids=name
)
def test_the_json_of_checkpoints_is_decoded_in_one_place(path: Path) -> None:
    assert layer(path) == "schema" or not calls(path) & {"json.load", "json.loads"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_mlx_comes_from_backend(path: Path) -> None:
    """`backend` loads the BLAS before MLX, so nothing else may load MLX before it."""
    direct = [f.line for f in imports(path) if f.target.split(".")[0] == "mlx" and f.target != "mlx.utils"]
    assert layer(path) == "backend" or not direct, f"{name(path)}: lines {direct}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_imports_a_training_framework(path: Path) -> None:
    assert not {f.target.split(".")[0] for f in imports(path)} & FRAMEWORKS


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_the_cache_and_the_command_line_import_the_converter(path: Path) -> None:
    if layer(path) not in ("convert", "cache", "resolve", "cli"):
        assert not [f.line for f in imports(path) if layer_of(f.target) == "convert"]


@pytest.mark.parametrize("path", [p for p in FILES if layer(p) == "cli"], ids=name)
def test_the_command_line_imports_the_runtime_inside_commands(path: Path) -> None:
    instant = {"cli", "errors", "formatting", "kernels", "machine", None}  # none of these imports MLX or NumPy
    assert not [f.target for f in imports(path) if not (f.lazy or f.typing or layer_of(f.target) in instant)]


@pytest.mark.parametrize("path", [p for p in FILES if layer(p) != "cli"], ids=name)
def test_only_the_command_line_prints_or_exits(path: Path) -> None:
    assert not calls(path) & {"print", "exit", "quit", "sys.exit", "os._exit", "sys.stdout.write", "sys.stderr.write"}
    assert not {f.target.split(".")[0] for f in imports(path)} & {"typer", "rich", "click"}
