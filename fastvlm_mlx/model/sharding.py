"""The decoder on several machines: each rank has a part of every layer, and all have the same hidden states.

The pattern is mlx-lm's: heads and hidden units are divided, and the two products that lead back to the hidden states
are summed over the ranks. The tower, the projector, the embedding and the norms are whole on each rank. The head's
vocabulary is divided, too; as each logit then comes from one rank, all ranks choose the same tokens.

Shapes: B batch, L positions, D hidden size, V vocabulary.
"""

from itertools import accumulate, pairwise
from typing import NamedTuple

from fastvlm_mlx.backend import mx, nn
from fastvlm_mlx.config import ModelConfig, TextConfig
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.language import linear
from fastvlm_mlx.model.rows import row_parts

_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_COLUMNS = ("o_proj", "down_proj")


class Part(NamedTuple):
    """The part of a tensor that a rank has: some of its rows, or some of its columns.

    Attributes:
        rows: Where its rows begin and end, for each piece of a fused projection; empty for all rows.
        columns: Where its columns begin and end; None for all columns.
    """

    rows: tuple[tuple[int, int], ...] = ()
    columns: tuple[int, int] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole tensor."""
        return not self.rows and self.columns is None


def check_divisible(config: ModelConfig, size: int) -> None:
    """Checks that a model can be divided among ranks.

    Raises:
        ConfigError: If its heads, hidden units or groups of quantized weights cannot be divided evenly.
    """
    text = config.text_config
    counts = {"key and value heads": text.num_key_value_heads, "hidden units of its MLPs": text.intermediate_size}
    for what, count in counts.items():
        if count % size:
            possible = [n for n in range(2, text.num_key_value_heads + 1) if not any(c % n for c in counts.values())]
            fitting = " or ".join(map(str, possible)) or "one process"
            raise ConfigError(f"the model has {count} {what}, which {size} ranks cannot share; start {fitting}")


def part_of(name: str, shape: tuple[int, ...], text: TextConfig, rank: int, size: int) -> Part:
    """The part of a checkpoint's tensor that a rank has.

    Args:
        name: Of the tensor.
        shape: As it is stored, packed if it is quantized.
        text: Of the decoder.
        rank: Of the process.
        size: How many there are.

    Raises:
        ConfigError: If groups of quantized weights would be divided.
    """
    path, _, _ = name.rpartition(".")
    layer = path.rpartition(".")[2]
    if path == "language_model.lm_head":
        return Part(rows=(_of_vocabulary(shape[0], rank, size),))
    if not name.startswith("language_model.model.layers."):
        return Part()
    if layer in text.part_rows:
        ends = accumulate(text.part_rows[layer], initial=0)
        return Part(rows=tuple(_share(start, end, rank, size) for start, end in pairwise(ends)))
    if layer in _BY_ROWS:
        return Part(rows=(_share(0, shape[0], rank, size),))
    if layer in _BY_COLUMNS and len(shape) == 2:
        if shape[1] % size:
            raise ConfigError(
                f"{name} has {shape[1]} columns, which {size} ranks cannot share; quantize with smaller groups"
            )
        return Part(columns=_share(0, shape[1], rank, size))
    return Part()


def _share(start: int, end: int, rank: int, size: int) -> tuple[int, int]:
    each = (end - start) // size
    return start + rank * each, start + (rank + 1) * each


def _of_vocabulary(count: int, rank: int, size: int) -> tuple[int, int]:
    """Where the part of the head begins and ends that a rank has; the last one may have less."""
    each = -(-count // size)
    return min(rank * each, count), min((rank + 1) * each, count)


def narrow(model: FastVLM, rank: int, size: int) -> None:
    """Replaces the layers of a model, in place, by those of one rank, which have no weights yet.

    Args:
        model: With layers as they are before any are quantized.
        rank: Of this process.
        size: How many there are.
    """
    decoder = model.language_model
    if "lm_head" in decoder:
        count, inputs = decoder.lm_head.weight.shape
        start, end = _of_vocabulary(count, rank, size)
        decoder["lm_head"] = nn.Linear(inputs, end - start, bias=False)
    for block in decoder.layers:
        attention, mlp = block.self_attn, block.mlp
        attention.num_heads //= size
        attention.num_kv_heads //= size
        for parent in (attention, mlp):
            for name, layer in list(parent.children().items()):
                if isinstance(layer, nn.Linear):
                    outputs, inputs = layer.weight.shape
                    if name in _BY_COLUMNS:
                        inputs //= size
                    else:
                        outputs //= size
                    parent[name] = nn.Linear(inputs, outputs, bias="bias" in layer)


def connect(model: FastVLM, group: mx.distributed.Group) -> None:
    """Lets a rank's model compute together with the others', in place; its weights are set."""
    for block in model.language_model.layers:
        for parent, name in ((block.self_attn, "o_proj"), (block.mlp, "down_proj")):
            parent[name] = SummedLinear(parent[name], group)
    decoder = model.language_model
    vocabulary = model.config.text_config.vocab_size
    head: nn.Module = decoder.model.embed_tokens
    if "lm_head" in decoder:
        head = decoder.lm_head
    else:
        ends = [_of_vocabulary(vocabulary, rank, group.size()) for rank in range(group.size())]
        head = row_parts(head, [end - start for start, end in ends])[group.rank()]
    decoder["lm_head"] = GatheredHead(head, vocabulary, group)
    model.group = group


class SummedLinear(nn.Module):
    """A layer whose inputs are divided among ranks: (B, L, D of this rank) -> (B, L, D), summed over all."""

    def __init__(self, layer: nn.Module, group: mx.distributed.Group) -> None:
        super().__init__()
        self.layer = layer
        self._group = group

    def __call__(self, x: mx.array) -> mx.array:
        """The sum of the outputs of all ranks."""
        return mx.distributed.all_sum(linear(self.layer, x), group=self._group)


class GatheredHead(nn.Module):
    """A head whose vocabulary is divided among ranks: (B, L, D) -> (B, L, V), gathered from all.

    Args:
        part: This rank's, a linear or an embedding.
        vocabulary: Of all.
        group: The ranks.
    """

    def __init__(self, part: nn.Module, vocabulary: int, group: mx.distributed.Group) -> None:
        super().__init__()
        self.part = part
        self._vocabulary, self._group = vocabulary, group
        self._each = -(-vocabulary // group.size())

    def __call__(self, x: mx.array) -> mx.array:
        """Logits, each from the one rank that has its weights."""
        own = linear(self.part, x) if isinstance(self.part, nn.Linear | nn.QuantizedLinear) else self.part.as_linear(x)
        own = mx.pad(own, [(0, 0)] * (own.ndim - 1) + [(0, self._each - own.shape[-1])])
        every = mx.distributed.all_gather(own[None], group=self._group)
        return mx.moveaxis(every, 0, -2).reshape(*own.shape[:-1], -1)[..., : self._vocabulary]
