"""Opens a checkpoint read-only: a folder, a .zip archive or a Hub repository, in one safetensors file or in shards.

Nothing is executed and nothing is written to the source. Only headers are read here; a tensor's bytes are read when
asked for, straight from the file (a memory map of 15 GB would count as memory used).
"""

import hashlib
import json
import math
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.config import ALIASES, DEMO, bundled_checkpoint
from fastvlm_mlx.errors import CheckpointError

ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1},
    **{f"{kind}{bits}": bits // 8 for kind in "IU" for bits in (8, 16, 32, 64)},
}
"""Bytes per element of the safetensors dtypes that a checkpoint may hold."""

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"} | {
    f"{kind}{bits}": f"<{kind.lower()}{bits // 8}" for kind in "IU" for bits in (8, 16, 32, 64)
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SMALL_FILES = ("*.json", "*.txt", "*.jinja", "LICEN[CS]E*", "NOTICE*", "ACKNOWLEDG*")
_SMALL_FILE_LIMIT = 64 * 2**20
_HEADER_LIMIT = 100 * 2**20
_CHUNK = 2**20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A safetensors file, or a stored member of an archive: `size` bytes of `path` from `start`.

    Attributes:
        label: What messages call it.
    """

    path: Path
    start: int
    size: int
    label: str

    def read(self, start: int, count: int) -> bytearray:
        """`count` bytes from `start`.

        Raises:
            CheckpointError: If the file ends before or cannot be read.
        """
        buffer = bytearray(count)
        view = memoryview(buffer)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.start + start)
                while view and (read := file.readinto(view)):
                    view = view[read:]
        except OSError as err:
            raise CheckpointError(f"{self.label}: cannot be read: {err.strerror or err}") from err
        if view:
            raise CheckpointError(f"{self.label}: ends {len(view)} bytes too early; it is truncated: fetch it again")
        return buffer


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor in a file: what the header says of it, and the way to its bytes."""

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


@dataclass(frozen=True, kw_only=True)
class Source:
    """An open checkpoint.

    Attributes:
        name: As the user gave it, or the repository of an alias.
        revision: The Hub commit; None for a folder or an archive.
        folder: Where config.json, the tokenizer's files and the licences are.
        files: The files that hold tensors.
        tensors: Every tensor by name.
    """

    name: str
    revision: str | None
    folder: Path
    files: tuple[TensorFile, ...]
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the files that hold tensors."""
        return sum(file.size for file in self.files)

    def json(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file; None if there is no such file.

        Raises:
            CheckpointError: If it is not JSON or not an object.
        """
        try:
            values = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as err:
            raise CheckpointError(f"{self.name}: {name} cannot be read as JSON: {err}") from err
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.name}: {name} must hold a JSON object, not a {type(values).__name__}")
        return values

    def sha256(self, advance: Callable[[int], None]) -> str:
        """The SHA-256 of the one safetensors file; of several, that of what `sha256sum` prints for them."""
        digests = []
        for file in self.files:
            digest = hashlib.sha256()
            for start in range(0, file.size, _CHUNK):
                count = min(_CHUNK, file.size - start)
                digest.update(file.read(start, count))
                advance(count)
            digests.append(digest.hexdigest())
        if len(digests) == 1:
            return digests[0]
        listing = "".join(
            f"{digest}  {Path(file.label).name}\n" for digest, file in zip(digests, self.files, strict=True)
        )
        return hashlib.sha256(listing.encode()).hexdigest()


