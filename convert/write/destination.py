"""Writes a folder as a whole: it is there when it is complete, and after an error nothing of it is left."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fastvlm_mlx.arguments import StrPath, file_path
from fastvlm_mlx.convert.scratch import contents, is_being_written, remove_leftovers, scratch_folder
from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.formatting import readable_bytes

_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


def vacant(destination: StrPath) -> Path:
    """The path of a folder to write.

    Raises:
        ConversionError: If something is there already, or no folder can be made there.
        ConfigError: If `destination` is no path.
    """
    target = Path(os.path.expanduser(file_path(destination, "destination")))
    try:
        os.lstat(target)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as err:  # too long, or not to be written in the file system's encoding
        raise ConversionError(f"{target}: cannot be written: {getattr(err, 'strerror', None) or err}") from err
    if is_folder := target.is_dir():
        remove_leftovers(target)
    if os.path.lexists(target) and not (is_folder and not contents(target)):
        raise ConversionError(f"{target}: exists already; remove it or choose another destination")
    above = next(parent for parent in (target, *target.absolute().parents) if os.path.lexists(parent))
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        reason = "cannot be written to" if above.is_dir() else "is not a folder"
        raise ConversionError(f"{target}: {above} {reason}; choose another destination")
    return target


def check_alone(target: Path) -> None:
    """Checks that no other process is writing a folder.

    Raises:
        ConversionError: If one is.
    """
    if is_being_written(target.parent, target.name):
        raise ConversionError(f"{target}: another process is writing it; wait for it or choose another destination")


@contextmanager
def folder_for_steps(target: Path) -> Iterator[Path]:
    """A scratch folder on the disk of `target`, for the steps on the way to it.

    Raises:
        ConversionError: If nothing can be written there.
    """
    here = target.absolute()
    disk = next(folder for folder in (here, *here.parents) if folder.is_dir())
    with ExitStack() as stack:
        try:
            scratch = stack.enter_context(scratch_folder(disk, f"{target.name}.steps"))
        except OSError as err:
            raise ConversionError(f"{target}: cannot be written: {err.strerror or err}") from err
        yield scratch


@contextmanager
def partial_folder(target: Path, needed: int) -> Iterator[Path]:
    """A folder whose files become those of `target` when the block ends well; it is removed otherwise.

    It is made beside `target` and renamed. An empty folder that exists already may be a mount point, a link or the
    current folder, which cannot be replaced: there it is made inside, and its files are moved up, config.json last.

    Raises:
        ConversionError: If there is no room, the file system refuses, or another process wrote `target` at the same
            time.
    """
    made = [parent for parent in (target.parent, *target.parent.parents) if not parent.exists()]
    try:
        parent = target if target.is_dir() else target.parent
        parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(parent).free) < needed:
            raise ConversionError(
                f"{target}: the result takes {readable_bytes(needed)}, but only {readable_bytes(free)} are free there"
            )
        with scratch_folder(parent, target.name) as scratch:
            folder = scratch / "complete"
            folder.mkdir()
            yield folder
            if parent == target:
                _move_up(folder, target)
            else:
                os.rename(folder, target)
    except BaseException as err:
        for above in made:
            with suppress(OSError):
                above.rmdir()
        if isinstance(err, OSError):
            if err.errno in _OCCUPIED and os.path.lexists(target):
                reason = "exists already: it was written by another process at the same time; nothing was changed there"
            elif err.errno in (errno.ENOSPC, errno.EDQUOT):
                reason = "the disk is full; nothing was left there"
            else:
                reason = f"cannot be written: {err.strerror or err}; nothing was left there"
            raise ConversionError(f"{target}: {reason}") from err
        raise


def _move_up(folder: Path, target: Path) -> None:
    """Moves the files of `folder` into `target`, which holds scratch folders of this process and nothing else."""
    if contents(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    moved: list[Path] = []
    try:
        for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
            moved.append(file.rename(target / file.name))
    except BaseException:
        for file in moved:
            file.unlink(missing_ok=True)
        raise
