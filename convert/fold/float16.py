"""Keeps the activations of a FastViTHD within float16 (±65504) without changing its result.

The residual stream of a trained tower can leave that range. An activation that comes too close to the limit is divided
by a power of two, which is exact: the weights of the layers that write it are divided, those of the layers that read it
are multiplied. At run time only functions that are not homogeneous need to know: the GELUs, and the LayerNorms, whose
eps is divided by the square.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fastvlm_mlx.config import ActivationScales, StageScales

FLOAT16_MAX = 65504.0
MARGIN = 8.0
"""How far below `FLOAT16_MAX` the activations of calibration images are kept: those of other images may be larger."""


@dataclass(frozen=True)
class Scaling:
    """The powers of two that a tower's activations are divided by.

    Attributes:
        scales: Those that the runtime has to know.
        convolutions: Those of the ConvFFN's 7x7 outputs, for every block of every stage; only the weights need them.
    """

    scales: ActivationScales
    convolutions: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, scales: ActivationScales) -> "Scaling":
        """The scaling of a checkpoint that records `scales`; the factors of its 7x7s cancel out."""
        return cls(scales, tuple((1.0,) * len(stage.hidden) for stage in scales.stages))


def choose(peaks: Mapping[str, float]) -> Scaling:
    """The smallest powers of two, mostly 1, that keep activations below a `MARGIN`-th of float16's largest value.

    Args:
        peaks: The largest magnitude of every activation, by the names of `FastViTHD.activation_peaks`.
    """

    def scale(*names: str) -> float:
        return power_of_two(max(peaks[name] for name in names))

    stages, convolutions = [], []
    stem = [scale(f"stem.{index}") for index in range(3)]
    stem[2] = scale("stem.2", *_stream(peaks, 0))
    for stage in range(5):
        depth = sum(name.endswith("conv_ffn.fc1") for name in peaks if name.startswith(f"stages.{stage}."))
        blocks = [f"stages.{stage}.blocks.{number}.conv_ffn" for number in range(depth)]
        stream = stem[2]
        downsample: tuple[float, ...] = ()
        if stage > 0:
            stream = scale(*_stream(peaks, stage), f"stages.{stage}.downsample.proj")
            downsample = (scale(f"stages.{stage}.downsample.conv"), stream)
        hidden = tuple(scale(f"{block}.fc1") for block in blocks)
        stages.append(StageScales(stream=stream, downsample=downsample, hidden=hidden))
        convolutions.append(tuple(scale(f"{block}.conv") for block in blocks))
    scales = ActivationScales(stem=(stem[0], stem[1], stem[2]), stages=tuple(stages), conv_exp=scale("conv_exp.conv"))
    return Scaling(scales, tuple(convolutions))


def _stream(peaks: Mapping[str, float], stage: int) -> list[str]:
    """The names of a stage's residual stream and of the activations that are added to it."""
    inside = (".downsample.conv", ".downsample.proj", ".conv_ffn.conv", ".conv_ffn.fc1")
    return [name for name in peaks if name.startswith(f"stages.{stage}.") and not name.endswith(inside)]


def power_of_two(peak: float) -> float:
    """The smallest power of two, at least 1, that brings `peak` to at most `FLOAT16_MAX / MARGIN`."""
    return 2.0 ** max(0, math.ceil(math.log2(max(peak, 1.0) * MARGIN / FLOAT16_MAX)))


def factors(scaling: Scaling) -> dict[str, float]:
    """The factor for each parameter of an unscaled model; parameters that are not named stay as they are."""
    scales = scaling.scales
    result: dict[str, float] = {}

    def layer(name: str, reads: float, writes: float) -> None:
        result[f"vision_tower.{name}.weight"] = reads / writes
        result[f"vision_tower.{name}.bias"] = 1 / writes

    stem = (1.0, *scales.stem)
    for index in range(3):
        layer(f"stem.{index}", stem[index], stem[index + 1])
    before = scales.stem[2]
    for number, (stage, convolutions) in enumerate(zip(scales.stages, scaling.convolutions, strict=True)):
        name, stream = f"stages.{number}", stage.stream
        if stage.downsample:
            layer(f"{name}.downsample.conv", before, stage.downsample[0])
            layer(f"{name}.downsample.proj", stage.downsample[0], stream)
        layer(f"{name}.cpe", stream, stream)
        for index, (hidden, convolution) in enumerate(zip(stage.hidden, convolutions, strict=True)):
            block = f"{name}.blocks.{index}"
            layer(f"{block}.token_mixer", stream, stream)
            layer(f"{block}.token_mixer.proj", 1, stream)
            layer(f"{block}.conv_ffn.conv", stream, convolution)
            layer(f"{block}.conv_ffn.fc1", convolution, hidden)
            layer(f"{block}.conv_ffn.fc2", hidden, stream)
        before = stream
    layer("conv_exp.conv", before, scales.conv_exp)
    result["vision_tower.conv_exp.se.reduce.weight"] = scales.conv_exp
    result["mm_projector.0.weight"] = scales.conv_exp
    return result
