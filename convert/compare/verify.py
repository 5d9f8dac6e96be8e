"""Compares two checkpoints stage by stage, each stage on what the reference gives it, and names what drifts first."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_mlx.backend import mx
from fastvlm_mlx.checkpoint.folder import is_converted, read_weights
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.released import parse_name
from fastvlm_mlx.config import IMAGE_TOKEN, LayerQuantization, ModelConfig
from fastvlm_mlx.convert.compare.agreement import Agreement, Notify, Probes, Reference
from fastvlm_mlx.convert.compare.layerwise import (
    EMBEDDING,
    Stage,
    decoder_stages,
    embedding_stage,
    head_stage,
    projector_stage,
    splice,
    tower_stages,
)
from fastvlm_mlx.convert.conversion import convert_checkpoint
from fastvlm_mlx.convert.fold.float16 import Scaling, factors
from fastvlm_mlx.convert.quantize.report import Squares
from fastvlm_mlx.convert.quantize.scheme import PARTS, part_of
from fastvlm_mlx.convert.scratch import scratch_folder
from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.model.fastvlm import FastVLM

ROUNDING = 0.02
"""How far stages of unquantized checkpoints may be apart: float16 and bfloat16 stay well below."""

_PACKED = ("scales", "biases")
_STEPS = 6.0
_WIDEST = 0.9


def tolerance(bits: int | None) -> float:
    """How far the weights of a stage may be off, relative to their norm, when they have `bits` bits.

    Rounding normal weights in groups of 64 to b bits changes them by about 1.4 / (2ᵇ − 1) of their norm; this allows
    for four times that. A layer whose scales are wrong is off by about its own size.
    """
    return ROUNDING if bits is None else max(ROUNDING, min(_WIDEST, _STEPS / (2**bits - 1)))


@dataclass(frozen=True, kw_only=True)
class StageDrift:
    """How far one stage of a checkpoint is from the reference's.

    Attributes:
        name: Its path.
        output_error: Norm of the difference of the outputs for the reference's input, relative to what the reference's
            stage adds to its input.
        weight_error: The largest relative change of one of its tensors.
        worst: The tensor with that change.
        allowed: The tolerance for the weights; the output, behind several layers, may be off by twice that.
    """

    name: str
    output_error: float
    weight_error: float
    worst: str
    allowed: float

    @property
    def drifts(self) -> bool:
        """Whether it is further off than rounding explains; what is not a number is."""
        return not (self.output_error <= 2 * self.allowed and self.weight_error <= self.allowed)

    @property
    def culprit(self) -> str:
        """The layer that drifts, or the stage if no tensor explains it."""
        return self.worst.rpartition(".")[0] if not self.weight_error <= self.allowed else self.name


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How far a checkpoint is from a reference.

    Attributes:
        stages: In the order of the forward pass.
        weight_errors: By part of the model.
        agreement: On the next tokens.
    """

    stages: tuple[StageDrift, ...]
    weight_errors: Mapping[str, float]
    agreement: Agreement

    @property
    def first_drift(self) -> StageDrift | None:
        """The first stage that is further off than rounding explains."""
        return next((stage for stage in self.stages if stage.drifts), None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        first = self.first_drift
        return {**asdict(self), "first_drift": first and first.culprit}

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Rows of text for a table: stage, error of its output and of its weights, tolerance."""
        return [
            (stage.name, f"{stage.output_error:.2e}", f"{stage.weight_error:.2e}", f"{stage.allowed:.2g}")
            for stage in self.stages
        ]


def verify(converted: Path, against: str | Path, *, allowed: float | None = None, notify: Notify) -> Verification:
    """Compares a converted checkpoint with another one, or with what a source converts to afresh in float32.

    Args:
        converted: A folder in this project's format.
        against: The reference: such a folder, or any checkpoint that can be converted.
        allowed: The tolerance; by default by the bits of each stage.
        notify: Told what is being done.

    Raises:
        CheckpointError: If one of them is missing, damaged or of an unknown layout.
        ConversionError: If they are models of different architectures.
    """
    with _reference(against, notify) as folder:
        configs = ModelConfig.from_path(converted), ModelConfig.from_path(folder)
        shapes = [(each.text_config, each.vision_config.embed_dims, each.vision_config.depths) for each in configs]
        if shapes[0] != shapes[1]:
            raise ConversionError(f"{converted} and {against} are models of different architectures")
        probes = Probes.of(FastVLMProcessor.from_folder(folder))
        reference = Reference.of(folder, probes, notify)
        notify("comparing answers")
        agreement = Agreement.of(load_model(converted, lazy=True), probes, reference)
        squares = weight_squares(converted, folder, notify)
        stages = tuple(_stages(converted, folder, probes, squares, allowed, notify))
    errors = {}
    for part in PARTS:
        own = [value for name, value in squares.items() if part_of(name) == part]
        change, norm = (sum(value[i] for value in own) for i in (0, 1))
        errors[part] = float(np.sqrt(change / norm)) if norm else 0.0
    return Verification(stages=stages, weight_errors=errors, agreement=agreement)


@contextmanager
def _reference(against: str | Path, notify: Notify) -> Iterator[Path]:
    path = parse_name(against).path
    if path and is_converted(path):
        yield path
        return
    with scratch_folder() as scratch:
        notify(f"converting {against}")
        convert_checkpoint(against, scratch / "reference", dtype="float32")
        yield scratch / "reference"


def weight_squares(converted: Path, reference: Path, notify: Notify) -> dict[str, Squares]:
    """For every parameter, the squared change from the reference and the reference's squared norm.

    Scaling for float16 is taken out; how the 7x7 of a ConvFFN and the linear after it share it is up to the converter.
    """
    mine, theirs = _Weights(converted), _Weights(reference)
    result: dict[str, Squares] = {}
    shared = 1.0
    for name in theirs.names:
        notify(f"comparing {name}")
        first, second = mine[name], theirs[name]
        norm = float(mx.square(second).sum())
        if name.endswith("conv_ffn.conv.weight"):
            ratio = float(mx.square(first).sum()) / norm if norm else 1.0
            shared = 2.0 ** round(np.log2(ratio) / 2) if 0 < ratio < np.inf else 1.0
            first = first / shared
        elif name.endswith("conv_ffn.fc1.weight"):
            first = first * shared
        result[name] = float(mx.square(first - second).sum()), norm
    return result


class _Weights:
    """The parameters of a converted checkpoint, dequantized and unscaled."""

    def __init__(self, folder: Path) -> None:
        self._config = ModelConfig.from_path(folder)
        self._stored = read_weights(folder)
        self._factors = factors(Scaling.of(self._config.vision_config.scales))
        self.names = sorted(
            (name for name in self._stored if name.rpartition(".")[2] not in _PACKED),
            key=lambda name: (name.replace("fc1", "conv1"), name),
        )

    def __getitem__(self, name: str) -> mx.array:
        layer = name.removesuffix(".weight")
        value = self._stored[name]
        if f"{layer}.scales" in self._stored and name.endswith(".weight"):
            settings = self._settings(layer).to_dict()
            # affine scales in float32, or the result would be rounded to their dtype
            companions = [self._stored[f"{layer}.{part}"] for part in _PACKED if f"{layer}.{part}" in self._stored]
            wide = [part.astype(mx.float32) if part.dtype != mx.uint8 else part for part in companions]
            value = mx.dequantize(value, wide[0], wide[1] if len(wide) > 1 else None, **settings)
        return mx.divide(value.astype(mx.float32), self._factors.get(name, 1.0))

    def _settings(self, layer: str) -> LayerQuantization:
        assert self._config.quantization is not None
        return self._config.quantization.for_layer(layer)

    def bits(self, stage: Stage) -> int | None:
        """The fewest bits of a layer of a stage; None if none is quantized."""
        layers = [name.removesuffix(".scales") for name in self._stored if name.endswith(".scales")]
        return min((self._settings(layer).bits or 0 for layer in layers if stage.holds(layer)), default=None)


def _stages(
    converted: Path,
    reference: Path,
    probes: Probes,
    squares: Mapping[str, Squares],
    allowed: float | None,
    notify: Notify,
) -> Iterator[StageDrift]:
    """Runs both models side by side in float32, every stage on the reference's input."""
    mine, theirs = (load_model(folder, dtype="float32", lazy=True) for folder in (converted, reference))
    weights = _Weights(converted), _Weights(reference)

    def drift(stage: Stage, error: float) -> StageDrift:
        own = {name: value for name, value in squares.items() if stage.holds(name)}
        relative = {name: float(np.sqrt(change / norm)) if norm else change for name, (change, norm) in own.items()}
        worst = max(relative, key=lambda name: relative[name], default="")
        bits = [each.bits(stage) for each in weights]
        fewest = min((each for each in bits if each is not None), default=None)
        return StageDrift(
            name=stage.name,
            output_error=error,
            weight_error=relative.get(worst, 0.0),
            worst=worst,
            allowed=tolerance(fewest) if allowed is None else allowed,
        )

    state = mx.array(probes.pixels[:1])
    for first, second in zip(_tower(mine), _tower(theirs), strict=True):
        notify(f"running {second.name}")
        error, state = _compare(first, second, state)
        yield drift(second, error)
    ids = probes.prompts[0]
    text = mx.array(ids[ids != IMAGE_TOKEN])
    error, embedded = _compare(embedding_stage(mine), embedding_stage(theirs), text)
    yield drift(Stage(EMBEDDING, embedding_stage(theirs).run), error)
    state = splice(ids, embedded, state)
    for first, second in zip(_decoder(mine), _decoder(theirs), strict=True):
        notify(f"running {second.name}")
        error, state = _compare(first, second, state)
        yield drift(second, error)


def _tower(model: FastVLM) -> list[Stage]:
    return [*tower_stages(model), projector_stage(model)]


def _decoder(model: FastVLM) -> list[Stage]:
    return [*decoder_stages(model), head_stage(model)]


def _compare(mine: Stage, theirs: Stage, state: mx.array) -> tuple[float, mx.array]:
    """The error of a stage relative to what the reference's adds to its input, and the reference's output."""
    first, second = mine.run(state).astype(mx.float32), theirs.run(state).astype(mx.float32)
    added = second - state if second.shape == state.shape and ".cpe" not in theirs.name else second
    norm = float(mx.linalg.norm(added))
    error = float(mx.linalg.norm(first - second))
    mx.eval(second)
    return error / norm if norm else error, second
