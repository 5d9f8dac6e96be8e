"""The first prompt of a decoder whose weights are still in a file.

Reading all weights into float32 takes longer than the prompt, most of it for memory that the system has to find. So
each block's weights are read for this prompt alone, into memory that the block before has left, and those that the
answer needs are read when its second token is computed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten, tree_unflatten

from fastvlm_mlx.backend import mx

if TYPE_CHECKING:
    from fastvlm_mlx.model.language import Qwen2, TransformerBlock


class FirstPass:
    """What a decoder needs to see one prompt before its weights are read.

    Args:
        decoder: Its weights have not been read.
        blocks: The weights of each block once more, by their names in it, as arrays that have not been read either.
        embedded: Returns the embeddings (T, D) of token ids (T,), from the file.
    """

    def __init__(
        self,
        decoder: "Qwen2",
        blocks: Sequence[dict[str, mx.array]],
        embedded: Callable[[npt.NDArray[np.int32]], mx.array],
    ) -> None:
        self.embedded = embedded
        self._blocks = list(blocks)
        self._head = (decoder.lm_head if "lm_head" in decoder else decoder.model.embed_tokens).weight
        self._weights = dict(tree_flatten(decoder.parameters()))

    def fits(self, decoder: "Qwen2") -> bool:
        """Whether the decoder's weights are those that it had."""
        weights = dict(tree_flatten(decoder.parameters()))
        return weights.keys() == self._weights.keys() and all(weights[name] is self._weights[name] for name in weights)

    def through(self, layers: "Sequence[TransformerBlock]") -> "Iterator[TransformerBlock]":
        """Each block with its weights, which it has until the next one is taken.

        Meanwhile the next block's are read, and what computes logits, which is kept.
        """
        mx.async_eval(self._head)
        mx.async_eval(self._blocks[0])
        for number, layer in enumerate(layers):
            kept = layer.parameters()
            layer.update(tree_unflatten(list(self._blocks[number].items())))
            if number + 1 < len(self._blocks):
                mx.async_eval(self._blocks[number + 1])
            try:
                yield layer
            finally:
                layer.update(kept)
                self._blocks[number] = {}
