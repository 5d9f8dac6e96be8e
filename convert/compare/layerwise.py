"""The model as a sequence of segments that run one by one, each from the output of the one before it.

Between segments activations have their true magnitude: segments of checkpoints that are scaled differently for float16
can run on each other's outputs. Run them in float32.

Shapes: B batch, H and W height and width, C channels, N visual tokens, T token ids, L positions, D hidden size,
    V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from fastvlm_mlx.backend import mx, nn
from fastvlm_mlx.convert.parts import EMBEDDING
from fastvlm_mlx.model.activations import gelu
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.vision import FastViTHD

PROJECTOR = "mm_projector"
HEAD = "language_model.head"
_HEAD = (EMBEDDING, "language_model.model.norm", "language_model.lm_head")


@dataclass(frozen=True)
class Segment:
    """A part of the model.

    Attributes:
        name: Its path in the module tree; `HEAD` is the final norm and the head.
        run: Computes its output from its input.
    """

    name: str
    run: Callable[[mx.array], mx.array]

    def holds(self, path: str) -> bool:
        """Whether a layer or parameter belongs to it; a tied embedding belongs to the head, too."""
        prefixes = _HEAD if self.name == HEAD else (self.name,)
        return any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes)


@dataclass(frozen=True)
class Segments:
    """All segments of a model.

    Attributes:
        vision: From pixel values (B, R, R, 3) to features (B, R/64, R/64, C) and, last, to visual tokens (B, N, D).
        embedding: From token ids (T,) to embeddings (T, D).
        blocks: From embeddings (B, L, D) to embeddings, decoder block by decoder block.
        head: From the last block's output (B, L, D) to logits (B, L, V).
    """

    vision: tuple[Segment, ...]
    embedding: Segment
    blocks: tuple[Segment, ...]
    head: Segment

    @property
    def decoder(self) -> tuple[Segment, ...]:
        """From embeddings (B, L, D) to logits (B, L, V)."""
        return (*self.blocks, self.head)


def segments(model: FastVLM) -> Segments:
    """The segments of a model; each run looks layers up, so layers may be replaced between runs."""
    language_model = model.language_model
    return Segments(
        vision=(*_tower(model), _projector(model)),
        embedding=Segment(EMBEDDING, lambda ids: language_model.model.embed_tokens(ids)),
        blocks=tuple(
            Segment(f"language_model.model.layers.{number}", partial(layer, mask="causal"))
            for number, layer in enumerate(language_model.layers)
        ),
        head=Segment(HEAD, lambda x: language_model.head(language_model.model.norm(x))),
    )


def run(sequence: Iterable[Segment], states: list[mx.array]) -> list[mx.array]:
    """The outputs of a sequence of segments, evaluated after each segment."""
    for segment in sequence:
        outputs = []
        for state in states:
            outputs.append(segment.run(state))
            mx.eval(outputs[-1])
        states = outputs
    return states


def module_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a path of the tree."""
    node = root
    for name in path.split("."):
        node = node[int(name)] if isinstance(node, list) else node[name]
    return node


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts another module at a path of the tree."""
    parent, _, name = path.rpartition(".")
    node = module_at(root, parent)
    if isinstance(node, list):
        node[int(name)] = module
    else:
        node[name] = module


def _tower(model: FastVLM) -> Iterator[Segment]:
    tower, scales = model.vision_tower, model.config.vision_config.scales

    before = 1.0
    for index, after in enumerate(scales.stem):
        yield Segment(f"vision_tower.stem.{index}", partial(_stem, tower, index, before, after))
        before = after
    for index, (stage, stage_scales) in enumerate(zip(tower.stages, scales.stages, strict=True)):
        name, stream = f"vision_tower.stages.{index}", stage_scales.stream
        if "downsample" in stage:
            yield Segment(f"{name}.downsample", partial(_scaled, stage.downsample, before, stream))
        if "cpe" in stage:
            yield Segment(f"{name}.cpe", partial(_scaled, stage.cpe, stream, stream))
        for number, block in enumerate(stage.blocks):
            yield Segment(f"{name}.blocks.{number}", partial(_scaled, block, stream, stream))
        before = stream
    yield Segment("vision_tower.conv_exp", partial(_scaled, tower.conv_exp, before, scales.conv_exp))


def _stem(tower: FastViTHD, index: int, reads: float, writes: float, x: mx.array) -> mx.array:
    """(B, H, W, C) -> (B, H', W', C'); input and output have their true magnitude."""
    return gelu(tower.stem[index](x / reads), writes) * writes


def _scaled(module: Callable[[mx.array], mx.array], reads: float, writes: float, x: mx.array) -> mx.array:
    """(B, H, W, C) -> (B, H', W', C'); input and output have their true magnitude."""
    return module(x / reads) * writes


def _projector(model: FastVLM) -> Segment:
    scale = model.config.vision_config.scales.conv_exp

    def project(features: mx.array) -> mx.array:
        return model.mm_projector(features.reshape(features.shape[0], -1, features.shape[-1]) / scale)

    return Segment(PROJECTOR, project)
