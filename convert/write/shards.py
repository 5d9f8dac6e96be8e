"""Writes safetensors shards as a stream: headers are known in advance, so memory holds a few rows at a time."""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.checkpoint.safetensors import ITEM_BYTES
from fastvlm_mlx.convert.arrays import DTYPES, Array, Shape
from fastvlm_mlx.errors import RangeError

SHARD_BYTES = 5 * 10**9
"""The largest shard, as in the Hub's tools."""

_OVERFLOW = {"F16": (2 - 2**-11) * 2.0**15, "BF16": (2 - 2**-8) * 2.0**127, "F32": np.inf}
"""The smallest values that round to infinity."""


class Stored(NamedTuple):
    """The dtype, by safetensors' name, and the shape of a tensor in a file."""

    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        size: int = ITEM_BYTES[self.dtype] * math.prod(self.shape)
        return size


@dataclass(frozen=True)
class Shard:
    """One output file.

    Attributes:
        file: Its name.
        tensors: Its tensors, in the order in which they are written.
    """

    file: str
    tensors: Mapping[str, Stored]


def shards(tensors: Mapping[str, Stored], limit: int = SHARD_BYTES) -> list[Shard]:
    """Splits tensors, in their order, into files of at most `limit` bytes (or of one tensor, if that is larger)."""
    groups: list[dict[str, Stored]] = [{}]
    used = 0
    for name, stored in tensors.items():
        if groups[-1] and used + stored.nbytes > limit:
            groups.append({})
            used = 0
        groups[-1][name] = stored
        used += stored.nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0])]
    return [
        Shard(f"model-{number:05}-of-{len(groups):05}.safetensors", group) for number, group in enumerate(groups, 1)
    ]


class ShardWriter:
    """Writes tensors in the order of `shards`; a context manager.

    Args:
        folder: The folder for the files.
        files: The planned shards.
    """

    def __init__(self, folder: Path, files: Iterable[Shard]) -> None:
        self._folder = folder
        self._pending = list(files)
        self._file: IO[bytes] | None = None
        self._left: dict[str, Stored] = {}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def write(self, name: str, rows: Iterable[npt.NDArray[Any]], advance: Callable[[int], None]) -> None:
        """Appends a tensor.

        Args:
            name: The next tensor of the shards.
            rows: Its values in chunks of rows: float32 is cast to the tensor's dtype, others are written as they are.
            advance: Called with the bytes of each chunk.

        Raises:
            RangeError: If a value does not fit the dtype.
        """
        file, dtype = self._next(name)
        for chunk in rows:
            values = cast(chunk, dtype, name) if chunk.dtype == np.float32 else chunk
            advance(file.write(np.ascontiguousarray(values).data))

    def _next(self, name: str) -> tuple[IO[bytes], str]:
        """The file and the dtype of the next tensor, which must be `name`."""
        if not self._left:
            self._next_file()
        assert self._file is not None
        assert next(iter(self._left)) == name, f"{name} is written out of turn"
        return self._file, self._left.pop(name).dtype

    def _next_file(self) -> None:
        if self._file:
            self._file.close()
        shard = self._pending.pop(0)
        self._file = (self._folder / shard.file).open("wb")
        self._file.write(header(shard.tensors))
        self._left = dict(shard.tensors)


def header(tensors: Mapping[str, Stored]) -> bytes:
    """The beginning of a safetensors file: the length of the JSON, and the JSON padded to eight bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, stored in tensors.items():
        begin, end = end, end + stored.nbytes
        entries[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index(files: Collection[Shard]) -> dict[str, Any]:
    """The contents of `model.safetensors.index.json`."""
    placement = {name: shard.file for shard in files for name in shard.tensors}
    return {
        "metadata": {
            "total_size": sum(stored.nbytes for shard in files for stored in shard.tensors.values()),
            "format": "mlx",
        },
        "weight_map": dict(sorted(placement.items())),
    }


def cast(values: Array, dtype: str, name: str) -> npt.NDArray[Any]:
    """Values rounded to nearest even, bfloat16 as the uint16 of its bits; `dtype` is safetensors' name.

    Raises:
        RangeError: If a value becomes infinite.
    """
    largest = max(values.max(), -values.min())
    if largest >= _OVERFLOW[dtype]:
        public = next(name for name, stored in DTYPES.items() if stored == dtype)
        raise RangeError(f"{name} holds {largest:.4g}, too large for {public}; convert with another --dtype")
    stored: npt.NDArray[Any]
    if dtype == "BF16":
        bits = values.view(np.uint32)
        stored = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    else:
        stored = values.astype(np.float16 if dtype == "F16" else np.float32, copy=False)
    return stored
