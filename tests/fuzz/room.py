"""The folder that a case runs in: everything that it may write to, empty before and checked afterwards."""

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from tests.checkpoints import SOURCES, TESTS
from tests.fuzz.subject import FastVLM, FastVLMProcessor, Wrong, convert_checkpoint, is_complete, load

DEMO = TESTS.parent / "fastvlm_mlx" / "demo_model"
UPSTREAM = {**SOURCES, "demo": DEMO}
CONVERTED: dict[str, tuple[str, str]] = {
    "apple in float32": ("apple", "float32"),
    "apple in float16": ("apple", "float16"),
    "untied in bfloat16": ("apple-untied", "bfloat16"),
    "transformers in float32": ("transformers", "float32"),
    "8 bits": ("mlx-vlm-q8", "float32"),
    "4 bits": ("mlx-vlm-q4", "float16"),
}
"""Converted checkpoints: the source and the dtype."""


class Room:
    """Folders for one case after another: `work` is the current folder, and `out` does not exist at first.

    Args:
        root: An empty folder.
    """

    def __init__(self, root: Path) -> None:
        self._seeds = root / "seeds"
        self._seeds.mkdir()
        self.path = root / "room"
        self.input, self.out = self.path / "input", self.path / "out"
        self.work, self.home = self.path / "work", self.path / "home"
        self.cache, self.temporary = self.path / "cache", self.path / "temporary"
        self._watched: dict[Path, object] = {}
        self._models: dict[str, tuple[FastVLM, FastVLMProcessor]] = {}
        self.written: set[Path] = set()
        os.environ.update(FASTVLM_CACHE=str(self.cache), HOME=str(self.home), HF_HUB_OFFLINE="1")
        tempfile.tempdir = str(self.temporary)

    def clear(self) -> None:
        """Empties all folders."""
        os.chdir(self._seeds)
        folders = (self.input, self.work, self.home, self.cache, self.temporary)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        strangers = [path for path in self.path.iterdir() if path not in folders]
        for path in (*strangers, *(path for folder in folders for path in folder.iterdir())):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        os.chdir(self.work)
        self._watched.clear()
        self.written.clear()

    def upstream(self, name: str) -> Path:
        """A copy of an upstream checkpoint, whose files may be replaced but not written to."""
        return self._copy(self._small(name))

    def converted(self, name: str) -> Path:
        """A copy of a converted checkpoint, as above."""
        source, dtype = CONVERTED[name]
        return self._copy(self._seed(name, lambda folder: convert_checkpoint(self._small(source), folder, dtype=dtype)))

    def folder(self, name: str) -> Path:
        """A converted checkpoint outside the room, in float32 and with a short context, only to be read."""
        return self._seed(f"short {name}", lambda path: _convert_short(self._small(name), path))

    def model(self, name: str = "apple") -> tuple[FastVLM, FastVLMProcessor]:
        """A model and its processor, loaded once."""
        if name not in self._models:
            self._models[name] = load(self.folder(name))
        return self._models[name]

    def _small(self, name: str) -> Path:
        """An upstream checkpoint made for 64 pixels, which saves time in the calibration of float16."""
        return self._seed(name, lambda folder: _copy_small(UPSTREAM[name], folder))

    def _seed(self, name: str, make: Callable[[Path], object]) -> Path:
        folder = self._seeds / name
        if not folder.exists():
            make(folder)
        return folder

    def _copy(self, seed: Path) -> Path:
        folder = self.input / seed.name.replace(" ", "-")
        folder.mkdir()
        for file in seed.iterdir():
            if file.is_file():
                os.link(file, folder / file.name)
        return folder

    def watch(self, path: Path) -> Path:
        """Remembers what is at `path`, which must not change from now on."""
        self._watched[path] = _content(path)
        return path

    def check(self) -> None:
        """Raises `Wrong` if something was changed or left."""
        for path, content in self._watched.items():
            if _content(path) != content:
                raise Wrong(f"changed: {path.name}")
        for folder in (self.temporary, self.work, self.home):
            if left := [path for path in folder.rglob("*") if not path.is_dir() and not self._is_result(path)]:
                raise Wrong(f"left: {', '.join(str(path.relative_to(self.path)) for path in left[:3])}")
        if left := [path for path in self.temporary.iterdir() if path not in self.written]:
            raise Wrong(f"left: {', '.join(path.name for path in left[:3])} in the folder for temporary files")
        known = {self.input, self.work, self.home, self.cache, self.temporary, *self.written}
        if left := [path for path in self.path.iterdir() if path not in known]:
            raise Wrong(f"left: {', '.join(path.name for path in left[:3])}")
        if left := unfinished(self.cache):
            raise Wrong(f"left: {left[0]} in the cache, incomplete")

    def _is_result(self, path: Path) -> bool:
        return any(path == written or written in path.parents for written in self.written)


def unfinished(cache: Path) -> list[str]:
    """The names of what is left of an unfinished conversion in a cache folder, which may not exist."""
    entries = [entry for entry in cache.glob("*") if entry.name not in ("eval", "albums")]
    return [entry.name for entry in entries if ".partial" in entry.name or (entry.is_dir() and not is_complete(entry))]


def _copy_small(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder)
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(
        text.replace("mobileclip_l_128", "mobileclip_l_64").replace('"image_size": 128', '"image_size": 64')
    )


def _convert_short(source: Path, folder: Path) -> None:
    convert_checkpoint(source, folder, dtype="float32")
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_length": 300}))


def _content(path: Path) -> object:
    """What tells whether a file or folder has been changed."""
    if path.is_symlink():
        return os.readlink(path)
    if path.is_dir():
        return {child.name: _content(child) for child in path.iterdir()}
    status = path.stat()
    return status.st_size, status.st_mtime_ns, zlib.crc32(path.read_bytes())
