"""Reads a checkpoint in a .zip archive: stored tensor files in place, everything else unpacked."""

import lzma
import os
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from fastvlm_mlx.checkpoint.safetensors import TensorFile, file_version
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.formatting import printable, readable_bytes
from fastvlm_mlx.schema import LARGEST_FILE

_CHUNK = 2**20
_MOST_MEMBERS = 10_000
_LARGEST_UNPACKED = 4 * LARGEST_FILE
_LARGEST_RATIO = 100
"""How many times its own size an archive may unpack to, beyond `_LARGEST_UNPACKED`; weights hardly compress at all."""

_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    IndexError,
    MemoryError,  # lzma: the size of its dictionary is written in the archive
    NotImplementedError,
    OverflowError,
    ValueError,
)
"""What the zipfile library raises for damaged archives."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """What an archive holds of a checkpoint.

    Attributes:
        shards: The safetensors files.
        others: The names of the other files beside config.json.
    """

    shards: list[TensorFile]
    others: list[str]


def open_archive(name: str, path: Path, scratch: Path, small_files: tuple[str, ...]) -> Archive:
    """The checkpoint whose config.json lies highest in an archive.

    Args:
        name: What messages call the archive.
        path: Of the archive.
        scratch: An empty folder for compressed tensor files and small files.
        small_files: Patterns of the small files to unpack.

    Raises:
        CheckpointError: If it is no .zip archive, is damaged or encrypted, holds no config.json, or does not fit into
            `scratch`.
    """
    label = printable(name)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{label}: is not an ordinary file")
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, label)
            tensors = [member for member in members if _basename(member).endswith(".safetensors")]
            packed = [member for member in tensors if member.compress_type != zipfile.ZIP_STORED]
            small = [
                member
                for member in members
                if member.file_size <= LARGEST_FILE and any(map(Path(_basename(member)).match, small_files))
            ]
            _check_room(label, [*packed, *small], status.st_size, scratch)
            for member in (*packed, *small):
                with archive.open(member) as source, (scratch / _basename(member)).open("wb") as target:
                    shutil.copyfileobj(source, target, _CHUNK)
            shards = []
            for member in tensors:
                file = (
                    TensorFile.whole(scratch / _basename(member)) if member in packed else _stored(path, member, status)
                )
                shards.append(replace(file, label=printable(f"{path}:{member.filename}")))
    except _DAMAGED as err:
        raise CheckpointError(f"{label}: is not a .zip archive or is damaged: {printable(err)}") from err
    except (RuntimeError, OSError) as err:  # RuntimeError: an encrypted member
        reason = getattr(err, "strerror", None) or printable(err)
        raise CheckpointError(f"{label}: cannot be unpacked: {reason}") from err
    return Archive(shards=shards, others=[_basename(member) for member in members])


def _members(archive: zipfile.ZipFile, label: str) -> list[zipfile.ZipInfo]:
    """The files beside the highest config.json, in the order of their names."""
    infos = archive.infolist()
    if len(infos) > _MOST_MEMBERS:
        raise CheckpointError(f"{label}: holds {len(infos)} files, more than a checkpoint has")
    visible = [
        info
        for info in infos
        if not info.is_dir() and "__MACOSX" not in info.filename and not _basename(info).startswith(".")
    ]
    roots = sorted(
        {_parent(info) for info in visible if _basename(info) == "config.json"}, key=lambda it: (len(it), it)
    )
    if not roots:
        raise CheckpointError(f"{label}: the archive holds no config.json")
    members = sorted((info for info in visible if _parent(info) == roots[0]), key=_basename)
    for before, after in pairwise(members):
        if _basename(before) == _basename(after):
            raise CheckpointError(f"{label}: is damaged: it holds two files called {printable(after.filename)}")
    return members


def _check_room(label: str, members: Sequence[zipfile.ZipInfo], size: int, scratch: Path) -> None:
    """Checks that what is to be unpacked is in proportion to the archive's size and fits into `scratch`."""
    needed = sum(member.file_size for member in members)
    if needed > max(_LARGEST_UNPACKED, _LARGEST_RATIO * size):
        raise CheckpointError(
            f"{label}: has {readable_bytes(size)} and would unpack to {readable_bytes(needed)}; weights do not "
            "compress like that, so it is damaged"
        )
    if shutil.disk_usage(scratch).free < needed:
        raise CheckpointError(f"{label}: unpacks to {readable_bytes(needed)}, more than {scratch} has left")


def _basename(member: zipfile.ZipInfo) -> str:
    return member.filename.rsplit("/", 1)[-1]


def _parent(member: zipfile.ZipInfo) -> str:
    return member.filename[: -len(_basename(member))]


def _stored(path: Path, member: zipfile.ZipInfo, status: os.stat_result) -> TensorFile:
    """A stored member: its bytes start after its local header, whose extra field may differ from the directory's."""
    if member.flag_bits & 1:
        raise RuntimeError(f"{printable(member.filename)} is encrypted")
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name_length, extra_length = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return TensorFile(
        path=path,
        start=member.header_offset + 30 + name_length + extra_length,
        size=member.file_size,
        name=_basename(member),
        label=member.filename,
        version=file_version(status),
        crc=member.CRC,
    )
