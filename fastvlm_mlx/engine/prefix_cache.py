"""Keys and values of earlier prompts, for prompts with the same beginning.

A prompt is known by its token ids and by the content, never the name, of its images.
"""

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.kv_cache import KVCache

PrefixKey = tuple[int | bytes, ...]
"""A prompt's token ids, each image's replaced by a hash of its pixels."""

DEFAULT_BYTES = 256 << 20


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
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[PrefixKey, tuple[PrefixKey, list[KVCache]]] = OrderedDict()
        self._lock = threading.RLock()
        self._model: weakref.ref[FastVLM] | None = None

    def __len__(self) -> int:
        """The number of prompts kept."""
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        with self._lock:
            return sum(layer.nbytes for _, cache in self._entries.values() for layer in cache)

    def clear(self) -> None:
        """Removes all entries; the cache may then serve another model."""
        with self._lock:
            self._entries.clear()
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
            shared = {name: _common(key[:-1], known) for name, (known, _) in self._entries.items()}
            while shared and shared[best := max(shared, key=lambda name: shared[name])]:
                _, cache = self._entries[best]
                if all(_is_whole(layer) for layer in cache):
                    self._entries.move_to_end(best)
                    positions = _positions(key[: shared[best]], num_visual_tokens)
                    return shared[best], [layer.prefix(positions) for layer in cache]
                del self._entries[best], shared[best]
            return 0, None

    def store(self, key: PrefixKey, cache: list[KVCache]) -> None:
        """Keeps what a prompt left in `cache`, in place of an older one that is the same up to its last image."""
        images = [place for place, token in enumerate(key) if isinstance(token, bytes)]
        name = key[: images[-1] + 1] if images else ()
        with self._lock:
            self._entries[name] = key, [layer.prefix(layer.offset) for layer in cache]
            self._entries.move_to_end(name)
            while self._entries and self.nbytes > self.max_bytes:
                self._entries.popitem(last=False)


def _is_whole(layer: KVCache) -> bool:
    return all(part is not None and part.shape[2] == layer.offset for part in layer.state)


def _common(first: PrefixKey, second: PrefixKey) -> int:
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _positions(key: PrefixKey, num_visual_tokens: int) -> int:
    return sum(num_visual_tokens if isinstance(token, bytes) else 1 for token in key)
