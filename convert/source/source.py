"""Opens a checkpoint read-only: a folder, a .zip archive or a Hub repository, in one safetensors file or in shards.

Nothing is executed and nothing is written to the source. Opening reads headers only; a tensor's bytes are read when
they are needed.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastvlm_mlx.checkpoint.index import INDEX_FILE, weight_map
from fastvlm_mlx.checkpoint.released import parse_name
from fastvlm_mlx.checkpoint.safetensors import Tensor, TensorFile, read_header
from fastvlm_mlx.config import TextConfig
from fastvlm_mlx.convert.progress import Notify, Progress
from fastvlm_mlx.convert.scratch import scratch_folder
from fastvlm_mlx.convert.source.archive import open_archive
from fastvlm_mlx.convert.source.fused import in_parts
from fastvlm_mlx.convert.source.hub import PICKLES, SMALL_FILES, download
from fastvlm_mlx.convert.source.remote import open_headers
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.formatting import names, printable
from fastvlm_mlx.schema import read_object

_CHUNK = 2**20


@dataclass(frozen=True, kw_only=True)
class Source:
    """An open checkpoint.

    Attributes:
        name: The name that the user gave, or the repository of an alias.
        revision: The commit on the Hub; None for a folder or an archive.
        folder: Holds config.json, the tokenizer's files and the licences.
        files: The safetensors files.
        tensors: Every tensor by name.
        headers_only: Whether `folder` holds no more than config.json and what lies beside the headers of the weights.
    """

    name: str
    revision: str | None
    folder: Path
    files: tuple[TensorFile, ...]
    tensors: dict[str, Tensor]
    headers_only: bool = False

    @property
    def label(self) -> str:
        """What messages call it."""
        return printable(self.name)

    @property
    def nbytes(self) -> int:
        """Bytes of the files that hold tensors."""
        return sum(file.size for file in self.files)

    def json(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file; None if there is no such file.

        Raises:
            CheckpointError: If it is not JSON or not an object.
        """
        return read_object(self.folder / name, f"{self.label}: {name}")

    def in_parts(self, text: TextConfig) -> "Source":
        """The same checkpoint, if it is in this project's format, with every projection by upstream's name.

        Args:
            text: The architecture of its decoder.

        Raises:
            CheckpointError: If a fused projection does not have the rows of its parts.
        """
        return replace(self, tensors=in_parts(self.tensors, text))

    def sha256(self, advance: Callable[[int], None]) -> str:
        """The SHA-256 of the one safetensors file; of several, that of the lines that `sha256sum` prints for them.

        Raises:
            CheckpointError: If a file does not have the checksum that its archive has for it.
        """
        digests = []
        for file in self.files:
            digest, crc = hashlib.sha256(), 0
            for start in range(0, file.size, _CHUNK):
                count = min(_CHUNK, file.size - start)
                chunk = file.read(start, count)
                digest.update(chunk)
                if file.crc is not None:
                    crc = zlib.crc32(chunk, crc)
                advance(count)
            if file.crc not in (None, crc):
                raise CheckpointError(f"{file.label}: is damaged: it does not have the checksum in the archive")
            digests.append(digest.hexdigest())
        if len(digests) == 1:
            return digests[0]
        listing = "".join(f"{digest}  {file.name}\n" for digest, file in zip(digests, self.files, strict=True))
        return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()


@contextmanager
def open_source(
    name: str | Path,
    revision: str | None = None,
    *,
    headers_only: bool = False,
    notify: Notify | None = None,
    progress: Progress | None = None,
) -> Iterator[Source]:
    """Opens a checkpoint for the length of a `with` block; what an archive had to be unpacked to is removed at its end.

    Args:
        name: A folder, a .zip archive, a Hub id or an alias, or `demo`; see `parse_name`.
        revision: A branch, tag or commit of a Hub repository.
        headers_only: Whether the headers of a Hub repository are enough, so that its weights need no download.
        notify: Called with a line before a download.
        progress: Called during a download with the bytes done, the bytes in all and a label.

    Raises:
        CheckpointError: If there is no such checkpoint, it is damaged, or it holds only pickled weights.
    """
    location = parse_name(name)
    location.check_revision(revision)
    path = location.path
    if path is None and headers_only:
        with scratch_folder() as scratch:
            opened = open_headers(location.name, revision, scratch)
            if isinstance(opened, Path):
                yield _open_folder(location.name, opened, opened.name)
            else:
                repository, shards = opened
                source = _assemble(location.name, repository.commit, scratch, shards, [])
                yield replace(source, headers_only=True)
    elif path is None:
        folder = download(location.name, revision, notify=notify, progress=progress)
        yield _open_folder(location.name, folder, folder.name)
    elif path.is_dir():
        yield _open_folder(location.name, path, None)
    elif path.suffix in PICKLES:
        raise CheckpointError(_refusal(location.name, [path.name]))
    elif path.suffix == ".safetensors":
        label = printable(location.name)
        raise CheckpointError(f"{label}: give the folder that holds it; config.json and the tokenizer are needed too")
    else:
        with scratch_folder() as scratch:
            archive = open_archive(location.name, path, scratch, SMALL_FILES)
            yield _assemble(location.name, None, scratch, archive.shards, _pickles(archive.others))


def _open_folder(name: str, folder: Path, revision: str | None) -> Source:
    try:
        # On volumes that are not its own, macOS writes a file `._NAME` beside every NAME.
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as err:
        raise CheckpointError(f"{printable(name)}: cannot be read: {err.strerror or err}") from err
    shards = [TensorFile.whole(path) for path in files if path.suffix == ".safetensors"]
    return _assemble(name, revision, folder, shards, _pickles(path.name for path in files))


def _pickles(files: Iterable[str]) -> list[str]:
    return sorted(file for file in files if Path(file).suffix in PICKLES)


def _assemble(name: str, revision: str | None, folder: Path, shards: list[TensorFile], pickles: list[str]) -> Source:
    """The source whose tensor files are `shards`, or those of them that its index names."""
    label = printable(name)
    placement = weight_map(folder, f"{label}: {INDEX_FILE}")
    if placement:
        by_name = {shard.name: shard for shard in shards}
        if missing := sorted(set(placement.values()) - set(by_name)):
            raise CheckpointError(f"{label}: shards named in {INDEX_FILE} are missing: {names(missing)}")
        shards = [by_name[file] for file in sorted(set(placement.values()))]
    if not shards:
        if pickles:
            raise CheckpointError(_refusal(name, pickles))
        raise CheckpointError(f"{label}: holds no .safetensors file")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        for tensor in read_header(shard):
            if other := tensors.get(tensor.name):
                raise CheckpointError(f"{printable(tensor.name)} is in both {other.file.label} and {shard.label}")
            tensors[tensor.name] = tensor
    if placement and (absent := sorted(set(placement) - set(tensors))):
        raise CheckpointError(f"{label}: {INDEX_FILE} names tensors that no shard holds: {names(absent)}")
    return Source(name=name, revision=revision, folder=folder, files=tuple(shards), tensors=tensors)


def _refusal(name: str, pickles: list[str]) -> str:
    return (
        f"{printable(name)}: the weights are pickled ({names(pickles, 3)}). Unpickling can run any code, so they are "
        "not opened; use a safetensors version of the checkpoint"
    )
