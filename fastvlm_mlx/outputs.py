"""Files that a user names for results: written whole or not at all."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable


def check_output(path: Path) -> None:
    """Raises if `write_output` could not write to `path`; changes nothing that is there.

    Raises:
        ConfigError: If the folder is missing, or the file cannot be written.
    """
    with _refused(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if _is_stream(path):
            return
        if path.exists():
            path.open("ab").close()
        partial = _partial(path)
        partial.touch()
        partial.unlink()


def write_output(path: Path, content: bytes) -> None:
    """Writes a file at once: readers find the earlier content or all of `content`.

    Raises:
        ConfigError: If it cannot be written.
    """
    partial = _partial(path)
    with _refused(path):
        if _is_stream(path):
            path.write_bytes(content)
            return
        try:
            partial.write_bytes(content)
            os.replace(partial, os.path.realpath(path))
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Turns an error of the operating system into one that names `path`."""
    try:
        yield
    except OSError as err:
        raise ConfigError(f"{printable(path)}: cannot be written ({err.strerror or err})") from err


def _is_stream(path: Path) -> bool:
    """Whether `path` is a pipe or a device, which a file cannot replace."""
    return path.exists() and not path.is_file()


def _partial(path: Path) -> Path:
    """Where the content of `path` is written first: beside the file, or beside the target of a link."""
    target = Path(os.path.realpath(path))
    return target.with_name(f".{target.name}.partial-{os.getpid()}")


def json_line(record: Mapping[str, Any]) -> bytes:
    """A line of JSON Lines in UTF-8, in which names that are not UTF-8 are escaped."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
