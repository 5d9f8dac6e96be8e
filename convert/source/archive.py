"""Reads a checkpoint in a .zip archive: stored tensor files in place, everything else unpacked."""

import lzma
import shutil
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from fastvlm_mlx.checkpoint.safetensors import TensorFile, file_version
from fastvlm_mlx.errors import CheckpointError

_SMALL_FILE_LIMIT = 64 * 2**20
_CHUNK = 2**20


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
    try:
        with zipfile.ZipFile(path) as archive:
            members = [
                member for member in archive.infolist() if not member.is_dir() and "__MACOSX" not in member.filename
            ]
            roots = sorted({_parent(member) for member in members if _basename(member) == "config.json"}, key=len)
            if not roots:
                raise CheckpointError(f"{name}: the archive holds no config.json")
            members = [member for member in members if _parent(member) == roots[0]]
            shards = []
            for member in sorted(members, key=_basename):
                target = scratch / _basename(member)
                label = f"{path}:{member.filename}"
                if target.suffix == ".safetensors":
                    if member.compress_type == zipfile.ZIP_STORED:
                        start = _data_start(path, member)
                        shards.append(
                            TensorFile(
                                path=path,
                                start=start,
                                size=member.file_size,
                                label=label,
                                version=file_version(path.stat()),
                                crc=member.CRC,
                            )
                        )
                        continue
                    if shutil.disk_usage(scratch).free < member.file_size:
                        raise CheckpointError(
                            f"{name}: {member.filename} unpacks to {member.file_size / 1e9:.1f} GB, "
                            f"more than {scratch} has left"
                        )
                    shards.append(TensorFile(path=target, start=0, size=member.file_size, label=label))
                elif member.file_size > _SMALL_FILE_LIMIT or not any(map(target.match, small_files)):
                    continue
                with archive.open(member) as packed, target.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, _CHUNK)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, ValueError) as err:
        raise CheckpointError(f"{name}: is not a .zip archive or is damaged: {err}") from err
    except (RuntimeError, OSError) as err:  # RuntimeError: an encrypted member
        raise CheckpointError(f"{name}: cannot be unpacked: {err}") from err
    return Archive(shards=shards, others=[_basename(member) for member in members])


def _basename(member: zipfile.ZipInfo) -> str:
    return member.filename.rsplit("/", 1)[-1]


def _parent(member: zipfile.ZipInfo) -> str:
    return member.filename[: -len(_basename(member))]


def _data_start(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes start: after its local header, whose extra field may differ from the directory's."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name_length, extra_length = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return member.header_offset + 30 + name_length + extra_length
