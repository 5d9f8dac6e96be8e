"""Writes safetensors shards in a stream: every header is known in advance, so memory holds one piece at a time."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.convert.fold import Array
from fastvlm_mlx.convert.weights import Shape
from fastvlm_mlx.errors import ConversionError

SHARD_BYTES = 5 * 10**9
"""The size that the Hub's tools split at."""

_OVERFLOW = {"float16": (2 - 2**-11) * 2.0**15, "bfloat16": (2 - 2**-8) * 2.0**127, "float32": np.inf}
"""The smallest values that round to infinity."""

DTYPES = {"float16": ("F16", 2), "bfloat16": ("BF16", 2), "float32": ("F32", 4)}
"""What a checkpoint can be stored in: safetensors' name and the bytes per element."""


@dataclass(frozen=True)
class Shard:
    """One output file.

    Attributes:
        file: Its name.
        tensors: Names and shapes, in the order in which they are written.
    """

    file: str
    tensors: Mapping[str, Shape]


def shards(shapes: Mapping[str, Shape], dtype: str, limit: int = SHARD_BYTES) -> list[Shard]:
    """Splits tensors, in their order, into files of at most `limit` bytes (or of one tensor, if that is larger)."""
    groups: list[dict[str, Shape]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = nbytes(shape, dtype)
        if groups[-1] and used + size > limit:
            groups.append({})
            used = 0
        groups[-1][name] = shape
        used += size
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0])]
    return [
        Shard(f"model-{number:05}-of-{len(groups):05}.safetensors", group) for number, group in enumerate(groups, 1)
    ]


def nbytes(shape: Shape, dtype: str) -> int:
    """Bytes of a tensor."""
    return int(np.prod(shape)) * DTYPES[dtype][1]


class ShardWriter:
    """Writes tensors in the order of `shards`; a context manager."""

    def __init__(self, folder: Path, files: Iterable[Shard], dtype: str) -> None:
        self._folder = folder
        self._dtype = dtype
        self._pending = list(files)
        self._file: IO[bytes] | None = None
        self._left: list[str] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def write(self, name: str, rows: Iterable[Array], advance: Callable[[int], None]) -> None:
        """Appends a tensor, cast to the output's dtype; `advance` is told the bytes of each chunk.

        Raises:
            ConversionError: If a value does not fit the dtype.
        """
        if not self._left:
            self._next_file()
        assert self._file is not None
        assert self._left.pop(0) == name, f"{name} is written out of turn"
        for chunk in rows:
            advance(self._file.write(np.ascontiguousarray(cast(chunk, self._dtype, name)).data))

    def _next_file(self) -> None:
        if self._file:
            self._file.close()
        shard = self._pending.pop(0)
        self._file = (self._folder / shard.file).open("wb")
        self._file.write(header(shard.tensors, self._dtype))
        self._left = list(shard.tensors)


def header(tensors: Mapping[str, Shape], dtype: str) -> bytes:
    """The beginning of a safetensors file: the length of the JSON, and the JSON padded to eight bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + nbytes(shape, dtype)
        entries[name] = {"dtype": DTYPES[dtype][0], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index(files: Iterable[Shard], dtype: str) -> dict[str, Any]:
    """The contents of `model.safetensors.index.json`."""
    placement = {name: (shard.file, shape) for shard in files for name, shape in shard.tensors.items()}
    total = sum(nbytes(shape, dtype) for _, shape in placement.values())
    return {
        "metadata": {"total_size": total, "format": "mlx"},
        "weight_map": {name: placement[name][0] for name in sorted(placement)},
    }


def cast(values: Array, dtype: str, name: str) -> npt.NDArray[Any]:
    """Rounded to nearest even, bfloat16 as the uint16 of its bits.

    Raises:
        ConversionError: If a value becomes infinite.
    """
    largest = max(values.max(), -values.min())
    if largest >= _OVERFLOW[dtype]:
        raise ConversionError(f"{name} holds {largest:.4g}, too large for {dtype}; convert with another --dtype")
    stored: npt.NDArray[Any]
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        stored = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    else:
        stored = values.astype(dtype, copy=False)
    return stored
