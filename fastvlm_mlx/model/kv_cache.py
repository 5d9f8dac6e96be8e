"""Keys and values of the positions that one layer of the decoder has seen.

Shapes: B batch, L positions of a call, S positions held.
"""

from collections.abc import Sequence
from typing import Any

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
            batch, heads, _, head_dim = held.shape
            room = mx.zeros((batch, heads, self.step, head_dim), held.dtype)
            held = mx.concatenate([held[..., :before, :], room], axis=2)
        held[..., before : self.offset, :] = new
        return held

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
