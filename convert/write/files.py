"""Writes the small files of a checkpoint folder."""

import json
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

REPORT_FILE = "quantization_report.json"
INDEX_FILE = "model.safetensors.index.json"
REPORTS = (REPORT_FILE, "README.md")
"""The files that describe a quantization; reported sizes leave them out."""

_LICENCES = re.compile(r"(licen[cs]e|notice|acknowledg|copying)", re.IGNORECASE)


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Writes a JSON file of a checkpoint."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_small_files(source: Path, target: Path) -> None:
    """Copies everything but weights, hidden files and the files that every step writes anew."""
    rewritten = {"config.json", "README.md", INDEX_FILE, REPORT_FILE}
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in rewritten and file.name[0] != ".":
            shutil.copyfile(file, target / file.name)


def copy_licences(folders: Iterable[Path], target: Path) -> None:
    """Copies the licence files of `folders`; of two with one name, the first folder's."""
    files = {name: folder / name for folder in reversed(list(folders)) for name in licences(folder)}
    for name, path in files.items():
        shutil.copyfile(path, target / name)


def licences(folder: Path) -> list[str]:
    """The names of the licence files in a folder, which a model card can show."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and _LICENCES.match(path.name) and path.name.isprintable()
    )


def folder_bytes(folder: Path, without: Collection[str] = ()) -> int:
    """The bytes of the files in a folder, except those named `without`."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file() and file.name not in without)
