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
        edges = submit(model, logits, cache, trie)
    (scores,) = trie.sums(read_scores(edges))
    return [float(each) for each in scores]


def submit(model: FastVLM, logits: mx.array, cache: Sequence[KVCache], trie: "Trie") -> mx.array:
    """Submits the logarithms of the probabilities (B, E) of a trie's edges behind B prompts; for use within a turn.

    Args:
        model: Prepared for the device.
        logits: (B, V) of the prompts' last positions.
        cache: What the prompts left: B rows of one length.
        trie: Of the choices.
    """
    batch, nodes = logits.shape[0], len(trie)
    rows = logits.astype(mx.float32)[:, None]
    if nodes:
        caches = TrieCache.of(cache, trie)
        inner = model.language_model(mx.array(trie.tokens * batch)[:, None], caches)[:, -1]
        rows = mx.concatenate([rows, inner.astype(mx.float32).reshape(batch, nodes, -1)], axis=1)
    places, tokens = map(mx.array, trie.edges())
    edges = rows[:, places, tokens] - mx.logsumexp(rows, axis=-1)[:, places]
    mx.async_eval(edges)
    return edges


def read_scores(edges: mx.array) -> NDArray[Any]:
    """The values of what `submit` has submitted.

    Raises:
        CheckpointError: If they are NaN or infinite.
    """
    values = read(edges)
    check_numbers(bool(np.isfinite(values).all()))
    return values


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

    def sums(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """For each row of values (B, E), one for each of `edges`, the sum of each sequence's, (B, sequences)."""
        ends = np.cumsum([len(path) for path in self._paths])
        parts = np.split(values.astype(np.float64), ends[:-1], axis=1)
        return np.stack([part.sum(axis=1) for part in parts], axis=1)

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
    """One layer's keys and values of B prompts and of the N nodes of a trie behind each, in the place of a `KVCache`.

    A row holds one node: those behind the first prompt come first.

    Attributes:
        offset: (B · N,), the position of each node.
    """

    def __init__(self, prompt: KVCache, offset: mx.array, mask: mx.array) -> None:
        self._prompt = prompt
        self._mask = mask
        self.offset = offset

    @classmethod
    def of(cls, cache: Sequence[KVCache], trie: Trie) -> list["TrieCache"]:
        """One for each layer of the prompts' cache."""
        batch, length = cache[0].batch, cache[0].offset
        offset = mx.array(trie.depths() * batch) + length
        prompt = np.ones((len(trie), length), dtype=np.bool_)
        mask = np.concatenate([prompt, trie.ancestors()], axis=1)[:, None, None]
        masks = mx.array(np.tile(mask, (batch, 1, 1, 1)))
        return [cls(layer, offset, masks) for layer in cache]

    def make_mask(self, length: int, **_: Any) -> mx.array:
        """True (B · N, 1, 1, S + N) where a node may attend."""
        return self._mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values (B · N, heads, S + N, head_dim): of a node's prompt, then of all nodes behind that."""
        known_keys, known_values = self._prompt.filled
        return _spread(known_keys, keys), _spread(known_values, values)


def _spread(known: mx.array, new: mx.array) -> mx.array:
    """(B · N, heads, S + N, head_dim) of the prompts' (B, heads, S, head_dim) and the nodes' (B · N, heads, 1, …)."""
    batch, heads, _, head_dim = known.shape
    nodes = new.shape[0] // batch
    behind = new.reshape(batch, nodes, heads, head_dim).transpose(0, 2, 1, 3)
    joined = mx.concatenate([known, behind], axis=2)
    spread = mx.broadcast_to(joined[:, None], (batch, nodes, *joined.shape[1:]))
    return spread.reshape(batch * nodes, *joined.shape[1:])
