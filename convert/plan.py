"""The plan of a conversion, made before any work."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.convert.source.source import Source
from fastvlm_mlx.convert.write.shards import Shard
from fastvlm_mlx.formatting import readable_bytes

_LISTED = 3
"""Dropped tensors whose names end alike are listed one by one up to this number."""


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A source tensor that does not go into the output.

    Attributes:
        name: Its key.
        nbytes: Its size.
        reason: The reason, as a user reads it.
    """

    name: str
    nbytes: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A conversion, derived from the headers of the source alone; `str` gives it in a user's words.

    Attributes:
        source: The name of the source.
        layout: Its layout.
        vision_from: The name and the layout of the source of the vision tower, if it is another one.
        config: The output's config, without the scales, which are measured later, and without the source's hash.
        source_bytes: Bytes of the files read.
        output_bytes: Bytes of the tensors written.
        shards: The files written.
        parameters: The number of parameters of each part.
        dropped: The tensors that are not used.
        kept_quantized: The number of quantized layers that stay as they are.
        dequantized: The quantized layers that do not.
    """

    source: str
    layout: str
    vision_from: tuple[str, str] | None
    config: ModelConfig
    source_bytes: int
    output_bytes: int
    shards: tuple[Shard, ...]
    parameters: Mapping[str, int]
    dropped: tuple[Dropped, ...]
    kept_quantized: int
    dequantized: tuple[str, ...]

    def with_config(self, **changes: Any) -> "Plan":
        """The plan with fields of its config replaced."""
        return replace(self, config=replace(self.config, **changes))

    def __str__(self) -> str:
        vision, text = self.config.vision_config, self.config.text_config
        head = "tied to the embedding" if text.tie_word_embeddings else "of its own"
        decoder = self.parameters["decoder"] + self.parameters["embed"]
        total = sum(self.parameters.values())
        files = ", ".join(shard.file for shard in self.shards)
        lines = {
            "source": f"{self.source}: {self.layout}, {readable_bytes(self.source_bytes)}",
            **({"vision from": f"{self.vision_from[0]}: {self.vision_from[1]}"} if self.vision_from else {}),
            "output": f"{self.config.dtype}, {readable_bytes(self.output_bytes)} in {files}",
            "vision tower": f"{self.parameters['vision']:,} parameters; depths {list(vision.depths)}, "
            f"widths {list(vision.embed_dims)}, {vision.image_size} px",
            "projector": f"{self.parameters['projector']:,} parameters; {vision.hidden_size} -> {text.hidden_size}",
            "decoder": f"{decoder:,} parameters; {text.num_hidden_layers} layers of "
            f"{text.hidden_size}, {text.num_attention_heads} heads ({text.num_key_value_heads} key/value), "
            f"{text.vocab_size} tokens, head {head}",
            "total": f"{total:,} parameters",
            **({"quantized": f"{self.kept_quantized} layers, kept as they are"} if self.kept_quantized else {}),
            **({"dequantized": f"{len(self.dequantized)} layers"} if self.dequantized else {}),
        }
        return "\n".join([*self._dropped_lines(), *(f"{key:<13} {value}" for key, value in lines.items())])

    def _dropped_lines(self) -> list[str]:
        lines = []
        by_reason = sorted(self.dropped, key=lambda tensor: (tensor.reason, tensor.name))
        for reason, tensors in groupby(by_reason, key=lambda tensor: tensor.reason):
            lines.append(f"{'dropped':<13} {reason}:")
            lines += [f"{'':<15} {line}" for line in _counted(list(tensors))]
        return lines


def _counted(tensors: Sequence[Dropped]) -> Iterator[str]:
    """Names of tensors with their bytes; those that end alike in one line, such as `45 × num_batches_tracked`."""
    groups: dict[str, list[Dropped]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.name.rpartition(".")[2], []).append(tensor)
    for leaf, group in groups.items():
        if len(group) > _LISTED:
            yield f"{len(group)} × {leaf} ({sum(tensor.nbytes for tensor in group):,} bytes)"
        else:
            yield from (f"{tensor.name} ({tensor.nbytes:,} bytes)" for tensor in group)


def dropped_tensors(source: Source, reasons: Mapping[str, str]) -> list[Dropped]:
    """The tensors of `source` that `reasons` names."""
    return [
        Dropped(name=name, nbytes=source.tensors[name].nbytes, reason=reason)
        for name, reason in sorted(reasons.items())
    ]
