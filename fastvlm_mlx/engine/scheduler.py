"""Rows that come and go while others are decoded; each is answered as it would be alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.backend import device, mx
from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.engine.prefix_cache import PrefixCache, PrefixKey
from fastvlm_mlx.engine.row import Row
from fastvlm_mlx.engine.sampling import Sampler, read_tokens, sample
from fastvlm_mlx.errors import ConfigError, FastVLMError
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.kv_cache import KVCache
from fastvlm_mlx.model.kv_slab import KVSlab
from fastvlm_mlx.streams import check_process, free_unused_memory, turn

_T = TypeVar("_T")

TOWER_PIXELS = {"cpu": 1024**2, "gpu": 4 * 1024**2}
"""The most pixels that the vision tower sees at once: of 1024 px, one image or four; a CPU gains little by more."""

PREFILL_POSITIONS = 2048
"""The most positions that are prefilled at once, but for a longer prompt alone."""


class Scheduler:
    """Decodes rows together, one token of each in a step; for one thread at a time.

    A step submits the next token of every row before it reads the latest ones, but when rows have joined: their first
    tokens are read at once. Where a row has a constraint, it submits the next logits instead, reads the latest tokens,
    and submits the choice; the constraint finds out what is allowed while the logits are computed. Between two steps,
    rows that have ended leave and waiting ones join: images of one resolution share a pass of the vision tower, prompts
    of one length a prefill, and each prompt begins where the prefix cache ends.

    When a step fails, its rows begin again from where they are: in batches of half the size if memory was short,
    otherwise one by one, so that only the culprit fails.

    Args:
        model: Prepared for the device.
        max_rows: The most rows at once.
        max_positions: The most positions that may be set aside for their keys and values: the rows times the positions
            of the longest, its answer included. A longer row is decoded alone. None sets no limit.
        prefix_cache: What earlier prompts left, and where these leave their own; None reuses nothing.

    Attributes:
        max_rows: Halved when memory was short.
    """

    def __init__(
        self,
        model: FastVLM,
        *,
        max_rows: int,
        max_positions: int | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        self.max_rows = max_rows
        self._max_positions = max_positions
        self._model = model
        self._prefix_cache = prefix_cache
        if prefix_cache is not None:
            prefix_cache.bind(model)
        self._waiting: deque[Row] = deque()
        self._suspects: set[Row] = set()
        self._reset()

    def _reset(self) -> None:
        self._rows: list[Row] = []
        self._samplers: list[Sampler] = []
        self._joining: list[Row] = []
        self._slab = KVSlab(len(self._model.language_model.layers))
        self._submitted: mx.array | None = None
        self._is_read = False
        self._prompts: list[tuple[Row, list[KVCache]]] = []

    @property
    def is_busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._rows or self._waiting)

    @property
    def row_count(self) -> int:
        """The rows that are decoded now; for any thread."""
        return len(self._rows)

    @property
    def kv_usage(self) -> float:
        """The part, from 0 to 1, of the positions that may be set aside that the rows take; for any thread."""
        return self._positions(list(self._rows)) / self._max_positions if self._max_positions else 0.0

    def add(self, rows: Iterable[Row]) -> None:
        """Lets rows join as soon as there is room."""
        self._waiting.extend(rows)

    def step(self) -> list[Row]:
        """Goes on by one token; returns the rows that have a new one, or an error."""
        check_process()
        try:
            with turn():
                self._leave()
                if self._is_read and self._submitted is not None:
                    self._submitted = self._choose(self._forward(self._submitted))
                has_joined = self._join()
                rows, samplers, latest = list(self._rows), list(self._samplers), self._submitted
                if latest is None:
                    return []
                # A first token is read before anything else is submitted, since a CPU computes one thing at a time; and
                # so is every token of a single row whose next step would not only be submitted, but computed.
                decoder = self._model.language_model
                self._is_read = has_joined or (len(rows) == 1 and decoder.steps_at_once)
                logits = None
                if not self._is_read:
                    logits = self._forward(latest) if any(_wants_more(row) for row in rows) else None
                    self._submitted = None
                if logits is not None and all(sampler.constraint is None for sampler in samplers):
                    self._submitted = self._choose(logits)
                elif logits is not None:
                    mx.async_eval(logits)
            tokens = read_tokens(latest)
            for sampler, token in zip(samplers, tokens, strict=True):
                sampler.advance(token)
            if logits is not None and self._submitted is None:
                with turn():
                    self._submitted = self._choose(logits)
            logprobs = [sampler.take_logprob() for sampler in samplers]
        except (FastVLMError, RuntimeError, MemoryError) as error:
            return self._recover(error)
        self._keep_prompts()
        for row, sampler, token, logprob in zip(rows, samplers, tokens, logprobs, strict=True):
            row.tokens.append(token)
            row.complete = sampler.complete
            if logprob is not None:
                row.logprobs.append(logprob)
        return rows

    def _forward(self, tokens: mx.array) -> mx.array:
        """The logits (B, V) behind the latest tokens (B,)."""
        self._slab.begin()
        return self._model.language_model(tokens[:, None], self._slab.layers)[:, -1]

    def _choose(self, logits: mx.array) -> mx.array:
        """Submits the next token of every row; returns their ids (B,)."""
        following = sample(logits, self._samplers)
        mx.async_eval(following)
        return following

    def _leave(self) -> None:
        places = list(range(len(self._rows)))
        for place in reversed(range(len(self._rows))):
            if self._rows[place].ended:
                self._slab.remove(place)
                _remove(self._rows, place)
                _remove(self._samplers, place)
                _remove(places, place)
        if self._submitted is not None and len(places) < self._submitted.shape[0]:
            self._submitted = self._submitted[mx.array(places)] if places else None

    def _join(self) -> bool:
        """Lets waiting rows join; returns whether any does."""
        self._joining = self._take(self.max_rows - len(self._rows))
        if not self._joining:
            return False
        known = [self._known(row) for row in self._joining]
        visual_tokens = self._encode(known)
        for group in _groups(known):
            self._prefill(group, visual_tokens)
        for prompt in known:
            if prompt.row.keep_visual_tokens and prompt.images and not prompt.seen:
                shown = mx.stack([visual_tokens[image] for image in prompt.images])
                prompt.row.visual_tokens = shown.astype(mx.float32)
                mx.async_eval(prompt.row.visual_tokens)
        self._joining = []
        return True

    def _take(self, room: int) -> list[Row]:
        """The waiting rows that join now, in the order in which they came.

        Of several about one image, the first joins, so that it spares the others work. While rows are decoded, no more
        join in one step than share a pass of the vision tower and a prefill, so that the others need not wait for all.
        """
        taken: list[Row] = []
        pixels = positions = 0
        later: list[Row] = []
        pictures: set[PrefixKey] = set()
        while self._waiting and len(taken) < room:
            row = self._waiting.popleft()
            if row.cancelled:
                continue
            if (row in self._suspects or not self._fit([*self._rows, *taken, row])) and (self._rows or taken):
                later.append(row)
                break
            if row.picture in pictures:
                later.append(row)
                continue
            pixels += self._unseen_pixels(row)
            positions += self._positions([row]) - row.max_tokens
            if self._rows and taken and (pixels > TOWER_PIXELS[device()] or positions > PREFILL_POSITIONS):
                later.append(row)
                break
            taken.append(row)
            if row in self._suspects:
                break
            if self._prefix_cache is not None and row.picture and row.picture not in self._prefix_cache:
                pictures.add(row.picture)
        self._waiting.extendleft(reversed(later))
        return taken

    def _unseen_pixels(self, row: Row) -> int:
        """Of the images of a row, those that the vision tower has to see."""
        if self._prefix_cache is not None and row.picture and row.picture in self._prefix_cache:
            return 0
        return len(row.pixel_values) * row.resolution**2

    def _fit(self, rows: Sequence[Row]) -> bool:
        """Whether there is memory for the keys and values of rows, up to the last token that each may get."""
        return self._max_positions is None or self._positions(rows) <= self._max_positions

    def _positions(self, rows: Sequence[Row]) -> int:
        """The positions that are set aside for rows, up to the last token that each may get."""
        longest = max(
            (
                len(row.input_ids) + len(row.pixel_values) * (self._visual_tokens(row) - 1) + row.max_tokens
                for row in rows
            ),
            default=0,
        )
        return len(rows) * longest

    def _visual_tokens(self, row: Row) -> int:
        """N, the positions that an image of a row takes."""
        return (row.resolution // self._model.config.vision_config.patch_size) ** 2

    def _known(self, row: Row) -> _Prompt:
        """A row's prompt, split where the prefix cache ends."""
        ids, images = row.input_ids + row.tokens, row.image_keys
        visual_tokens = self._visual_tokens(row)
        row.reused, cache = 0, None
        if self._prefix_cache is not None:
            row.reused, cache = self._prefix_cache.match(row.history, visual_tokens)
        seen = ids[: row.reused].count(IMAGE_TOKEN)
        return _Prompt(
            row=row, ids=ids[row.reused :], images=images[seen:], seen=seen, visual_tokens=visual_tokens, cache=cache
        )

    def _encode(self, prompts: Sequence[_Prompt]) -> dict[bytes, mx.array]:
        """The visual tokens (N, D) of the images that no prefix holds, each once."""
        unseen: dict[int, dict[bytes, NDArray[Any]]] = {}
        for prompt in prompts:
            if prompt.images:
                pixels = prompt.row.pixel_values[prompt.seen :]
                unseen.setdefault(prompt.row.resolution, {}).update(zip(prompt.images, pixels, strict=True))
        visual_tokens: dict[bytes, mx.array] = {}
        for resolution, images in unseen.items():
            for keys in _powers_of_two(list(images), max(1, TOWER_PIXELS[device()] // resolution**2)):
                encoded = self._model.encode_image(np.stack([images[key] for key in keys]))
                visual_tokens.update(zip(keys, encoded, strict=True))
        return visual_tokens

    def _prefill(self, prompts: Sequence[_Prompt], visual_tokens: dict[bytes, mx.array]) -> None:
        """Submits the first tokens of prompts of one length, and makes them rows of the slab."""
        shown = [visual_tokens[image] for prompt in prompts for image in prompt.images]
        samplers = [prompt.row.sampler() for prompt in prompts]
        logits, cache = self._model.prefill(
            np.array([prompt.ids for prompt in prompts]),
            visual_tokens=mx.stack(shown) if shown else None,
            cache=_joined([prompt.cache for prompt in prompts]),
        )
        first = sample(logits, samplers)
        self._slab.insert(cache)
        for prompt in prompts:
            prompt.row.joined = time.perf_counter()
        self._rows += [prompt.row for prompt in prompts]
        self._samplers += samplers
        self._submitted = first if self._submitted is None else mx.concatenate([self._submitted, first])
        mx.async_eval(self._submitted)
        if self._prefix_cache is not None:
            kept = [[layer.row(number) for layer in cache] for number in range(len(prompts))]
            self._prompts += zip([prompt.row for prompt in prompts], kept, strict=True)

    def _keep_prompts(self) -> None:
        """Adds the prompts that have been read to the prefix cache."""
        for row, cache in self._prompts:
            assert self._prefix_cache is not None
            self._prefix_cache.store(row.history, cache)
        self._prompts = []

    def _recover(self, error: Exception) -> list[Row]:
        """Lets the rows of a failed step begin again; returns those that failed for good."""
        rows = [row for row in dict.fromkeys(self._rows + self._joining) if not row.ended]
        self._reset()
        if self._prefix_cache is not None:
            self._prefix_cache.clear()
        free_unused_memory()
        if len(rows) == 1:
            rows[0].error = _for_the_user(error)
            self._suspects.discard(rows[0])
            return rows
        if is_out_of_memory(error):
            self.max_rows = max(1, len(rows) // 2)
        else:
            self._suspects.update(rows)
        self._waiting.extendleft(reversed(rows))
        return []


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prompt:
    """A row that joins.

    Attributes:
        row: The row.
        ids: The token ids that are left to prefill.
        images: The keys of the images among them.
        seen: The number of images before those.
        visual_tokens: N, the positions that each takes.
        cache: What came before; None for nothing.
    """

    row: Row
    ids: list[int]
    images: list[bytes]
    seen: int
    visual_tokens: int
    cache: list[KVCache] | None

    @property
    def positions(self) -> int:
        """The number of positions to prefill."""
        return len(self.ids) + len(self.images) * (self.visual_tokens - 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """What prompts that are prefilled together have in common."""
        return len(self.ids), len(self.images), self.visual_tokens, self.cache[0].offset if self.cache else 0


def _for_the_user(error: Exception) -> FastVLMError:
    """What one row's error means for who asked."""
    if isinstance(error, FastVLMError):
        return error
    reason = "there is not enough memory for" if is_out_of_memory(error) else "MLX cannot compute"
    return ConfigError(f"{reason} this request ({error}); ask about fewer or smaller images")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of MLX or Python means that memory was short."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "malloc" in text or "allocate" in text or "out of memory" in text


def _wants_more(row: Row) -> bool:
    """Whether tokens follow the one that has been submitted."""
    return not row.ended and len(row.tokens) + 1 < row.max_tokens


def _groups(prompts: Iterable[_Prompt]) -> Iterator[list[_Prompt]]:
    """Prompts of one shape, not more than `PREFILL_POSITIONS` at once."""
    alike: dict[tuple[int, ...], list[_Prompt]] = {}
    for prompt in prompts:
        alike.setdefault(prompt.shape, []).append(prompt)
    for group in alike.values():
        yield from _powers_of_two(group, max(1, PREFILL_POSITIONS // group[0].positions))


def _remove(items: list[_T], place: int) -> None:
    """Removes an item; the last one takes its place."""
    items[place] = items[-1]
    items.pop()


def _powers_of_two(items: list[_T], most: int) -> Iterator[list[_T]]:
    """Parts of a list whose sizes are powers of two, so that a GPU prepares kernels for few sizes only."""
    while items:
        size = 1 << (min(len(items), most).bit_length() - 1)
        yield items[:size]
        items = items[size:]


def _joined(caches: Sequence[list[KVCache] | None]) -> list[KVCache] | None:
    """The caches of several rows, of one length, as one."""
    if caches[0] is None or len(caches) == 1:
        return caches[0]
    return [KVCache.stack(layers) for layers in zip(*caches, strict=True)]
