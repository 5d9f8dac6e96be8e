"""Makes full-size models with random weights in memory; their speed is that of trained ones."""

import math
import re
import zlib

import numpy as np
from mlx.utils import tree_map_with_path

from fastvlm_mlx.backend import compute_dtype, mx
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.inputs.tokenizer import Tokenizer
from fastvlm_mlx.inputs.tokenizer_files import END_OF_TEXT, IM_END, IM_START
from fastvlm_mlx.model.device import prepare
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.streams import turn

_POOL = 1_048_573
"""How many random numbers all weights are cut from; a prime number, so that no two rows of a matrix are equal."""

_SPECIAL = {END_OF_TEXT: 151643, IM_START: 151644, IM_END: 151645}


class WordTokenizer(Tokenizer):
    """Stands in for Qwen2's tokenizer: one token for each word, which is about as many in plain English."""

    def __init__(self) -> None:
        """Reads no files."""

    def start(self) -> None:
        """Does nothing: there is nothing to build."""

    def encode(self, text: str) -> list[int]:
        """Returns an id for each word with the space before it, each run of punctuation and each run of space."""
        return [zlib.crc32(word.encode()) % _SPECIAL[END_OF_TEXT] for word in re.findall(r" ?\w+|[^\w\s]+|\s+", text)]

    def token_id(self, content: str) -> int:
        """Returns Qwen2's id."""
        return _SPECIAL[content]

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        """Returns the number of the token, since it has no word."""
        return b"" if skip_special_tokens and token_id in _SPECIAL.values() else f" {token_id}".encode()


def random_model(config: ModelConfig, *, seed: int = 0) -> tuple[FastVLM, FastVLMProcessor]:
    """Makes a model of this architecture, which computes in `config.dtype` where the device can, and its processor.

    The weights are finite and keep activations near 1. They are created when they are first used.
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
