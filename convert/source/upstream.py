"""An upstream checkpoint whose every tensor has its place in our module tree."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastvlm_mlx.config import ModelConfig, TextConfig, VisionConfig
from fastvlm_mlx.convert.fold.float16 import Scaling, factors
from fastvlm_mlx.convert.source import layouts
from fastvlm_mlx.convert.source import upstream_config as upstream
from fastvlm_mlx.convert.source.layouts import Layout, Match
from fastvlm_mlx.convert.source.source import Source
from fastvlm_mlx.convert.source.weights import Shape, Weight, weight
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.inputs.tokenizer import END_OF_TEXT, IM_END, Tokenizer

LM_HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
TIED_REASON = "equal to the embedding, which the head uses"

_TOWER = "vision_tower."


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A source, understood.

    Attributes:
        source: The open source.
        config: Its config.json.
        layout: Its layout.
        match: What each of its tensors is.
    """

    source: Source
    config: Mapping[str, Any]
    layout: Layout
    match: Match

    @classmethod
    def of(cls, source: Source) -> "Checkpoint":
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
            layout = layouts.OURS
        else:
            layout = layouts.recognise(source.tensors, source.name)
        upstream.check(config)
        match = layouts.match(layout, source.tensors, source.name)
        return cls(source=source, config=config, layout=layout, match=match)

    @property
    def has_tower(self) -> bool:
        """Whether it has a vision tower."""
        return any(place.startswith(_TOWER) for place in self.match.places)

    @property
    def outside_tower(self) -> list[str]:
        """The keys of everything else."""
        return [key for place, key in self.match.places.items() if not place.startswith(_TOWER)]

    def weight(self, place: str, shape: Shape) -> Weight:
        """The tensor at a place, in the shape in which it is used.

        Raises:
            CheckpointError: If it has another shape.
        """
        key = self.match.places[place]
        tensors = self.source.tensors
        return weight(
            tensors[key],
            shape,
            channels_last=self.layout.channels_last,
            companions=tuple(tensors[companion] for companion in self.match.packed.get(key, ())),
            quantization=self.config.get("quantization") or self.config.get("quantization_config"),
        )

    def vision_config(self) -> VisionConfig:
        """The architecture of its tower, unscaled."""
        depths = tuple(self._count(f"{_TOWER}stages.{stage}.blocks.") for stage in range(5))
        vision: VisionConfig = upstream.vision_config(self.config, self._shape, depths)
        return vision

    def text_config(self) -> TextConfig:
        """The architecture of its decoder; the head is tied if it is absent or equals the embedding."""
        layers = self._count("language_model.model.layers.")
        text: TextConfig = upstream.text_config(self.config, self._shape, layers)
        shape = (text.vocab_size, text.hidden_size)
        places = self.match.places
        tied = LM_HEAD not in places or self.weight(LM_HEAD, shape).equals(self.weight(EMBEDDING, shape))
        return replace(text, tie_word_embeddings=tied)

    def dropped(self, text: TextConfig) -> dict[str, str]:
        """The reason for every tensor that is not used."""
        head = self.match.places.get(LM_HEAD)
        return {**self.match.dropped, **({head: TIED_REASON} if head and text.tie_word_embeddings else {})}

    def unscale(self) -> dict[str, float]:
        """What takes the scaling of a checkpoint in our own format out of its parameters."""
        if not self.layout.folded:
            return {}
        scales = ModelConfig.from_dict(self.config).vision_config.scales
        return {name: 1 / factor for name, factor in factors(Scaling.of(scales)).items()}

    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end an answer: ChatML's, and what the configs name.

        Raises:
            CheckpointError: If it has no tokenizer.
        """
        tokenizer = Tokenizer(self.source.folder)
        ends = {tokenizer.token_id(content) for content in (IM_END, END_OF_TEXT)}
        for values in (self.config, self.source.json("generation_config.json") or {}):
            named = values.get("eos_token_id")
            ends.update(named if isinstance(named, list) else [] if named is None else [named])
        return tuple(sorted(ends))

    @property
    def public_name(self) -> str:
        """The repository, or the name of a folder or archive without its path, which is nobody's business."""
        source = self.source
        return source.name if source.revision else Path(source.name).expanduser().resolve().name

    def _shape(self, place: str) -> Shape:
        """The shape of the tensor at a place, as it is stored."""
        return self.source.tensors[self.match.places[place]].shape

    def _count(self, prefix: str) -> int:
        """How many blocks or layers there are behind `prefix`."""
        places = self.match.places
        return len({place[len(prefix) :].partition(".")[0] for place in places if place.startswith(prefix)})
