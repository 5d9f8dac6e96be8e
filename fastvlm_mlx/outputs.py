"""Files that a user names for results: written whole or not at all."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable

_PATIENCE = 10.0
"""Seconds to wait for another process that writes to the same file."""


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
        with _partial_file(path):
            pass


def write_output(path: Path, content: bytes) -> None:
    """Writes a file at once: readers find the earlier content or all of `content`.

    Raises:
        ConfigError: If it cannot be written.
    """
    with writing(path) as file:
        file.write(content)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to write at once: it takes the place of the earlier one when the `with` block ends without error.

    Raises:
        ConfigError: If it cannot be written.
    """
    with _refused(path):
        if _is_stream(path):
            with path.open("wb") as file:
                yield file
            return
        with _partial_file(path) as (partial, file):
            yield file
            file.flush()
            with suppress(FileNotFoundError):
                shutil.copymode(os.path.realpath(path), partial)
            os.replace(partial, os.path.realpath(path))


def replace_content(path: Path, content: bytes, seen: os.stat_result) -> None:
    """Replaces the content of a user's file at once; its times, owner, rights and extended attributes stay.

    Args:
        path: The file; not a link.
        content: Written through to the disk before it takes the place of the earlier content.
        seen: What `os.lstat` gave before the file was read.

    Raises:
        ConfigError: If it has changed since, or cannot be written; the file is then as it was.
    """
    with _refused(path), _partial_file(path) as (partial, file):
        file.write(content)
        file.flush()
        status = os.fstat(file.fileno())
        if (status.st_uid, status.st_gid) != (seen.st_uid, seen.st_gid):
            os.chown(file.fileno(), seen.st_uid, seen.st_gid)
        _copy_attributes(path, partial)
        os.fsync(file.fileno())
        if _version(os.lstat(path)) != _version(seen):
            raise ConfigError(f"{printable(path)}: was changed by another program; run the command again")
        os.replace(partial, path)


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _copy_attributes(source: Path, target: Path) -> None:
    """Gives a file the rights, times and extended attributes of another one."""
    if sys.platform == "darwin":  # where `copystat` leaves out extended attributes, such as Finder's tags
        import ctypes

        system = ctypes.CDLL(None, use_errno=True)
        acl_and_xattr = ctypes.c_uint32(1 << 0 | 1 << 2)
        if system.copyfile(os.fsencode(source), os.fsencode(target), None, acl_and_xattr):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    shutil.copystat(source, target)


@contextmanager
def _partial_file(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Opens the file that the content of `path` is written to first, and removes it unless it was renamed.

    Its name follows from `path` alone, so the next run uses what a killed one left. A lock keeps others out meanwhile.
    """
    partial = _partial(path)
    deadline = time.monotonic() + _PATIENCE
    while True:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags & ~os.O_TRUNC, 0o666)) as file:
            if _lock(file, deadline) and _is_at(file, partial):  # who held the lock has renamed or removed it
                try:
                    file.truncate(0)
                    yield partial, file
                finally:
                    if _is_at(file, partial):
                        partial.unlink()
                return


def _lock(file: BinaryIO, deadline: float) -> bool:
    """Whether no other process or thread writes to `file`.

    Raises:
        BlockingIOError: If one still does at the deadline.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if time.monotonic() > deadline:
            raise BlockingIOError(errno.EBUSY, "another process is writing it") from None
        time.sleep(0.02)
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is the one that is called `path` now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Turns an error of the operating system into one that names `path`."""
    try:
        yield
    except OSError as err:
        if err.filename not in (None, path, str(path)) and str(err.filename) != str(_partial(path)):
            raise  # of what is written there
        raise ConfigError(f"{printable(path)}: cannot be written ({err.strerror or err})") from err


def _is_stream(path: Path) -> bool:
    """Whether `path` is a pipe or a device, which a file cannot replace."""
    return path.exists() and not path.is_file()


def _partial(path: Path) -> Path:
    """Where the content of `path` is written first: beside the file, or beside the target of a link."""
    target = Path(os.path.realpath(path))
    ending = ".partial"
    name = os.fsencode(target.name)
    if len(name) + len(ending) > 254:  # of the 255 bytes that a name may have
        return target.with_name(f".{hashlib.sha256(name).hexdigest()}{ending}")
    return target.with_name(f".{target.name}{ending}")


def json_line(record: Mapping[str, Any]) -> bytes:
    """A line of JSON Lines in UTF-8, in which names that are not UTF-8 are escaped."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
