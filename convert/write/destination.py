"""A destination that appears when it is complete, and of which nothing is left otherwise."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.formatting import readable_bytes


def vacant(destination: str | Path) -> Path:
    """The path of a folder to write.

    Raises:
        ConversionError: If there is something already.
    """
    target = Path(destination).expanduser()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConversionError(f"{target}: exists already; remove it or choose another destination")
    return target


@contextmanager
def partial_folder(target: Path, needed: int) -> Iterator[Path]:
    """A folder beside `target` that takes its name when the block ends well and is removed otherwise.

    Raises:
        ConversionError: If there is no room, or the file system refuses.
    """
    made = [parent for parent in (target.parent, *target.parent.parents) if not parent.exists()]
    folder = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        if (free := shutil.disk_usage(target.parent).free) < needed:
            raise ConversionError(
                f"{target}: the result takes {readable_bytes(needed)}, but only {readable_bytes(free)} are free there"
            )
        folder.mkdir()
        yield folder
        os.rename(folder, target)
    except BaseException as err:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(err, OSError):
            full = err.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "the disk is full" if full else f"cannot be written: {err.strerror or err}"
            raise ConversionError(f"{target}: {what}; nothing was left there") from err
        raise


def _remove_leftovers(target: Path) -> None:
    """Removes what conversions to `target` left behind when they were killed."""
    for folder in target.parent.iterdir():
        name, _, process = folder.name.rpartition("-")
        if name == f".{target.name}.partial" and process.isdigit() and not _runs(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return process != os.getpid()
