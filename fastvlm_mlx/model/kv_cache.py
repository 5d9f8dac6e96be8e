"""Keys and values of the positions that one layer of the decoder has seen.

Shapes: B batch, L positions of a call, S positions held.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.backend import mx


class KVCache:
    """Keys and values of one layer, (B, heads, S, head_dim), and of a batch also the padding to the left of each row.

    Several positions at once, a prompt, take exactly their own room, so that what is kept of a prompt holds nothing
    else. Single ones, an answer, are written into room that grows in steps.

    Attributes:
        offset: S, the positions held.
        left_padding: Leading positions of each row that nothing may attend to; None when there are none.
    """

    step = 256

    def __init__(self, left_padding: Sequence[int] | None = None) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0
        self.left_padding = left_padding
        self._own: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """All keys and values so far, after appending those of L new positions, (B, heads, L, head_dim) each."""
        before, self.offset = self.offset, self.offset + keys.shape[2]
        if self.keys is None or self.values is None:
            # What the decoder gives are parts of a larger array, which would be kept, too.
            self.keys, self.values = mx.contiguous(keys), mx.contiguous(values)
            return self.keys, self.values
        self.keys = self._append(self.keys, keys, before)
        self.values = self._append(self.values, values, before)
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def _append(self, held: mx.array, new: mx.array, before: int) -> mx.array:
        if self.offset > held.shape[2]:
            if self.offset - before > 1:
                return mx.concatenate([held[..., :before, :], new], axis=2)
            held = self._with_room(held[..., :before, :])
        held[..., before : self.offset, :] = new
        return held

    @property
    def has_one_row(self) -> bool:
        """Whether it holds positions of one row, none of them padding."""
        return self.batch == 1 and self.left_padding is None

    @property
    def next_position(self) -> int:
        """The position that is written next."""
        return self.offset

    def write_row(self, keys: NDArray[np.float32], values: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Writes one position of the only row, (heads, head_dim) each, at once; all so far, (heads, S, head_dim) each.

        Written in place, into room that no other cache shares.
        """
        if self._own is None or self.keys is not self._own[0] or self.offset == self._own[0].shape[2]:
            keys_held, values_held = map(self._with_room, self.filled)
            self.keys, self.values = self._own = keys_held, values_held
        views = []
        for part, new in zip(self._own, (keys, values), strict=True):
            view = np.asarray(part)[0]
            view[:, self.offset] = new
            views.append(view[:, : self.offset + 1])
        self.offset += 1
        return views[0], views[1]

    def _with_room(self, held: mx.array) -> mx.array:
        batch, heads, _, head_dim = held.shape
        return mx.concatenate([held, mx.zeros((batch, heads, self.step, head_dim), held.dtype)], axis=2)

    def make_mask(self, length: int, **_: Any) -> mx.array | str | None:
        """The mask of `length` new positions, in a form that `scaled_dot_product_attention` takes."""
        if self.left_padding is None:
            return None if length == 1 else "causal"
        keys = mx.arange(self.offset + length)
        queries = keys[self.offset :, None]
        padding = mx.array(list(self.left_padding))[:, None, None, None]
        # A padding position sees itself, so that no row of the softmax is empty.
        return (queries == keys) | (queries >= keys) & (keys >= padding)

    @classmethod
    def of(cls, keys: mx.array, values: mx.array) -> "KVCache":
        """A cache that holds keys and values, (B, heads, S, head_dim) each."""
        cache = cls()
        cache.keys, cache.values, cache.offset = keys, values, keys.shape[2]
        return cache

    @classmethod
    def stack(cls, rows: "Sequence[KVCache]") -> "KVCache":
        """One cache of rows that hold equally many positions."""
        keys, values = zip(*(row.filled for row in rows), strict=True)
        return cls.of(mx.concatenate(list(keys)), mx.concatenate(list(values)))

    def row(self, number: int) -> "KVCache":
        """A cache of one row, which shares the memory of the others."""
        keys, values = self.filled
        return KVCache.of(keys[number : number + 1], values[number : number + 1])

    @property
    def filled(self) -> tuple[mx.array, mx.array]:
        """Keys and values of the positions held, of a cache that holds any."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    @property
    def batch(self) -> int:
        """B."""
        return 0 if self.keys is None else int(self.keys.shape[0])

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None]:
        """Keys and values, for `mx.eval`."""
        return self.keys, self.values

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes
