"""Compares the weights of two checkpoints, dequantized and without their scaling for float16."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastvlm_mlx.backend import mx
from fastvlm_mlx.checkpoint.folder import read_weights
from fastvlm_mlx.checkpoint.fusing import in_parts
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.convert.arrays import dequantize
from fastvlm_mlx.convert.compare.layerwise import Segment
from fastvlm_mlx.convert.fold.float16 import Scaling, factors
from fastvlm_mlx.convert.parts import PARTS, part_of
from fastvlm_mlx.convert.progress import Notify


class WeightError(NamedTuple):
    """The change of some weights.

    Attributes:
        change: The sum of the squares of the change.
        norm: The sum of the squares of the exact weights.
    """

    change: float
    norm: float

    @classmethod
    def total(cls, errors: Iterable["WeightError"]) -> "WeightError":
        """The error of several tensors together."""
        change = norm = 0.0
        for error in errors:
            change, norm = change + error.change, norm + error.norm
        return cls(change, norm)

    @property
    def relative(self) -> float:
        """The norm of the change, relative to that of the exact weights; 0 for weights that are all 0."""
        return float(np.sqrt(self.change / self.norm)) if self.norm else 0.0


def errors_by_part(errors: Mapping[str, WeightError]) -> dict[str, float]:
    """The relative error of each part's parameters together."""
    return {
        part: WeightError.total(error for path, error in errors.items() if part_of(path) == part).relative
        for part in PARTS
    }


def weight_errors(
    converted: "ConvertedWeights", reference: "ConvertedWeights", notify: Notify
) -> dict[str, WeightError]:
    """The error of every parameter of a checkpoint against a reference.

    The 7x7 of a ConvFFN and the linear after it may share out a power of two differently; that is no error.
    """
    errors: dict[str, WeightError] = {}
    shared = 1.0
    for name in reference.names:
        notify(f"comparing {name}")
        first, second = converted[name], reference[name]
        norm = float(mx.square(second).sum())
        if name.endswith("conv_ffn.conv.weight"):
            ratio = float(mx.square(first).sum()) / norm if norm else 1.0
            shared = 2.0 ** round(np.log2(ratio) / 2) if 0 < ratio < np.inf else 1.0
            first = first / shared
        elif name.endswith("conv_ffn.fc1.weight"):
            first = first * shared
        errors[name] = WeightError(float(mx.square(first - second).sum()), norm)
    return errors


class ConvertedWeights:
    """The parameters of a converted checkpoint, dequantized and unscaled, read one by one.

    Args:
        folder: The checkpoint.

    Attributes:
        names: The parameters; the 7x7 of each ConvFFN comes before the linear after it.
    """

    def __init__(self, folder: Path) -> None:
        self._config = ModelConfig.from_path(folder)
        self._stored = in_parts(read_weights(folder), self._config.text_config)
        self._factors = factors(Scaling.of(self._config.vision_config.scales))
        self.names = sorted(
            (name for name in self._stored if not name.endswith((".scales", ".biases"))),
            key=lambda name: (name.replace("fc1", "conv1"), name),
        )

    def __getitem__(self, name: str) -> mx.array:
        value, layer = self._stored[name], name.removesuffix(".weight")
        if name.endswith(".weight") and f"{layer}.scales" in self._stored and self._config.quantization:
            settings = self._config.quantization.for_layer(layer).to_dict()
            value = dequantize(value, self._stored[f"{layer}.scales"], self._stored.get(f"{layer}.biases"), **settings)
        return mx.divide(value.astype(mx.float32), self._factors.get(name, 1.0))

    def bits(self, segment: Segment) -> int | None:
        """The fewest bits of a layer of a segment; None if none is quantized."""
        quantization = self._config.quantization
        layers = [name.removesuffix(".scales") for name in self._stored if name.endswith(".scales")]
        bits = [quantization.for_layer(layer).bits for layer in layers if quantization and segment.holds(layer)]
        return min((each or 0 for each in bits), default=None)
