"""An upstream checkpoint, its tensors matched with targets in our module tree."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fastvlm_mlx.config import LayerQuantization, ModelConfig, QuantizationConfig, TextConfig, VisionConfig
from fastvlm_mlx.convert.arrays import Shape
from fastvlm_mlx.convert.parts import EMBEDDING
from fastvlm_mlx.convert.source import upstream_config
from fastvlm_mlx.convert.source.layouts import OURS, Layout
from fastvlm_mlx.convert.source.match import Match, match, recognise
from fastvlm_mlx.convert.source.source import Source
from fastvlm_mlx.convert.source.weights import Weight, weight
from fastvlm_mlx.errors import CheckpointError, ConversionError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.tokenizer import Tokenizer
from fastvlm_mlx.inputs.tokenizer_files import END_OF_TEXT, IM_END
from fastvlm_mlx.schema import integer

LM_HEAD = "language_model.lm_head.weight"
TIED_REASON = "equal to the embedding, which the head uses"
UNUSED_REASON = "the head is tied to the embedding, as you chose"

_TOWER = "vision_tower."
_ROOTS = ("model.", "language_model.")


@dataclass(frozen=True, kw_only=True)
class UpstreamCheckpoint:
    """A source whose layout and config are known.

    Attributes:
        source: The open source.
        config: Its config.json.
        layout: Its layout.
        match: The use of each of its tensors.
        quantization: What its config says of its quantized layers, by the module paths of the source; None if nothing.
    """

    source: Source
    config: Mapping[str, Any]
    layout: Layout
    match: Match
    quantization: QuantizationConfig | None

    @classmethod
    def of(cls, source: Source) -> "UpstreamCheckpoint":
        """Recognises the layout of `source` and checks its config and its keys.

        Raises:
            CheckpointError: If it is incomplete or of an unknown layout.
            ConfigError: If it is another architecture.
        """
        config = source.json("config.json")
        if config is None:
            raise CheckpointError(f"{source.label}: has no config.json")
        if "fastvlm_format" in config:
            source = source.in_parts(ModelConfig.from_dict(config).text_config)
            layout = OURS
        else:
            layout = recognise(source.tensors, source.name)
        upstream_config.check(config)
        matched = match(layout, source.tensors, source.name)
        entry = config.get("quantization") or config.get("quantization_config")
        quantization = QuantizationConfig.from_dict(entry) if entry is not None and matched.packed else None
        return cls(source=source, config=config, layout=layout, match=matched, quantization=quantization)

    @property
    def has_tower(self) -> bool:
        """Whether it has a vision tower."""
        return any(target.startswith(_TOWER) for target in self.match.targets)

    @property
    def outside_tower(self) -> list[str]:
        """The keys of everything but the vision tower."""
        return [key for target, key in self.match.targets.items() if not target.startswith(_TOWER)]

    def weight(self, target: str, shape: Shape, factor: float = 1.0) -> Weight:
        """The tensor for a target, in the shape in which it is used.

        Args:
            target: A name in our module tree.
            shape: The shape that it must have there.
            factor: A power of two that its values are multiplied by.

        Raises:
            CheckpointError: If it has another shape.
        """
        key = self.match.targets[target]
        tensors = self.source.tensors
        return weight(
            tensors[key],
            shape,
            channels_last=self.layout.channels_last,
            companions=tuple(tensors[companion] for companion in self.match.packed.get(key, ())),
            quantization=self._quantization(key.removesuffix(".weight"), target.removesuffix(".weight")),
            factor=factor,
        )

    def _quantization(self, *paths: str) -> LayerQuantization | None:
        """What the config says of the layer that is called `paths`; None if only its tensors can tell.

        Programs name layers from different roots. Where a config lists layers, but not this one, its default may be
        meant for others.
        """
        if self.quantization is None:
            return None
        overrides = {_without_roots(path): layer for path, layer in self.quantization.overrides.items()}
        for path in map(_without_roots, paths):
            if path in overrides:
                return overrides[path]
        return None if overrides else self.quantization.default

    def vision_config(self) -> VisionConfig:
        """The architecture of its tower, unscaled."""
        depths = tuple(self._count(f"{_TOWER}stages.{stage}.blocks.") for stage in range(5))
        vision: VisionConfig = upstream_config.vision_config(self.config, self._rows, depths)
        return vision

    def text_config(self, tie: bool | None = None) -> TextConfig:
        """The architecture of its decoder.

        Args:
            tie: Whether the head is tied to the embedding. By default it is if the checkpoint has no head or one that
                equals the embedding.

        Raises:
            CheckpointError: If it has a head of its own, but its config says that the head is tied.
            ConversionError: If the head is not to be tied, but there is none, or none that differs from the embedding.
        """
        layers = self._count("language_model.model.layers.")
        text: TextConfig = upstream_config.text_config(self.config, self._rows, layers)
        said = upstream_config.tied(self.config)
        if LM_HEAD not in self.match.targets:
            if tie is False:
                raise ConversionError(f"{self.source.label}: has no head; it can only be tied to the embedding")
            return text
        if self._head_is_embedding:
            if tie is False:
                raise ConversionError(f"{self.source.label}: has a head that equals the embedding; it is tied to that")
            return text
        if tie is None and said:
            raise CheckpointError(
                f"{self.source.label}: config.json says tie_word_embeddings, but {self.match.targets[LM_HEAD]} differs "
                "from the embedding; convert it with --tie-word-embeddings, which drops that head, or with "
                "--no-tie-word-embeddings, which uses it"
            )
        return replace(text, tie_word_embeddings=bool(tie))

    @cached_property
    def _head_is_embedding(self) -> bool:
        """Whether the head holds the values of the embedding."""
        shape = self._rows(f"{EMBEDDING}.weight"), self._rows("language_model.model.norm.weight")
        equal: bool = self.weight(LM_HEAD, shape).equals(self.weight(f"{EMBEDDING}.weight", shape))
        return equal

    def dropped(self, text: TextConfig) -> dict[str, str]:
        """The reason for every tensor that is not used."""
        dropped: dict[str, str] = dict(self.match.dropped)
        head = self.match.targets.get(LM_HEAD)
        if head is not None and text.tie_word_embeddings:
            reason = TIED_REASON if self._head_is_embedding else UNUSED_REASON
            dropped |= dict.fromkeys((head, *self.match.packed.get(head, ())), reason)
        return dropped

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, each of whose tokens has a row of the embedding.

        Raises:
            CheckpointError: If it has none, or one that is damaged.
        """
        tokenizer = Tokenizer(self.source.folder, self._rows(f"{EMBEDDING}.weight"))
        tokenizer.check_ids()
        return tokenizer

    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end an answer: ChatML's, and those that the configs name; without a tokenizer only these.

        Raises:
            CheckpointError: If it has no tokenizer.
            ConfigError: If a config names something else than ids.
        """
        ends = (
            set() if self.source.headers_only else {self.tokenizer.token_id(token) for token in (IM_END, END_OF_TEXT)}
        )
        for values in (self.config, self.source.json("generation_config.json") or {}):
            named = values.get("eos_token_id")
            for token in named if isinstance(named, list) else [] if named is None else [named]:
                ends.add(integer(token, "eos_token_id", least=0))
        rows = self._rows(f"{EMBEDDING}.weight")
        return tuple(sorted(token for token in ends if token < rows))

    @property
    def public_name(self) -> str:
        """The repository, or the name of a folder or archive without its path, which may be private."""
        source = self.source
        return source.name if source.revision else printable(Path(os.path.expanduser(source.name)).resolve().name)

    def _rows(self, target: str) -> int:
        """The first dimension of the tensor for a target.

        Raises:
            CheckpointError: If it is a single number.
        """
        tensor = self.source.tensors[self.match.targets[target]]
        if not tensor.shape:
            raise CheckpointError(f"{tensor.file.label}: tensor {printable(tensor.name)} is a single number")
        rows: int = tensor.shape[0]
        return rows

    def _count(self, prefix: str) -> int:
        """The number of blocks or layers behind `prefix`."""
        targets = self.match.targets
        return len({target[len(prefix) :].partition(".")[0] for target in targets if target.startswith(prefix)})


def _without_roots(path: str) -> str:
    """A layer's path without the names of the modules that programs wrap a decoder in."""
    while path.startswith(_ROOTS):
        path = path.partition(".")[2]
    return path
