"""Scratch folders and locks: several processes may work side by side, and what killed ones left is removed.

Every scratch folder holds a locked file for as long as its process works in it. The operating system releases the lock
when the process ends, however it ends, so the next run can tell a leftover from work in progress: in threads, in
processes, and in containers that share a volume and each count process ids from one.
"""

import fcntl
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_LOCK = ".fastvlm-lock"
_PREFIXES = (".", "fastvlm-")
_HOUR, _DAY = 3600, 86400
_SIGN_OF_LIFE = 2.0
"""Seconds between two signs of life of a process that holds a lock."""
_PATIENCE = 15.0
"""Seconds without a sign of life after which nobody waits any longer."""

_own: set[Path] = set()
"""The scratch folders of this process."""


@contextmanager
def scratch_folder(parent: Path | None = None, name: str | None = None) -> Iterator[Path]:
    """A new folder that is removed at the end; removes what killed processes left in the same place.

    Args:
        parent: The folder to make it in; by default the system's folder for temporary files.
        name: What the folder is for; it is called `.NAME.partial-` and random characters.
    """
    parent = Path(os.path.abspath(parent or tempfile.gettempdir()))
    remove_leftovers(parent)
    folder = Path(tempfile.mkdtemp(prefix=f".{name}.partial-" if name else _PREFIXES[1], dir=parent))
    _own.add(folder)
    try:
        with (folder / _LOCK).open("wb", buffering=0) as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            file.write(platform.node().encode())
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _own.discard(folder)


def remove_leftovers(parent: Path) -> None:
    """Removes the scratch folders in `parent` whose processes have been killed."""
    with suppress(OSError):  # a folder that cannot be listed holds nothing that could be removed
        for folder in Path(os.path.abspath(parent)).iterdir():
            if folder.name.startswith(_PREFIXES) and folder not in _own and _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)


def contents(folder: Path) -> list[Path]:
    """What a folder holds besides scratch folders of this process."""
    return [path for path in Path(os.path.abspath(folder)).iterdir() if path not in _own]


def is_being_written(parent: Path, name: str) -> bool:
    """Whether another process works in a scratch folder for `name` or for the steps on the way to it."""
    prefixes = (f".{name}.partial-", f".{name}.steps.partial-")
    with suppress(OSError):
        return any(
            folder.name.startswith(prefixes) and folder not in _own and is_locked(folder / _LOCK)
            for folder in Path(os.path.abspath(parent)).iterdir()
        )
    return False


@contextmanager
def lock(file: Path) -> Iterator[bool]:
    """Holds a lock for the length of a `with` block, as soon as no other process or thread holds it.

    Yields:
        Whether the lock is held. It is not where the file system has no locks or `file` belongs to another user, nor
        when the process that holds it has stopped and shows no sign of life.
    """
    with ExitStack() as stack:
        held = False
        with suppress(OSError):
            held = _wait(file, stack)
        yield held


def _wait(file: Path, stack: ExitStack) -> bool:
    """Waits for a lock and leaves its release to `stack`; False if its holder shows no sign of life."""
    last_sign, since = 0, time.monotonic()
    while True:
        opened = file.open("ab")
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sign = os.fstat(opened.fileno()).st_mtime_ns
            opened.close()
            if sign != last_sign:
                last_sign, since = sign, time.monotonic()
            elif time.monotonic() - since > _PATIENCE:
                return False
            time.sleep(0.05)
        except OSError:
            opened.close()
            raise
        else:
            stack.enter_context(opened)
            ended = threading.Event()
            threading.Thread(target=_show_life, args=(file, ended), daemon=True).start()
            stack.callback(ended.set)
            return True


def _show_life(file: Path, ended: threading.Event) -> None:
    """Touches a lock file every few seconds, for those who wait for the lock."""
    with suppress(OSError):
        os.utime(file)
        while not ended.wait(_SIGN_OF_LIFE):
            os.utime(file)


def is_locked(file: Path) -> bool:
    """Whether another process or thread holds the lock `file`."""
    try:
        with file.open("rb+") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _is_abandoned(folder: Path) -> bool:
    """Whether the process that made a scratch folder has ended; False for every other folder.

    A lock may not be seen from another machine (NFS). What another one has made counts as abandoned after a day.
    """
    try:
        if folder.is_symlink() or not folder.is_dir():
            return False
        age = time.time() - folder.stat().st_mtime
        if not (folder / _LOCK).exists():  # killed before it was locked
            return ".partial-" in folder.name and age > _HOUR and not any(folder.iterdir())
        with (folder / _LOCK).open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file.read().decode(errors="replace") == platform.node() or age > _DAY
    except OSError:  # locked, or another user's
        return False
