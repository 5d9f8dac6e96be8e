"""The READMEs: links lead somewhere, commands exist, and the first one is short and repeats measured numbers."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from fastvlm_mlx.cli.app import app

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *(ROOT / name / "README.md" for name in ("benchmarks", "convert", "demo", "fastvlm_mlx/server")),
]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[str]:
    """The calls of `fastvlm` in code blocks, without comments and without the rest of a pipe."""
    lines = re.findall(r"^(?: {4})?(?:\$ |.*\| )?(fastvlm .*)$", text, re.MULTILINE)
    return [re.split(r"\s+#|\s\|\s", line)[0] for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        page_of = file / "README.md" if file.is_dir() else file
        assert not anchor or anchor in anchors(page_of.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_their_options_exist(page: Path) -> None:
    root: Any = typer.main.get_command(app)
    for line in commands(page.read_text(encoding="utf-8")):
        command, words = root, shlex.split(line)[1:]
        while words and words[0] in getattr(command, "commands", ()):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts} | {"--install-completion"}
        unknown = {word for word in words if re.fullmatch(r"--?[a-z][\w-]*", word)} - known
        assert not unknown, line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = re.findall(r"^(?: {4})?make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= targets


def test_the_commands_are_found() -> None:
    found = commands(README.read_text(encoding="utf-8"))
    named = {shlex.split(line)[1] for line in found}
    assert named >= {"generate", "convert", "quantize", "search", "watch", "eval", "bench"}
    assert "fastvlm generate - --json" in found


def test_the_first_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130


def test_its_numbers_are_those_of_the_benchmarks() -> None:
    """The rows are copied from the table that `benchmarks/peers.py` writes."""
    measured = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if re.search(r"\| \d+ px \|", line)]
    assert len(rows) >= 4
    assert set(rows) <= set(measured)
