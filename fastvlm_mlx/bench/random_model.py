"""Full-size models with random weights, made in memory: how fast a model is does not depend on what it has learned."""

import math
import re
import zlib

import numpy as np
from mlx.utils import tree_map_with_path

from fastvlm_mlx.backend import compute_dtype, mx
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.inputs.tokenizer import END_OF_TEXT, IM_END, IM_START, Tokenizer
from fastvlm_mlx.model.device import prepare
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.streams import turn

_POOL = 1_048_573
"""Random numbers that all weights are cut from; a prime, so that no two rows of a matrix are equal."""

_SPECIAL = {END_OF_TEXT: 151643, IM_START: 151644, IM_END: 151645}


class WordTokenizer(Tokenizer):
    """Stands in for Qwen2's: a token a word, which for plain English makes about as many."""

    def __init__(self) -> None:
        """Needs no files."""

    def start(self) -> None:
        """There is nothing to build."""

    def encode(self, text: str) -> list[int]:
        """An id for each word with the space before it, run of punctuation or run of space."""
        return [zlib.crc32(word.encode()) % _SPECIAL[END_OF_TEXT] for word in re.findall(r" ?\w+|[^\w\s]+|\s+", text)]

    def token_id(self, content: str) -> int:
        """Qwen2's."""
        return _SPECIAL[content]

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        """The number of the token, as no word is known for it."""
        return b"" if skip_special_tokens and token_id in _SPECIAL.values() else f" {token_id}".encode()


def random_model(config: ModelConfig, *, seed: int = 0) -> tuple[FastVLM, FastVLMProcessor]:
    """A model of this architecture, computing in `config.dtype` where the device can, and a processor for it.

    The weights are finite and keep activations near 1; they are made when they are first used.
    """
    dtype = compute_dtype(config.dtype)
    values = np.random.default_rng(seed).standard_normal(_POOL, dtype=np.float32)
    pool = mx.array(values).astype(dtype)

    def fill(path: str, like: mx.array) -> mx.array:
        if path.endswith("bias"):
            return mx.zeros(like.shape, dtype)
        if like.ndim == 1:
            return mx.ones(like.shape, dtype)
        fan_in = math.prod(like.shape[1:])
        start = zlib.crc32(path.encode()) % _POOL
        repeated = mx.tile(pool, (start + like.size) // _POOL + 1)[start : start + like.size]
        return repeated.reshape(like.shape) * mx.array(fan_in**-0.5, dtype)

    with turn():
        model = FastVLM(config)
        model.update(tree_map_with_path(fill, model.parameters()))
        model.eval()
        prepare(model)
    return model, FastVLMProcessor(WordTokenizer(), config)
