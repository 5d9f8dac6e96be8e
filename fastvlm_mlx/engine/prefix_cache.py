"""Keys and values of earlier prompts, for prompts with the same beginning.

A prompt is known by its token ids and by the content, never the name, of its images.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from fastvlm_mlx.arguments import whole
from fastvlm_mlx.backend import mx
from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.kv_cache import KVCache
from fastvlm_mlx.streams import turn

PrefixKey = tuple[int | bytes, ...]
"""A prompt's token ids, each image's replaced by a hash of its pixels."""

DEFAULT_BYTES = 256 << 20

_TEXTS = 8
"""The most recent entries that a prompt with new images is compared with: what they share is the text before these."""


def prefix_key(token_ids: Sequence[int], pixel_values: npt.NDArray[Any] | None) -> PrefixKey:
    """The key of a prompt with the images (images, R, R, 3)."""
    images = iter(() if pixel_values is None else pixel_values)
    return tuple(_digest(next(images)) if token == IMAGE_TOKEN else token for token in token_ids)


def _digest(pixels: npt.NDArray[Any]) -> bytes:
    described = hashlib.sha256(f"{pixels.dtype} {pixels.shape}".encode())
    described.update(pixels.tobytes())
    return described.digest()


class PrefixCache:
    """The keys and values of recent prompts of one model; the least recently used go first.

        cache = PrefixCache()
        generate(model, processor, image="photo.jpg", prompt="What is it?", prefix_cache=cache)
        generate(model, processor, image="photo.jpg", prompt="What colour?", prefix_cache=cache)  # no vision tower

    Several threads may share one. `clear` it after changing the model's weights.

    Attributes:
        max_bytes: The most that all entries may hold together.

    Raises:
        ConfigError: If `max_bytes` is no whole number.
    """

    def __init__(self, max_bytes: int | None = DEFAULT_BYTES) -> None:
        self.max_bytes = DEFAULT_BYTES if max_bytes is None else whole(max_bytes, "max_bytes", 0)
        self._entries: OrderedDict[PrefixKey, _Entry] = OrderedDict()
        self._by_pictures: dict[PrefixKey, dict[PrefixKey, None]] = {}
        self._nbytes = 0
        self._lock = threading.RLock()
        self._model: weakref.ref[FastVLM] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, as of `pickle`, is empty."""
        return PrefixCache, (self.max_bytes,)

    def __len__(self) -> int:
        """The number of prompts kept."""
        return len(self._entries)

    def __contains__(self, pictures: PrefixKey) -> bool:
        """Whether a prompt with this beginning, which ends with an image, is kept."""
        return pictures in self._by_pictures

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._nbytes

    def clear(self) -> None:
        """Removes all entries; the cache may then serve another model."""
        with self._lock:
            self._entries.clear()
            self._by_pictures.clear()
            self._nbytes = 0
            self._model = None

    def bind(self, model: FastVLM) -> None:
        """Makes sure that the entries are of `model`.

        Raises:
            ConfigError: If they are of another one.
        """
        with self._lock:
            if self._model is not None and self._model() is not model and self._entries:
                raise ConfigError("this PrefixCache holds prompts of another model; give each model its own")
            self._model = weakref.ref(model)

    def match(self, key: PrefixKey, num_visual_tokens: int) -> tuple[int, list[KVCache] | None]:
        """How many tokens of `key` are known already, and a cache that holds them; the last token never counts.

        A damaged entry is removed.

        Args:
            key: Of the new prompt.
            num_visual_tokens: The positions that an image takes.
        """
        with self._lock:
            candidates = self._candidates(key)
            while candidates:
                name = max(candidates, key=lambda name: _common(key[:-1], self._entries[name].key))
                entry = self._entries[name]
                shared = _common(key[:-1], entry.key)
                if not shared:
                    break
                if entry.is_whole:
                    self._entries.move_to_end(name)
                    return shared, entry.prefix(_positions(key[:shared], num_visual_tokens))
                self._remove(name)
                candidates.remove(name)
            return 0, None

    def _candidates(self, key: PrefixKey) -> list[PrefixKey]:
        """The entries that share most of `key`: those with the most of its images, and some that may share its text."""
        for pictures in reversed(_pictures(key)):
            if pictures in self._by_pictures:
                return list(self._by_pictures[pictures])
        return list(itertools.islice(reversed(self._entries), _TEXTS))

    def store(self, key: PrefixKey, cache: list[KVCache]) -> None:
        """Keeps what a prompt left in `cache`, in place of an older one that is the same up to its last image."""
        pictures = _pictures(key)
        name = pictures[-1] if pictures else ()
        entry = _Entry.of(key, cache)
        with self._lock:
            if name in self._entries:
                self._remove(name)
            self._entries[name] = entry
            self._nbytes += entry.nbytes
            for prefix in _pictures(name):
                self._by_pictures.setdefault(prefix, {})[name] = None
            while self._entries and self._nbytes > self.max_bytes:
                self._remove(next(iter(self._entries)))

    def _remove(self, name: PrefixKey) -> None:
        self._nbytes -= self._entries.pop(name).nbytes
        for prefix in _pictures(name):
            del self._by_pictures[prefix][name]
            if not self._by_pictures[prefix]:
                del self._by_pictures[prefix]


@dataclass(kw_only=True, eq=False)
class _Entry:
    """What a prompt left.

    Attributes:
        key: Of the prompt.
        positions: S, the positions that it takes.
        nbytes: Bytes held.
        layers: Keys and values of all layers, (2 · layers, 1, heads, S, head_dim), as one array: MLX reuses buffers
            that are a little larger than asked for, and nobody counts what many small arrays waste in that way.
    """

    key: PrefixKey
    positions: int
    nbytes: int
    layers: mx.array

    @classmethod
    def of(cls, key: PrefixKey, cache: Sequence[KVCache]) -> _Entry:
        """A copy of a prompt's cache."""
        with turn():
            layers = mx.stack([part for layer in cache for part in layer.filled])
            mx.async_eval(layers)
        return cls(key=key, positions=cache[0].offset, nbytes=layers.nbytes, layers=layers)

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it is missing."""
        return bool(self.layers.shape[3] == self.positions)

    def prefix(self, positions: int) -> list[KVCache]:
        """A cache of the first positions for each layer, which grows on its own."""
        parts = self.layers[..., :positions, :]
        return [KVCache.of(parts[place], parts[place + 1]) for place in range(0, len(parts), 2)]


def _pictures(key: PrefixKey) -> list[PrefixKey]:
    """The beginnings of a prompt that end with an image."""
    return [key[: place + 1] for place, token in enumerate(key) if isinstance(token, bytes)]


def _common(first: PrefixKey, second: PrefixKey) -> int:
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _positions(key: PrefixKey, num_visual_tokens: int) -> int:
    return sum(num_visual_tokens if isinstance(token, bytes) else 1 for token in key)
