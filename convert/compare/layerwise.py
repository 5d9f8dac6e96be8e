"""The model as a sequence of stages that can be run one by one, each from what the one before it gave.

Between stages activations have their true magnitude, so that stages of checkpoints that are scaled differently for
float16 can be fed with each other's outputs; run them in float32.

Shapes: B batch, H and W height and width, C channels, N visual tokens, L positions, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.backend import mx
from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.model.activations import gelu
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.vision import FastViTHD

PROJECTOR = "mm_projector"
EMBEDDING = "language_model.model.embed_tokens"
HEAD = "language_model.head"
_HEAD = (EMBEDDING, "language_model.model.norm", "language_model.lm_head")


@dataclass(frozen=True)
class Stage:
    """A part of the model.

    Attributes:
        name: Its path in the module tree; `HEAD` is the final norm and the head.
        run: From the stage's input to its output.
    """

    name: str
    run: Callable[[mx.array], mx.array]

    def holds(self, path: str) -> bool:
        """Whether what is at `path` belongs to it; the embedding belongs to the head, too, which may be tied to it."""
        names = _HEAD if self.name == HEAD else (self.name,)
        return any(path == name or path.startswith(f"{name}.") for name in names)


def tower_stages(model: FastVLM) -> Iterator[Stage]:
    """From pixel values (B, R, R, 3) to features (B, R/64, R/64, C)."""
    tower, scales = model.vision_tower, model.config.vision_config.scales

    before = 1.0
    for index, after in enumerate(scales.stem):
        yield Stage(f"vision_tower.stem.{index}", partial(_stem, tower, index, before, after))
        before = after
    for index, (stage, own) in enumerate(zip(tower.stages, scales.stages, strict=True)):
        name = f"vision_tower.stages.{index}"
        if "downsample" in stage:
            yield Stage(f"{name}.downsample", partial(_scaled, stage.downsample, before, own.stream))
        if "cpe" in stage:
            yield Stage(f"{name}.cpe", partial(_scaled, stage.cpe, own.stream, own.stream))
        for number, block in enumerate(stage.blocks):
            yield Stage(f"{name}.blocks.{number}", partial(_scaled, block, own.stream, own.stream))
        before = own.stream
    yield Stage("vision_tower.conv_exp", partial(_scaled, tower.conv_exp, before, scales.conv_exp))


def _stem(tower: FastViTHD, index: int, reads: float, writes: float, x: mx.array) -> mx.array:
    # looked up at each call: the stage is a layer, which quantization replaces
    return gelu(tower.stem[index](x / reads), writes) * writes


def _scaled(module: Callable[[mx.array], mx.array], reads: float, writes: float, x: mx.array) -> mx.array:
    return module(x / reads) * writes


def projector_stage(model: FastVLM) -> Stage:
    """From features (B, H, W, C) to visual tokens (B, N, D)."""
    scale = model.config.vision_config.scales.conv_exp

    def run(features: mx.array) -> mx.array:
        return model.mm_projector(features.reshape(features.shape[0], -1, features.shape[-1]) / scale)

    return Stage(PROJECTOR, run)


def embedding_stage(model: FastVLM) -> Stage:
    """From token ids (T,) to embeddings (T, D)."""
    return Stage(EMBEDDING, lambda ids: model.language_model.model.embed_tokens(ids))


def decoder_stages(model: FastVLM) -> Iterator[Stage]:
    """From embeddings (B, L, D) to embeddings, block by block."""
    for number, layer in enumerate(model.language_model.layers):
        yield Stage(f"language_model.model.layers.{number}", partial(layer, mask="causal"))


def head_stage(model: FastVLM) -> Stage:
    """From the last block's output (B, L, D) to logits (B, L, V)."""
    language_model = model.language_model
    return Stage(HEAD, lambda x: language_model.head(language_model.model.norm(x)))


def splice(ids: npt.NDArray[np.int32], embedded: mx.array, visual: mx.array) -> mx.array:
    """Input embeddings (1, L, D): those of the text, `visual` (1, N, D) in the place of the one image.

    Args:
        ids: (T,) token ids, one of them `IMAGE_TOKEN`.
        embedded: (T - 1, D), of the others.
        visual: Of the image.
    """
    place = int(np.flatnonzero(ids == IMAGE_TOKEN)[0])
    return mx.concatenate([embedded[:place], visual[0], embedded[place:]])[None]