@contextmanager
def open_source(name: str | Path, revision: str | None = None) -> Iterator[Source]:
    """Opens a checkpoint for the duration of a `with` block; whatever an archive needs unpacked is removed at its end.

    Args:
        name: A folder, a .zip archive, a Hub repository `owner/name`, one of `ALIASES`, or `demo`.
        revision: A branch, tag or commit of a Hub repository.

    Raises:
        CheckpointError: If there is no such checkpoint, it is damaged, or it holds only pickled weights.
    """
    text = str(name)
    path = bundled_checkpoint(name) or Path(name).expanduser()
    if path.is_dir():
        yield _open_folder(text, path, None)
    elif path.is_file():
        if path.suffix in _PICKLES:
            raise CheckpointError(_refusal(text, [path.name]))
        if path.suffix == ".safetensors":
            raise CheckpointError(
                f"{text}: give the folder that holds it; config.json and the tokenizer are needed too"
            )
        with tempfile.TemporaryDirectory(prefix="fastvlm-") as scratch:
            yield _open_zip(text, path, Path(scratch))
    elif text.lower() in ALIASES or (isinstance(name, str) and _HUB_ID.fullmatch(name)):
        repository = ALIASES.get(text.lower(), text)
        folder = _download(repository, revision)
        yield _open_folder(repository, folder, folder.name)
    else:
        raise CheckpointError(
            f"{text}: no such folder or .zip archive, and neither a Hub repository (owner/name) nor "
            f"one of {', '.join((DEMO, *ALIASES))}"
        )


def _open_folder(name: str, folder: Path, revision: str | None) -> Source:
    shards = [
        TensorFile(path=path, start=0, size=path.stat().st_size, label=str(path))
        for path in sorted(folder.glob("*.safetensors"))
    ]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    return _assemble(name, revision, folder, shards, pickles)


def _assemble(name: str, revision: str | None, folder: Path, shards: list[TensorFile], pickles: list[str]) -> Source:
    """The source whose tensor files are `shards`, or those of them that its index names."""
    source = Source(name=name, revision=revision, folder=folder, files=(), tensors={})
    index = source.json("model.safetensors.index.json")
    placement = None if index is None else index.get("weight_map")
    if index is not None and not isinstance(placement, dict):
        raise CheckpointError(f"{name}: model.safetensors.index.json has no weight_map")
    if placement:
        by_name = {Path(shard.label).name: shard for shard in shards}
        if missing := sorted(set(placement.values()) - set(by_name)):
            raise CheckpointError(
                f"{name}: shards named in model.safetensors.index.json are missing: {', '.join(missing)}"
            )
        shards = [by_name[file] for file in sorted(set(placement.values()))]
    if not shards:
        if pickles:
            raise CheckpointError(_refusal(name, pickles))
        raise CheckpointError(f"{name}: holds no .safetensors file")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        for tensor in read_header(shard):
            if other := tensors.get(tensor.name):
                raise CheckpointError(f"{tensor.name} is in both {other.file.label} and {shard.label}")
            tensors[tensor.name] = tensor
    if placement and (absent := sorted(set(placement) - set(tensors))):
        raise CheckpointError(
            f"{name}: model.safetensors.index.json names tensors that no shard holds: {', '.join(absent[:5])}"
        )
    return Source(name=name, revision=revision, folder=folder, files=tuple(shards), tensors=tensors)


def _refusal(name: str, pickles: list[str]) -> str:
    return (
        f"{name}: the weights are pickled ({', '.join(pickles[:3])}). Unpickling can run any code, so they are not "
        "opened; use a safetensors version of the checkpoint"
    )


def read_header(file: TensorFile) -> list[Tensor]:
    """The tensors of a safetensors file, from its header.

    Raises:
        CheckpointError: If the file is truncated or the header is not valid.
    """
    if file.size < 8:
        raise CheckpointError(f"{file.label}: {file.size} bytes is too short for a safetensors file; fetch it again")
    prefix = bytes(file.read(0, 8))
    length = int.from_bytes(prefix, "little")
    if prefix == b"version ":
        raise CheckpointError(
            f"{file.label}: is a Git LFS pointer, not the weights; run `git lfs pull` where it came from"
        )
    if length > _HEADER_LIMIT or 8 + length > file.size:
        raise CheckpointError(
            f"{file.label}: is truncated or not a safetensors file (its header claims {length} bytes)"
        )
    try:
        entries = json.loads(bytes(file.read(8, length)), object_pairs_hook=_unique)
    except ValueError as err:
        raise CheckpointError(f"{file.label}: its safetensors header is damaged: {err}") from err
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file.label}: its safetensors header is not a JSON object")
    entries.pop("__metadata__", None)
    tensors = [_tensor(file, 8 + length, name, entry) for name, entry in entries.items()]
    end = 8 + length
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if tensor.nbytes and tensor.start < end:
            raise CheckpointError(f"{file.label}: tensor {tensor.name} overlaps another one")
        end = max(end, tensor.start + tensor.nbytes)
    if end > file.size:
        raise CheckpointError(
            f"{file.label}: is truncated: its tensors end at byte {end}, the file at {file.size}; fetch it again"
        )
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key appears twice")
    return values


