"""Reads safetensors files: headers checked by the reference library, tensors read lazily.

The library validates every header. What it cannot do is done here: reading single rows, bfloat16 without a framework,
and files that lie inside an archive. A tensor's bytes are read from the file when they are needed; a memory map of
15 GB would count as memory used.
"""

import math
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.formatting import printable, readable_bytes
from fastvlm_mlx.schema import LARGEST_JSON, parse_object

ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1},
    **{f"{kind}{bits}": bits // 8 for kind in "IU" for bits in (8, 16, 32, 64)},
}
"""Bytes per element of the safetensors dtypes that a checkpoint may hold."""

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"} | {
    f"{kind}{bits}": f"<{kind.lower()}{bits // 8}" for kind in "IU" for bits in (8, 16, 32, 64)
}
_LFS_POINTER = b"version "
_MOST_DIMENSIONS = 8  # NumPy has a limit; convolutions have four


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A safetensors file, or a stored member of an archive: `size` bytes of `path` from `start`.

    Attributes:
        name: What the checkpoint's index calls it.
        label: What messages call it.
        version: `file_version` of `path` when it was opened, by which a change is noticed; None to allow changes.
        crc: The checksum that an archive has for it.
    """

    path: Path
    start: int
    size: int
    name: str
    label: str
    version: tuple[int, ...] | None = None
    crc: int | None = None

    @classmethod
    def whole(cls, path: Path) -> "TensorFile":
        """The file at `path`, all of it.

        Raises:
            CheckpointError: If there is no such file.
        """
        label = printable(path)
        try:
            status = path.stat()
        except OSError as err:
            raise CheckpointError(f"{label}: cannot be read: {err.strerror or err}") from err
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{label}: is not an ordinary file")
        size, version = status.st_size, file_version(status)
        return cls(path=path, start=0, size=size, name=path.name, label=label, version=version)

    @property
    def remote(self) -> bool:
        """Whether reading takes a request over a network for each piece."""
        return False

    def read(self, start: int, count: int) -> bytearray:
        """`count` bytes from `start`.

        Raises:
            CheckpointError: If the file ends before, cannot be read or has changed since it was opened.
        """
        return self.read_pieces(start, count, count, 1)

    def read_pieces(self, start: int, count: int, stride: int, pieces: int) -> bytearray:
        """`pieces` times `count` bytes, of which the first begin at `start`, and the others `stride` bytes later each.

        Raises:
            CheckpointError: As `read`.
        """
        buffer = bytearray(count * pieces)
        view = memoryview(buffer)
        try:
            with self.path.open("rb", buffering=0) as file:
                for number in range(pieces):
                    file.seek(self.start + start + number * stride)
                    piece = view[:count]
                    while piece and (read := file.readinto(piece)):
                        piece = piece[read:]
                    if piece:
                        break
                    view = view[count:]
                status = os.fstat(file.fileno())
        except OSError as err:
            raise CheckpointError(f"{self.label}: cannot be read: {err.strerror or err}") from err
        if view:
            raise CheckpointError(f"{self.label}: ends {len(view)} bytes too early; it is truncated: fetch it again")
        if self.version not in (None, file_version(status)):
            raise CheckpointError(f"{self.label}: has changed while it was read; try again when it is complete")
        return buffer


def file_version(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor in a file: its header entry, and a way to its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: TensorFile
    start: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * ITEM_BYTES[self.dtype]

    def read(self, first: int = 0, count: int | None = None) -> npt.NDArray[Any]:
        """The rows `first` to `first + count` (all by default) as they are stored; BF16 as the uint16 of its bits."""
        if not self.shape:
            return np.frombuffer(self.file.read(self.start, self.nbytes), _NUMPY[self.dtype]).reshape(())
        rows = self.shape[0] - first if count is None else count
        row_bytes = self.nbytes // max(self.shape[0], 1)
        data = self.file.read(self.start + first * row_bytes, rows * row_bytes)
        return np.frombuffer(data, _NUMPY[self.dtype]).reshape(rows, *self.shape[1:])

    def read_columns(self, first: int, end: int) -> npt.NDArray[Any]:
        """The columns from `first` to `end` of a matrix, as `read` gives them; what lies between is not read."""
        rows, columns = self.shape
        item = ITEM_BYTES[self.dtype]
        data = self.file.read_pieces(self.start + first * item, (end - first) * item, columns * item, rows)
        return np.frombuffer(data, _NUMPY[self.dtype]).reshape(rows, end - first)


def check(file: TensorFile) -> None:
    """Checks that a file is complete and its header valid, without reading a tensor.

    Raises:
        CheckpointError: If the safetensors library refuses the file, or its header is very large.
    """
    if (length := int.from_bytes(file.read(0, min(8, file.size)), "little")) > LARGEST_JSON:
        size, limit = readable_bytes(length), readable_bytes(LARGEST_JSON)
        damage = _damage(file) or f"its safetensors header has {size}, expected at most {limit}"
        raise CheckpointError(f"{file.label}: {damage}")
    try:
        with _openable(file) as path, safe_open(path, framework="np"):
            pass
    except SafetensorError as err:
        damage = _damage(file) or f"its safetensors header is damaged: {printable(err)}"
        raise CheckpointError(f"{file.label}: {damage}") from err
    except OSError as err:
        raise CheckpointError(f"{file.label}: cannot be read: {err.strerror or err}") from err


def read_header(file: TensorFile) -> list[Tensor]:
    """The tensors of a safetensors file, from its header.

    Raises:
        CheckpointError: If the file is truncated, the header is not valid or a dtype is not supported.
    """
    check(file)
    start, entries = _entries(file)
    for name, entry in entries.items():
        if entry["dtype"] not in ITEM_BYTES:
            dtype = printable(entry["dtype"])
            raise CheckpointError(f"{file.label}: tensor {printable(name)} has the unsupported dtype {dtype}")
        if len(entry["shape"]) > _MOST_DIMENSIONS:
            raise CheckpointError(f"{file.label}: tensor {printable(name)} has {len(entry['shape'])} dimensions")
    return [
        Tensor(
            name=name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            file=file,
            start=start + entry["data_offsets"][0],
        )
        for name, entry in entries.items()
    ]


@contextmanager
def _openable(file: TensorFile) -> Iterator[Path]:
    """A path at which the library can open the file.

    For a member of an archive it is that of a copy of its header, extended to the member's size without taking up
    space.
    """
    if file.start == 0 and file.size == file.path.stat().st_size:
        yield file.path
        return
    with tempfile.NamedTemporaryFile(prefix="fastvlm-header-") as copy:
        header = 8 + int.from_bytes(file.read(0, min(8, file.size)), "little")
        copy.write(file.read(0, min(header, file.size)))
        copy.truncate(file.size)
        copy.flush()
        yield Path(copy.name)


def _entries(file: TensorFile) -> tuple[int, dict[str, Any]]:
    """The byte at which the data starts, and the entry of every tensor.

    Raises:
        CheckpointError: If it is not a JSON object, or a name appears twice, which the library allows.
    """
    length = int.from_bytes(file.read(0, 8), "little")
    entries = parse_object(file.read(8, length), f"{file.label}: its safetensors header is damaged", unique=True)
    entries.pop("__metadata__", None)
    return 8 + length, entries


def _damage(file: TensorFile) -> str | None:
    """What is wrong with a file that the library refuses, more exactly than the library says it; None if unknown."""
    if file.size < 8:
        return f"{file.size} bytes is too short for a safetensors file; fetch it again"
    prefix = bytes(file.read(0, 8))
    length = int.from_bytes(prefix, "little")
    if prefix == _LFS_POINTER:
        return "is a Git LFS pointer, not the weights; run `git lfs pull` where it came from"
    if length > file.size - 8:
        return f"is truncated or not a safetensors file (its header claims {length} bytes)"
    if length > LARGEST_JSON:
        return None
    entries = _entries(file)[1]
    spans = []
    for name, entry in zip(map(printable, entries), entries.values(), strict=True):
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"][:_MOST_DIMENSIONS], entry["data_offsets"]
            valid = all(isinstance(number, int) and 0 <= number < 2**63 for number in (*shape, begin, end))
            size = math.prod(shape) * ITEM_BYTES.get(dtype, 1) if valid else 0
        except (TypeError, KeyError, ValueError):
            valid = False
        if not valid or size >= 2**63 or len(entry["shape"]) > _MOST_DIMENSIONS:
            return f"the header entry of tensor {name} is damaged"
        if dtype not in ITEM_BYTES:
            return f"tensor {name} has the unsupported dtype {printable(dtype)}"
        if end - begin != size:
            return f"tensor {name} is {end - begin} bytes long, but {dtype} {list(shape)} takes {size}"
        spans.append((begin, end, name))
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            return f"tensor {name} overlaps another one" if begin < reached else f"there is a gap before tensor {name}"
        reached = end
    if (expected := 8 + length + reached) > file.size:
        return f"is truncated: its tensors end at byte {expected}, the file at {file.size}; fetch or convert it again"
    if expected < file.size:
        return f"its tensors end at byte {expected}, the file only at {file.size}; fetch or convert it again"
    return None
