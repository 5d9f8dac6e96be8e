"""Writes safetensors shards as a stream: headers are known in advance, so memory holds a few rows at a time."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.convert.arrays import DTYPES, Array
from fastvlm_mlx.convert.write.units import Stored, Unit
from fastvlm_mlx.errors import RangeError

SHARD_BYTES = 5 * 10**9
"""The largest shard, as in the Hub's tools."""

_OVERFLOW = {"F16": (2 - 2**-11) * 2.0**15, "BF16": (2 - 2**-8) * 2.0**127, "F32": np.inf}
"""The smallest values that round to infinity."""


@dataclass(frozen=True)
class Shard:
    """One output file.

    Attributes:
        file: Its name.
        tensors: Its tensors, in the order of their bytes.
        entries: The same bytes as its header names them, where tensors may be parts of one.
    """

    file: str
    tensors: Mapping[str, Stored]
    entries: Mapping[str, Stored]

    @classmethod
    def of(cls, file: str, units: Iterable["Unit"]) -> "Shard":
        """A file of these units."""
        tensors: dict[str, Stored] = {}
        entries: dict[str, Stored] = {}
        for unit in units:
            tensors |= unit.tensors
            entries |= unit.entries
        return cls(file, tensors, entries)


def shards(units: Iterable[Unit], limit: int = SHARD_BYTES) -> list[Shard]:
    """Divides units, in their order, among files of at most `limit` bytes (or of one unit, if that is larger)."""
    groups: list[list[Unit]] = [[]]
    used = 0
    for unit in units:
        if groups[-1] and used + unit.nbytes > limit:
            groups.append([])
            used = 0
        groups[-1].append(unit)
        used += unit.nbytes
    if len(groups) == 1:
        return [Shard.of("model.safetensors", groups[0])]
    return [
        Shard.of(f"model-{number:05}-of-{len(groups):05}.safetensors", group) for number, group in enumerate(groups, 1)
    ]


class ShardWriter:
    """Writes tensors to the places that their files' headers give them, in any order; a context manager.

    Args:
        folder: The folder for the files.
        files: The planned shards.
    """

    def __init__(self, folder: Path, files: Iterable[Shard]) -> None:
        self._folder = folder
        self._shards = list(files)
        self._files: list[IO[bytes]] = []
        self._places: dict[str, tuple[IO[bytes], int, str]] = {}

    def __enter__(self) -> "ShardWriter":
        for shard in self._shards:
            file = (self._folder / shard.file).open("wb")
            self._files.append(file)
            begin = file.write(header(shard.entries))
            for name, stored in shard.tensors.items():
                self._places[name] = file, begin, stored.dtype
                begin += stored.nbytes
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in self._files:
            file.close()
        assert kind is not None or not self._places, f"{next(iter(self._places))} was not written"

    def write(self, name: str, rows: Iterable[npt.NDArray[Any]], advance: Callable[[int], None]) -> None:
        """Writes a tensor.

        Args:
            name: One of the tensors of the shards, which has not been written yet.
            rows: Its values in chunks of rows: float32 is cast to the tensor's dtype, others are written as they are.
            advance: Called with the bytes of each chunk.

        Raises:
            RangeError: If a value does not fit the dtype.
        """
        file, begin, dtype = self._places.pop(name)
        file.seek(begin)
        for chunk in rows:
            values = cast(chunk, dtype, name) if chunk.dtype == np.float32 else chunk
            advance(file.write(np.ascontiguousarray(values).data))


def header(entries: Mapping[str, Stored]) -> bytes:
    """The beginning of a safetensors file: the length of the JSON, and the JSON padded to eight bytes."""
    described: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, stored in entries.items():
        begin, end = end, end + stored.nbytes
        described[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index(files: Collection[Shard]) -> dict[str, Any]:
    """The contents of `model.safetensors.index.json`."""
    placement = {name: shard.file for shard in files for name in shard.entries}
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
