"""What has changed in the folder of an album since its index was brought up to date."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from fastvlm_mlx.album.album import Album
from fastvlm_mlx.album.index import Known
from fastvlm_mlx.jobs.files import stat_of
from fastvlm_mlx.jobs.pictures import Picture, Pictures, Skipped, find_pictures


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What has changed since the index was brought up to date.

    Attributes:
        todo: Pictures that are new, have changed, or lack something.
        unchanged: How many are as they were.
        failed: How many of these could not be read.
        gone: Pictures of the index that are not there any more.
        back: Those that were gone and are there again, unchanged.
        unreadable: Folders and files that may not be read; what the index knows below them is kept.
        vanished: Whether the folder is not there, or has lost all of its pictures; the index is then left as it is.
    """

    todo: Sequence[Picture] = ()
    unchanged: int = 0
    failed: int = 0
    gone: Sequence[Known] = ()
    back: Sequence[Known] = ()
    unreadable: Sequence[Skipped] = ()
    vanished: bool = False


def look(album: Album, complete: Container[int], *, retry_errors: bool = False) -> Plan:
    """Compares the folder with the index.

    Args:
        album: The album.
        complete: The contents about which the index knows all that it should.
        retry_errors: Whether to look again at pictures that could not be read and have not changed.
    """
    known = {picture.path: picture for picture in album.index.pictures()}
    found = find_pictures([album.folder])
    if not found.found:
        return Plan(unreadable=found.unreadable, vanished=True)
    todo, back = [], []
    unchanged = failed = 0
    for picture in found.found:
        earlier = known.get(picture.name)
        if earlier is None or earlier.stat != stat_of(picture.path) or _lacks(earlier, complete, retry_errors):
            todo.append(picture)
        else:
            unchanged += 1
            failed += earlier.content is None
            if earlier.gone is not None:
                back.append(earlier)
    return Plan(
        todo=todo,
        unchanged=unchanged,
        failed=failed,
        gone=_gone(known.values(), found, album.folder),
        back=back,
        unreadable=found.unreadable,
    )


def _lacks(picture: Known, complete: Container[int], retry_errors: bool) -> bool:
    """Whether a picture that has not changed has to be looked at again."""
    return retry_errors if picture.content is None else picture.content not in complete


def _gone(known: Iterable[Known], found: Pictures, folder: str) -> list[Known]:
    """Pictures that are not there any more, but for those below folders that cannot be read now."""
    names = {picture.name for picture in found.found}
    closed = [os.path.relpath(each.path, folder) for each in found.unreadable]
    return [
        picture
        for picture in known
        if picture.gone is None
        and picture.path not in names
        and not any(picture.path == path or picture.path.startswith(f"{path}/") for path in closed)
    ]
