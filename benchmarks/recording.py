"""Writes the reports of the scripts beside this file: a JSON file for each, and their tables into README.md."""

import json
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from peers import RESULTS

from fastvlm_mlx.machine import describe

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
BUILD = HERE.parent / "build"


def write_report(kind: str, values: Mapping[str, Any], *words: str, record: bool) -> Path:
    """Writes a report to `<kind>-<words>-<system>-<chip>.json`; returns the file.

    Args:
        kind: What was measured.
        values: The report.
        *words: The model, and other settings that tell reports apart.
        record: Whether it goes into the tracked results; otherwise into build/.
    """
    name = "-".join([*words, platform.system(), describe().chip]).lower()
    folder = RESULTS if record else BUILD
    folder.mkdir(exist_ok=True)
    file = folder / f"{kind}-{re.sub(r'[^a-z0-9.]+', '-', name).strip('-')}.json"
    file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return file


def write_tables(kind: str, table: Callable[[dict[str, Any]], Iterable[str]], readme: Path = README) -> None:
    """Writes the tables of all tracked reports of a kind between its markers in a README.

    Args:
        kind: What the files' names and the markers begin with.
        table: Returns the lines of one report's table.
        readme: Has `<!-- bench-KIND:begin -->` and `<!-- bench-KIND:end -->`.

    Raises:
        ValueError: If a marker is missing, or there twice.
    """
    begin, end = (f"<!-- bench-{kind}:{edge} -->" for edge in ("begin", "end"))
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob(f"{kind}-*.json"))]
    before, rest = readme.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    content = "\n\n".join("\n".join(table(values)) for values in reports)
    readme.write_text(f"{before}{begin}\n{content}\n{end}{after}", encoding="utf-8")
