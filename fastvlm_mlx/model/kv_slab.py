"""Keys and values of rows of different lengths that are decoded together.

Shapes: B rows, S positions of the longest row.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.backend import mx
from fastvlm_mlx.model.kv_cache import KVCache


class KVSlab:
    """Rows side by side, each from position 0 on: none is padded, and none moves because another one is longer.

    `insert` and `remove` change the rows; `begin` adds a position to every row, which the decoder then writes. Lengths
    are numbers on the host, so that no chain of small arrays grows with an answer.

    Args:
        layers: The number of layers of the decoder.

    Attributes:
        layers: One `SlabLayer` for each, which the decoder takes as its cache.
    """

    def __init__(self, layers: int) -> None:
        self._rows = _Rows()
        self.layers = [SlabLayer(self._rows) for _ in range(layers)]

    def __len__(self) -> int:
        """B, the number of rows."""
        return len(self._rows.lengths)

    @property
    def lengths(self) -> list[int]:
        """The positions of each row."""
        return list(self._rows.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(layer.nbytes for layer in self.layers)

    def insert(self, prompts: Sequence[KVCache]) -> None:
        """Adds the rows of a batch of prompts, one `KVCache` for each layer, behind the rows that are there."""
        for layer, prompt in zip(self.layers, prompts, strict=True):
            layer.insert(len(self), prompt)
        self._rows.lengths += [prompts[0].offset] * prompts[0].batch

    def remove(self, row: int) -> None:
        """Removes a row; the last one takes its place."""
        lengths = self._rows.lengths
        last = len(lengths) - 1
        if row != last:
            for layer in self.layers:
                layer.move(last, row, lengths[last])
            lengths[row] = lengths[last]
        lengths.pop()

    def begin(self) -> None:
        """Adds a position to every row."""
        self._rows.begin()


class _Rows:
    """What the layers of a slab know about its rows.

    Attributes:
        lengths: The positions of each row.
        numbers: (B,), 0 to B - 1.
        places: (B,), the position that each row is about to write.
        mask: True (B, 1, 1, S) where a row may attend; None if all rows have one length.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.numbers: mx.array | None = None
        self.places: mx.array | None = None
        self.mask: mx.array | None = None

    def begin(self) -> None:
        """Adds a position to every row."""
        self.numbers, self.places = mx.arange(len(self.lengths)), mx.array(self.lengths)
        self.lengths = [length + 1 for length in self.lengths]
        longest = max(self.lengths)
        alike = min(self.lengths) == longest
        self.mask = None if alike else mx.arange(longest) <= self.places[:, None, None, None]


class SlabLayer:
    """One layer of a `KVSlab`, in the place of a `KVCache`: keys and values (rows, heads, positions, head_dim).

    Room for rows doubles when it is full, room for positions grows in steps.
    """

    step = 256

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def offset(self) -> mx.array | None:
        """The position (B,) that each row is about to write."""
        return self._rows.places

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    @property
    def has_one_row(self) -> bool:
        """Whether it holds one row."""
        return len(self._rows.lengths) == 1

    @property
    def next_position(self) -> int:
        """The position that the only row is about to write."""
        return self._rows.lengths[0] - 1

    def write_row(self, keys: NDArray[np.float32], values: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Writes a position of the only row, (heads, head_dim) each, at once; all so far, (heads, S, head_dim) each."""
        (length,) = self._rows.lengths
        shape = mx.zeros((1, keys.shape[0], 1, keys.shape[1]))
        self.keys = self._with_room(self.keys, shape, 1, length)
        self.values = self._with_room(self.values, shape, 1, length)
        views = []
        for part, new in ((self.keys, keys), (self.values, values)):
            view = np.asarray(part)[0]
            view[:, length - 1] = new
            views.append(view[:, :length])
        return views[0], views[1]

    def make_mask(self, length: int, **_: Any) -> mx.array | None:
        """True (B, 1, 1, S) where a row may attend; None if all rows have one length."""
        return self._rows.mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """All keys and values (B, heads, S, head_dim) after writing a position, (B, heads, 1, head_dim) each."""
        rows, longest = keys.shape[0], max(self._rows.lengths)
        self.keys = self._with_room(self.keys, keys, rows, longest)
        self.values = self._with_room(self.values, values, rows, longest)
        self.keys[self._rows.numbers, :, self._rows.places] = keys[:, :, 0]
        self.values[self._rows.numbers, :, self._rows.places] = values[:, :, 0]
        return self.keys[:rows, :, :longest], self.values[:rows, :, :longest]

    def insert(self, first: int, prompt: KVCache) -> None:
        """Writes the rows of a prompt from row `first` on."""
        keys, values = (part[:, :, : prompt.offset] for part in prompt.filled)
        rows, length = first + prompt.batch, prompt.offset
        self.keys = self._with_room(self.keys, keys, rows, length + 1)
        self.values = self._with_room(self.values, values, rows, length + 1)
        self.keys[first:rows, :, :length] = keys
        self.values[first:rows, :, :length] = values

    def move(self, source: int, destination: int, length: int) -> None:
        """Copies the positions of a row over another."""
        for part in (self.keys, self.values):
            if part is not None:
                part[destination, :, :length] = part[source, :, :length]

    def _with_room(self, held: mx.array | None, new: mx.array, rows: int, length: int) -> mx.array:
        """`held` if it has room for so many rows and positions, else a larger copy, shaped after `new`."""
        if held is not None and rows <= held.shape[0] and length <= held.shape[2]:
            return held
        heads, head_dim = new.shape[1], new.shape[3]
        rows = 1 << (rows - 1).bit_length()
        length = -(-length // self.step) * self.step
        if held is None:
            return mx.zeros((rows, heads, length, head_dim), new.dtype)
        rows, length = max(rows, held.shape[0]), max(length, held.shape[2])
        grown = mx.zeros((rows, heads, length, head_dim), new.dtype)
        grown[: held.shape[0], :, : held.shape[2]] = held
        return grown
