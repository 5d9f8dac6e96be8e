"""How many rows a model decodes at once on a machine, and the memory that they take."""

from mlx.utils import tree_reduce

from fastvlm_mlx.backend import device
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.model.fastvlm import FastVLM

MOST_ROWS = {"cpu": 16, "gpu": 32}
"""The most rows that are decoded at once by default."""

POSITIONS = 1024
"""Of a row, for which memory is set aside by default: an image, its question and an answer."""

SHARE = 0.6
"""Of the memory, the part that weights and rows may take by default; the rest is for images and other programs."""


def position_bytes(config: ModelConfig, item: int) -> int:
    """Bytes of keys and values that one position of one row takes, with `item` bytes a number."""
    text = config.text_config
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * item


def free_positions(model: FastVLM, memory: int) -> int:
    """The positions whose keys and values a machine with so many bytes of memory has room for, besides the weights."""
    weights = tree_reduce(lambda total, weight: total + weight.nbytes, model.parameters(), 0)
    return max(1, int(SHARE * memory - weights) // position_bytes(model.config, model.dtype.size))


def default_rows(positions: int) -> int:
    """How many rows to decode at once where there is room for so many positions."""
    return max(1, min(MOST_ROWS[device()], positions // POSITIONS))
