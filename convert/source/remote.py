"""A checkpoint on the Hub by its headers: what it holds is known without its download, a few hundred kilobytes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.checkpoint.index import INDEX_FILE
from fastvlm_mlx.checkpoint.safetensors import TensorFile
from fastvlm_mlx.convert.source.hub import NoAnswerError, Repository, explained, look_up, without_hub
from fastvlm_mlx.convert.source.snapshot import complete_snapshot, shards_of
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.formatting import printable

_JSON_FILES = ("config.json", "generation_config.json", INDEX_FILE)
_JSON_LIMIT = 64 * 2**20
_FIRST = 2**17
"""Bytes of a safetensors file that are fetched first; most headers end before."""
_HEADER_LIMIT = 100_000_000  # the safetensors library's
_TIMEOUT = 10.0


@dataclass(frozen=True, kw_only=True)
class RemoteFile(TensorFile):
    """A safetensors file on the Hub.

    Attributes:
        path: A file of its size that holds its header and takes no room for the rest.
        header: The bytes that `path` holds; all others are fetched when they are read.
        repository: The repository.
    """

    header: int
    repository: Repository

    @property
    def remote(self) -> bool:
        """Whether reading takes a request for each piece."""
        return True

    def read(self, start: int, count: int) -> bytearray:
        """`count` bytes from `start`; see `TensorFile`."""
        if start + count <= self.header:
            return super().read(start, count)
        return bytearray(_get(self.repository, self.name, start, count))


def open_headers(name: str, revision: str | None, folder: Path) -> Path | tuple[Repository, list[TensorFile]]:
    """What the Hub says of a checkpoint's weights, or its folder in the Hub's cache if it is complete there.

    Args:
        name: `owner/name`.
        revision: A branch, tag or commit; `main` by default.
        folder: An empty folder for the configs and the headers.

    Returns:
        The folder in the cache; or the repository, and its weights, of which `folder` holds the headers.

    Raises:
        CheckpointError: If there is no such repository or revision, access is refused, or the Hub cannot be reached.
    """
    try:
        found = look_up(name, revision)
    except NoAnswerError as err:
        cached: Path = without_hub(name, revision, err)
        return cached
    complete: Path | None = complete_snapshot(name, found.commit)
    if complete:
        return complete
    for file in _JSON_FILES:
        if found.sizes.get(file, 0) > _JSON_LIMIT:
            raise CheckpointError(f"{name}: {file} on the Hub is too large to be what its name says")
        if file in found.sizes:
            (folder / file).write_bytes(_get(found, file))
    shards = [file for file in shards_of(folder) if file in found.sizes] or found.weights
    return found, [_fetch_header(found, file, folder) for file in shards]


def _fetch_header(repository: Repository, name: str, folder: Path) -> TensorFile:
    """A safetensors file of which only the header is fetched."""
    size = repository.sizes[name]
    data = _get(repository, name, 0, min(size, _FIRST))
    header = min(8 + int.from_bytes(data[:8], "little"), 8 + _HEADER_LIMIT, size)
    if header > len(data):
        data += _get(repository, name, len(data), header - len(data))
    path = folder / name
    with path.open("wb") as file:
        file.write(data)
        file.truncate(size)
    label = f"{repository.name}/{printable(name)}"
    return RemoteFile(path=path, start=0, size=size, name=name, label=label, header=len(data), repository=repository)


def _get(repository: Repository, file: str, start: int = 0, count: int | None = None) -> bytes:
    """A file on the Hub, or `count` bytes of it from `start`.

    Raises:
        CheckpointError: If the Hub cannot be reached, or sends something else.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    if count == 0:
        return b""
    headers = build_hf_headers()
    if count is not None:
        headers |= {"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
    url = hf_hub_url(repository.name, file, revision=repository.commit)
    with explained(repository.name, repository.commit):
        session: Any = get_session()
        stream = getattr(session, "stream", None)  # a method of httpx; requests, in older clients, has a flag
        options: dict[str, Any] = {"headers": headers, "timeout": _TIMEOUT}
        opened = stream("GET", url, **options) if callable(stream) else session.get(url, stream=True, **options)
        with opened as response:
            whole = count is not None and response.status_code == 200
            data = b"" if whole else response.read() if callable(stream) else response.content
            hf_raise_for_status(response)
    if whole:
        raise CheckpointError(f"{repository.name}: this Hub sends whole files only, so headers cannot be read alone")
    if count is not None and len(data) != count:
        raise CheckpointError(f"{repository.name}: the Hub sent {len(data)} bytes of {file} instead of {count}")
    return bytes(data)
