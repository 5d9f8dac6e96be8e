"""Scores given answers: the probability of each as the model's whole answer, without sampling.

The choices share one prefill, and one pass over a trie of their tokens: a node is a row of the batch with one position,
which attends to the prompt and to the nodes above it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.backend import mx
from fastvlm_mlx.engine.sampling import check_numbers
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.kv_cache import KVCache
from fastvlm_mlx.streams import read, turn


def score(model: FastVLM, logits: mx.array, cache: Sequence[KVCache], choices: Sequence[Sequence[int]]) -> list[float]:
    """The logarithm of the probability that each choice follows a prompt, end token included.

    Args:
        model: Prepared for the device.
        logits: (1, V) of the prompt's last position.
        cache: What the prompt left, of one row.
        choices: The token ids of each, not empty, end token included.

    Raises:
        CheckpointError: If the logits are NaN or infinite.
    """
    trie = Trie(choices)
    with turn():
        logprobs = _logprobs(logits)
        if len(trie):
            nodes = TrieCache.of(cache, trie)
            inner = model.language_model(mx.array(trie.tokens)[:, None], nodes)[:, -1]
            logprobs = mx.concatenate([logprobs, _logprobs(inner)])
        rows, tokens = trie.edges()
        edges = logprobs[mx.array(rows), mx.array(tokens)]
        mx.async_eval(edges)
    values = read(edges)
    check_numbers(bool(np.isfinite(values).all()))
    return trie.sums(values)


def _logprobs(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class Trie:
    """The common beginnings of token sequences. Row 0 stands for the prompt, row n + 1 for node n.

    Attributes:
        tokens: (N,), the token of each node; a token that ends all sequences it is in needs no node.
        parents: (N,), the row before each node.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        rows: dict[tuple[int, ...], int] = {(): 0}
        self._paths: list[list[tuple[int, int]]] = []
        for sequence in sequences:
            path = []
            for place, token in enumerate(sequence):
                beginning = tuple(sequence[:place])
                if beginning not in rows:
                    self.parents.append(rows[beginning[:-1]])
                    self.tokens.append(beginning[-1])
                    rows[beginning] = len(self.tokens)
                path.append((rows[beginning], token))
            self._paths.append(path)

    def __len__(self) -> int:
        """N, the number of nodes."""
        return len(self.tokens)

    def edges(self) -> tuple[list[int], list[int]]:
        """For every token of every sequence the row whose logits it follows from, and itself."""
        edges = [edge for path in self._paths for edge in path]
        return [row for row, _ in edges], [token for _, token in edges]

    def sums(self, values: NDArray[Any]) -> list[float]:
        """The sum for each sequence of a value for each of `edges`."""
        ends = np.cumsum([len(path) for path in self._paths])
        return [float(part.sum(dtype=np.float64)) for part in np.split(values, ends[:-1])]

    def depths(self) -> list[int]:
        """The number of nodes above each node."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent - 1] + 1 if parent else 0)
        return depths

    def ancestors(self) -> NDArray[np.bool_]:
        """(N, N): True in row n where a node is n itself or above it."""
        above = np.eye(len(self), dtype=np.bool_)
        for node, parent in enumerate(self.parents):
            if parent:
                above[node] |= above[parent - 1]
        return above


class TrieCache:
    """One layer's keys and values of a prompt and of the nodes of a trie, in the place of a `KVCache`.

    Attributes:
        offset: (N,), the position of each node.
    """

    def __init__(self, prompt: KVCache, offset: mx.array, mask: mx.array) -> None:
        self._prompt = prompt
        self._mask = mask
        self.offset = offset

    @classmethod
    def of(cls, cache: Sequence[KVCache], trie: Trie) -> list["TrieCache"]:
        """One for each layer of a prompt's cache."""
        offset = mx.array(trie.depths()) + cache[0].offset
        prompt = np.ones((len(trie), cache[0].offset), dtype=np.bool_)
        mask = mx.array(np.concatenate([prompt, trie.ancestors()], axis=1)[:, None, None])
        return [cls(layer, offset, mask) for layer in cache]

    def make_mask(self, length: int, **_: Any) -> mx.array:
        """True (N, 1, 1, S + N) where a node may attend."""
        return self._mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values (N, heads, S + N, head_dim): of the prompt, then of all nodes, the same for each of them."""
        known_keys, known_values = self._prompt.filled
        return _spread(known_keys, keys), _spread(known_values, values)


def _spread(known: mx.array, new: mx.array) -> mx.array:
    """(N, heads, S + N, head_dim) of a prompt's (1, heads, S, head_dim) and the nodes' (N, heads, 1, head_dim)."""
    joined = mx.concatenate([known, new.transpose(2, 1, 0, 3)], axis=2)
    return mx.broadcast_to(joined, (new.shape[0], *joined.shape[1:]))
