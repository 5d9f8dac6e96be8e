"""The folder of MLX's compiled kernels on a CPU: it has to be this user's own.

MLX fuses element-wise functions with the C++ compiler and loads the result from `$TMPDIR/mlx`, whoever made that
folder. On a machine with several users it belongs to the first one: the others can write nothing there, and would run
what the first one has put there.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

_VARIABLES = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
"""The variables that C++ takes the folder for temporary files from, the first that is set."""


def is_usable() -> bool:
    """Whether MLX can keep kernels in the folder that it would use; makes the folder if there is none."""
    chosen = next((os.environ[name] for name in _VARIABLES if name in os.environ), "/tmp")
    return bool(chosen) and _claim(Path(chosen))


def move_to_own_folder(parents: Iterable[Path]) -> None:
    """Has MLX keep kernels in a private folder below one of `parents`, where its own choice cannot be used.

    Sets TMPDIR: for a program that does nothing else, such as the command line. Where none of `parents` will do,
    nothing changes, and MLX has to compute without compiling.
    """
    if is_usable():
        return
    import tempfile

    for parent in parents:
        folder = parent / f"mlx-of-user-{os.geteuid()}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if _is_own(folder) and _claim(folder):
            tempfile.tempdir = tempfile.gettempdir()  # Python's temporary files stay where they are
            os.environ["TMPDIR"] = str(folder)
            return


def _claim(parent: Path) -> bool:
    """Whether `parent` holds a folder `mlx` in which this user, and nobody else, can write and run files."""
    folder = parent / "mlx"
    try:
        anyone, kept = stat.S_IWOTH, stat.S_ISVTX
        if parent.stat().st_mode & (anyone | kept) == anyone:  # others could replace what is in it
            return False
        folder.mkdir(mode=0o700, exist_ok=True)
        return _is_own(folder) and os.access(folder, os.W_OK | os.X_OK) and not _forbids_programs(folder)
    except OSError:
        return False


def _is_own(folder: Path) -> bool:
    """Whether a folder belongs to this user and is closed to others."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & stat.S_IWOTH


def _forbids_programs(folder: Path) -> bool:
    """Whether the file system refuses to run what is on it."""
    return bool(os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0))
