"""An upstream checkpoint, its tensors matched with targets in our module tree."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.inputs.tokenizer import END_OF_TEXT, IM_END, Tokenizer

LM_HEAD = "language_model.lm_head.weight"
TIED_REASON = "equal to the embedding, which the head uses"

_TOWER = "vision_tower."


@dataclass(frozen=True, kw_only=True)
class UpstreamCheckpoint:
    """A source whose layout and config are known.

    Attributes:
        source: The open source.
        config: Its config.json.
        layout: Its layout.
        match: The use of each of its tensors.
        quantization: How its quantized layers are quantized, by the module paths of the source.
    """

    source: Source
    config: Mapping[str, Any]
    layout: Layout
    match: Match
    quantization: QuantizationConfig

    @classmethod
    def of(cls, source: Source) -> "UpstreamCheckpoint":
        """Recognises the layout of `source` and checks its config and its keys.

        Raises:
            CheckpointError: If it is incomplete or of an unknown layout.
            ConfigError: If it is another architecture.
        """
        config = source.json("config.json")
        if config is None:
            raise CheckpointError(f"{source.name}: has no config.json")
        if "fastvlm_format" in config:
            ModelConfig.from_dict(config)
            layout = OURS
        else:
            layout = recognise(source.tensors, source.name)
        upstream_config.check(config)
        matched = match(layout, source.tensors, source.name)
        entry = config.get("quantization") or config.get("quantization_config")
        known = entry is not None and matched.packed
        quantization = QuantizationConfig.from_dict(entry) if known else QuantizationConfig(default=LayerQuantization())
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
            quantization=self.quantization.for_layer(key.removesuffix(".weight")),
            factor=factor,
        )

    def vision_config(self) -> VisionConfig:
        """The architecture of its tower, unscaled."""
        depths = tuple(self._count(f"{_TOWER}stages.{stage}.blocks.") for stage in range(5))
        vision: VisionConfig = upstream_config.vision_config(self.config, self._shape, depths)
        return vision

    def text_config(self) -> TextConfig:
        """The architecture of its decoder; the head is tied if it is absent or equals the embedding."""
        layers = self._count("language_model.model.layers.")
        text: TextConfig = upstream_config.text_config(self.config, self._shape, layers)
        shape = (text.vocab_size, text.hidden_size)
        if LM_HEAD in self.match.targets:
            embedding = self.weight(f"{EMBEDDING}.weight", shape)
            return replace(text, tie_word_embeddings=self.weight(LM_HEAD, shape).equals(embedding))
        return replace(text, tie_word_embeddings=True)

    def dropped(self, text: TextConfig) -> dict[str, str]:
        """The reason for every tensor that is not used."""
        head = self.match.targets.get(LM_HEAD)
        return {**self.match.dropped, **({head: TIED_REASON} if head and text.tie_word_embeddings else {})}

    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end an answer: ChatML's, and those that the configs name; without a tokenizer only these.

        Raises:
            CheckpointError: If it has no tokenizer.
        """
        ends: set[Any] = set()
        if not self.source.headers_only:
            tokenizer = Tokenizer(self.source.folder)
            ends = {tokenizer.token_id(content) for content in (IM_END, END_OF_TEXT)}
        for values in (self.config, self.source.json("generation_config.json") or {}):
            named = values.get("eos_token_id")
            ends.update(named if isinstance(named, list) else [] if named is None else [named])
        return tuple(sorted(ends))

    @property
    def public_name(self) -> str:
        """The repository, or the name of a folder or archive without its path, which may be private."""
        source = self.source
        return source.name if source.revision else Path(source.name).expanduser().resolve().name

    def _shape(self, target: str) -> Shape:
        """The shape of the tensor for a target, as it is stored."""
        return self.source.tensors[self.match.targets[target]].shape

    def _count(self, prefix: str) -> int:
        """The number of blocks or layers behind `prefix`."""
        targets = self.match.targets
        return len({target[len(prefix) :].partition(".")[0] for target in targets if target.startswith(prefix)})
