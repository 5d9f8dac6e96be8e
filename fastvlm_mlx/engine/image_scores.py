"""Scores given answers to one question about many images, from their visual tokens: the vision tower has no part in it.

Shapes: B images, N visual tokens of each, D hidden size.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastvlm_mlx.backend import mx
from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.engine.choices import Trie, read_scores, submit
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.kv_cache import KVCache
from fastvlm_mlx.streams import turn


class ImageScorer:
    """Scores answers to a question about images, many at a time; each as `RowDecoder.score` would alone.

    What comes before the image, the system text, is computed once. What follows it is embedded once.

    Args:
        model: Prepared for the device.
        input_ids: (T,) of the prompt, with one `IMAGE_TOKEN`.
        choices: The token ids of each answer, its end token included.
    """

    def __init__(self, model: FastVLM, input_ids: Sequence[int], choices: Sequence[Sequence[int]]) -> None:
        place = list(input_ids).index(IMAGE_TOKEN)
        self._model = model
        self._trie = Trie(choices)
        with turn():
            _, self._before = model.prefill(list(input_ids[:place]))
            self._after = model.language_model.model.embed_tokens(mx.array(list(input_ids[place + 1 :])))
            mx.async_eval([layer.state for layer in self._before], self._after)

    def __call__(self, visual_tokens: NDArray[np.floating]) -> NDArray[np.float64]:
        """The logarithms of the probabilities (B, choices) that each choice is the whole answer about each image.

        Args:
            visual_tokens: (B, N, D).

        Raises:
            CheckpointError: If they are NaN or infinite.
        """
        batch = len(visual_tokens)
        with turn():
            shown = mx.array(np.ascontiguousarray(visual_tokens)).astype(self._model.dtype)
            after = mx.broadcast_to(self._after, (batch, *self._after.shape))
            cache = [_repeated(layer, batch) for layer in self._before]
            logits = self._model.language_model.prefill(mx.concatenate([shown, after], axis=1), cache)
            edges = submit(self._model, logits, cache, self._trie)
        return self._trie.sums(read_scores(edges))


def _repeated(layer: KVCache, batch: int) -> KVCache:
    """A cache of `batch` rows that all hold what one row does, in the memory of that."""
    return KVCache.of(*(mx.broadcast_to(part, (batch, *part.shape[1:])) for part in layer.filled))
