"""The import order inside the converter: each step knows the steps before it, never those after it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

CONVERT = Path(__file__).parents[2] / "convert"

# A step may import the rows above its own and what is in its folder, but no other step of its row.
ROWS = (
    ("arrays", "parts", "progress", "scratch"),
    ("source", "fold", "write"),
    ("plan",),
    ("conversion",),
    ("compare",),
    ("quantize",),
    ("export",),
    ("pipeline",),
)
ROW = {step: number for number, row in enumerate(ROWS) for step in row}
FILES = sorted(path for path in CONVERT.rglob("*.py") if path != CONVERT / "__init__.py")


def step(path: Path) -> str:
    return path.relative_to(CONVERT).parts[0].removesuffix(".py")


def imported_steps(path: Path) -> Iterator[tuple[str, int]]:
    """The steps of the converter that a file imports, and the lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            modules = [f"{base}.{alias.name}" for alias in node.names] if base == "fastvlm_mlx.convert" else [base]
        else:
            continue
        yield from (
            (module.split(".")[2], node.lineno) for module in modules if module.startswith("fastvlm_mlx.convert.")
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONVERT)))
def test_each_step_imports_earlier_steps_only(path: Path) -> None:
    here = step(path)
    wrong = [
        f"line {line}: {there}" for there, line in imported_steps(path) if there != here and ROW[there] >= ROW[here]
    ]
    assert not wrong
