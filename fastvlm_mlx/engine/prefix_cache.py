"""Keys and values of prompts already seen, so that a second question about an image costs its own tokens only.

In a causal decoder a position's keys and values depend on nothing after it, so what a prompt leaves in the KV cache
serves every later prompt up to where the two differ.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.model.language import KVCache

PrefixKey = tuple[int | bytes, ...]
"""A prompt's token ids, each image's replaced by a hash of its pixels."""

DEFAULT_BYTES = 256 << 20


def prefix_key(token_ids: Sequence[int], pixel_values: npt.NDArray[Any] | None) -> PrefixKey:
    """What a prompt is known by: its ids, and the content (never the name) of its images (images, R, R, 3)."""
    images = iter(() if pixel_values is None else pixel_values)
    return tuple(_digest(next(images)) if token == IMAGE_TOKEN else token for token in token_ids)


def _digest(pixels: npt.NDArray[Any]) -> bytes:
    described = hashlib.sha256(f"{pixels.dtype} {pixels.shape}".encode())
    described.update(pixels.tobytes())
    return described.digest()


class PrefixCache:
    """The KV caches of recent prompts, of one model and within a number of bytes; the least recently used go first.

    It belongs to the weights it was filled with: `clear` it after changing them.

    Attributes:
        max_bytes: What all entries may hold together; 0 turns it off.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[PrefixKey, tuple[PrefixKey, list[KVCache]]] = OrderedDict()

    def __len__(self) -> int:
        """How many prompts are known."""
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(layer.nbytes for _, cache in self._entries.values() for layer in cache)

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()

    def match(self, key: PrefixKey, visual_tokens: int) -> tuple[int, list[KVCache] | None]:
        """How many tokens of `key` are known already, and a cache that holds them; the last token never counts.

        Args:
            key: Of the new prompt.
            visual_tokens: The positions that an image takes.
        """
        shared = {name: _common(key[:-1], known) for name, (known, _) in self._entries.items()}
        best = max(shared, key=lambda name: shared[name], default=None)
        if best is None or shared[best] == 0:
            return 0, None
        self._entries.move_to_end(best)
        count = shared[best]
        positions = _positions(key[:count], visual_tokens)
        return count, [layer.snapshot(positions) for layer in self._entries[best][1]]

    def store(self, key: PrefixKey, cache: list[KVCache]) -> None:
        """Keeps what a prompt left in `cache`, in the place of an older one that is the same up to its last image."""
        images = [place for place, token in enumerate(key) if isinstance(token, bytes)]
        name = key[: images[-1] + 1] if images else ()
        self._entries[name] = key, [layer.snapshot() for layer in cache]
        self._entries.move_to_end(name)
        while self._entries and self.nbytes > self.max_bytes:
            self._entries.popitem(last=False)


def _common(first: PrefixKey, second: PrefixKey) -> int:
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _positions(key: PrefixKey, visual_tokens: int) -> int:
    return sum(visual_tokens if isinstance(token, bytes) else 1 for token in key)