def _tensor(file: TensorFile, data_start: int, name: str, entry: Any) -> Tensor:
    try:
        dtype, shape, (begin, end) = (
            str(entry["dtype"]),
            tuple(map(int, entry["shape"])),
            map(int, entry["data_offsets"]),
        )
    except (TypeError, KeyError, ValueError) as err:
        raise CheckpointError(f"{file.label}: the header entry of tensor {name} is damaged") from err
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"{file.label}: tensor {name} has the unsupported dtype {dtype}")
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{file.label}: tensor {name} is {end - begin} bytes long, but {dtype} {list(shape)} takes "
            f"{math.prod(shape) * ITEM_BYTES[dtype]}"
        )
    return Tensor(name=name, dtype=dtype, shape=shape, file=file, start=data_start + begin)


def _open_zip(name: str, path: Path, scratch: Path) -> Source:
    """The source in an archive: stored tensor files are read in place, compressed ones are unpacked to `scratch`."""
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
                if target.suffix == ".safetensors":
                    if member.compress_type == zipfile.ZIP_STORED:
                        start = _data_start(path, member)
                        shards.append(
                            TensorFile(path=path, start=start, size=member.file_size, label=f"{path}:{member.filename}")
                        )
                        continue
                    if shutil.disk_usage(scratch).free < member.file_size:
                        raise CheckpointError(
                            f"{name}: {member.filename} unpacks to {member.file_size / 1e9:.1f} GB, "
                            f"more than {scratch} has left"
                        )
                    shards.append(
                        TensorFile(path=target, start=0, size=member.file_size, label=f"{path}:{member.filename}")
                    )
                elif member.file_size > _SMALL_FILE_LIMIT or not any(map(target.match, _SMALL_FILES)):
                    continue
                with archive.open(member) as packed, target.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, _CHUNK)
            pickles = [_basename(member) for member in members if Path(member.filename).suffix in _PICKLES]
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as err:
        raise CheckpointError(f"{name}: is not a .zip archive or is damaged: {err}") from err
    except RuntimeError as err:  # zipfile's way to say that a member is encrypted
        raise CheckpointError(f"{name}: cannot be unpacked: {err}") from err
    return _assemble(name, None, scratch, shards, pickles)


def _basename(member: zipfile.ZipInfo) -> str:
    return member.filename.rsplit("/", 1)[-1]


def _parent(member: zipfile.ZipInfo) -> str:
    return member.filename[: -len(_basename(member))]


def _data_start(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: after its local header, whose extra field may differ from the directory's."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name_length, extra_length = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return member.header_offset + 30 + name_length + extra_length


def _download(repository: str, revision: str | None) -> Path:
    """The folder in the Hub cache with a repository's safetensors and small files; downloads what is missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of its HTTP client, whichever
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=["*.safetensors", *_SMALL_FILES]))
    except GatedRepoError as err:
        raise CheckpointError(
            f"{repository}: accept its licence on huggingface.co, then log in with `hf auth login`"
        ) from err
    except RepositoryNotFoundError as err:
        raise CheckpointError(
            f"{repository}: no such folder, and no such repository on the Hub (or a private one: `hf auth login`)"
        ) from err
    except RevisionNotFoundError as err:
        raise CheckpointError(f"{repository}: has no revision {revision!r}") from err
    except LocalEntryNotFoundError as err:
        raise CheckpointError(
            f"{repository}: no such folder, not in the Hub's cache, and the Hub cannot be reached "
            "(HF_HUB_OFFLINE set, or no network?)"
        ) from err
    except (HTTPError, HFValidationError, OSError) as err:
        raise CheckpointError(f"{repository}: cannot be downloaded: {err}") from err
