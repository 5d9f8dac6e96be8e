"""Compares two checkpoints segment by segment, names the first one that drifts, and compares their answers.

Each segment runs on the reference's input, so that its error is its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_mlx.arguments import as_real, check_callable, items
from fastvlm_mlx.backend import mx
from fastvlm_mlx.checkpoint.folder import is_converted
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.released import parse_name
from fastvlm_mlx.config import IMAGE_TOKEN, ModelConfig
from fastvlm_mlx.convert.compare.agreement import Agreement, Reference
from fastvlm_mlx.convert.compare.gates import AGREEMENT_METRICS, Gate
from fastvlm_mlx.convert.compare.layerwise import Segment, segments
from fastvlm_mlx.convert.compare.probes import Probes
from fastvlm_mlx.convert.compare.weights import ConvertedWeights, WeightError, errors_by_part, weight_errors
from fastvlm_mlx.convert.conversion import convert_checkpoint
from fastvlm_mlx.convert.progress import Notify
from fastvlm_mlx.convert.scratch import scratch_folder
from fastvlm_mlx.convert.source.hub import check
from fastvlm_mlx.errors import ConfigError, ConversionError
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.schema import shown
from fastvlm_mlx.streams import own_stream

ROUNDING = 0.02
"""The tolerance for segments of unquantized checkpoints; float16 and bfloat16 stay well below it."""

CLOSE = ("top1>=0.9", "visual_cosine>=0.99")
"""What is expected of the answers of checkpoints without layers of less than 8 bits."""

SIMILAR = ("top1>=0.5", "visual_cosine>=0.9")
"""What is expected with fewer bits; less is not the same model any more."""

GATE_METRICS = (*AGREEMENT_METRICS, "weight_error")
"""The metrics of a `Verification`."""

_STEPS = 6.0
_WIDEST = 0.9


def tolerance(bits: int | None) -> float:
    """The tolerance for the weights of a segment with `bits` bits, relative to their norm.

    Rounding normal weights in groups of 64 to b bits changes them by about 1.4 / (2ᵇ − 1) of their norm; this allows
    for four times that. A layer with wrong scales is off by about its own size.
    """
    return ROUNDING if bits is None else max(ROUNDING, min(_WIDEST, _STEPS / (2**bits - 1)))


@dataclass(frozen=True, kw_only=True)
class SegmentDrift:
    """The error of one segment of a checkpoint.

    Attributes:
        name: Its path.
        output_error: Norm of the difference of the outputs for the reference's input, relative to what the reference's
            segment adds to its input.
        weight_error: The largest relative change of one of its tensors.
        worst: The tensor with that change.
        allowed: The tolerance for the weights.
    """

    name: str
    output_error: float
    weight_error: float
    worst: str
    allowed: float

    @property
    def output_allowed(self) -> float:
        """The tolerance for the output: twice that for the weights, as several layers contribute."""
        return 2 * self.allowed

    @property
    def drifts(self) -> bool:
        """Whether it is further off than rounding explains; an error that is not a number is."""
        return not (self.output_error <= self.output_allowed and self.weight_error <= self.allowed)

    @property
    def culprit(self) -> str:
        """The layer that drifts, or the segment if no tensor explains it."""
        return self.worst.rpartition(".")[0] if not self.weight_error <= self.allowed else self.name


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The difference between a checkpoint and a reference.

    Attributes:
        segments: In the order of the forward pass.
        weight_errors: Relative errors by part of the model.
        agreement: On the next tokens.
        gates: Conditions on the agreement.
    """

    segments: tuple[SegmentDrift, ...]
    weight_errors: Mapping[str, float]
    agreement: Agreement
    gates: tuple[Gate, ...]

    @property
    def first_drift(self) -> SegmentDrift | None:
        """The first segment that is further off than rounding explains."""
        return next((segment for segment in self.segments if segment.drifts), None)

    @property
    def unmet(self) -> list[Gate]:
        """The conditions that are not met."""
        return [gate for gate in self.gates if not gate.holds(self)]

    @property
    def holds(self) -> bool:
        """Whether no segment drifts and all conditions are met."""
        return self.first_drift is None and not self.unmet

    @property
    def weight_error(self) -> float:
        """The largest of the parts' errors."""
        return max(self.weight_errors.values())

    def metric(self, name: str) -> float:
        """The value of one of `GATE_METRICS`."""
        return self.weight_error if name == "weight_error" else self.agreement.metric(name)

    def interval(self, name: str) -> tuple[float, float] | None:
        """The 95 % interval of a metric; None for one that is exact."""
        interval: tuple[float, float] | None = self.agreement.interval(name)
        return interval

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        first = self.first_drift
        return {
            "stages": [asdict(segment) for segment in self.segments],
            "weight_errors": dict(self.weight_errors),
            "agreement": asdict(self.agreement),
            "first_drift": first and first.culprit,
            "gates": {str(gate): gate.holds(self) for gate in self.gates},
            "holds": self.holds,
        }

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Rows of text for a table: segment, error of its output and its tolerance, the same of its weights."""
        return [
            (
                segment.name,
                f"{segment.output_error:.2e}",
                f"{segment.output_allowed:.2g}",
                f"{segment.weight_error:.2e}",
                f"{segment.allowed:.2g}",
            )
            for segment in self.segments
        ]


@own_stream()
def verify(
    converted: str | Path,
    against: str | Path,
    *,
    allowed: float | None = None,
    gates: Sequence[str] = (),
    notify: Notify | None = None,
) -> Verification:
    """Compares a checkpoint with another one; what is in another format is converted in float32 first.

    Args:
        converted: The checkpoint: anything that can be converted, such as a folder in this project's format.
        against: The reference, likewise.
        allowed: The tolerance for weights; by default it depends on the bits of each segment.
        gates: Conditions on the agreement, such as `top1>=0.95`; by default `CLOSE` or `SIMILAR`.
        notify: Called with a label of the current step.

    Raises:
        CheckpointError: If one of them is missing, incomplete, damaged or of an unknown layout.
        ConversionError: If their architectures or tokenizers differ, or a gate cannot be read.
    """
    check_callable(notify, "notify")
    notify = notify or (lambda _: None)
    if allowed is not None and not as_real(allowed) >= 0.0:
        raise ConfigError(f"allowed must be at least 0, not {shown(allowed)}")
    conditions = [Gate.parse(text, GATE_METRICS) for text in items(gates, "gates", "a list of texts")]
    for location in (parse_name(converted), parse_name(against)):  # a mistake in one costs no download of the other
        if location.path is None:
            check(location.name, None)
    with _converted(converted, notify) as checked, _converted(against, notify) as folder:
        configs = ModelConfig.from_path(checked), ModelConfig.from_path(folder)
        shapes = [(each.text_config, each.vision_config.embed_dims, each.vision_config.depths) for each in configs]
        if shapes[0] != shapes[1]:
            raise ConversionError(f"{converted} and {against} are models of different architectures")
        probes = Probes.of(FastVLMProcessor.from_folder(folder))
        prompts = Probes.of(FastVLMProcessor.from_folder(checked)).prompts
        if not all(map(np.array_equal, prompts, probes.prompts)):
            raise ConversionError(
                f"{converted} and {against} have different tokenizers: they encode a prompt differently"
            )
        (reference,) = Reference.of(folder, [probes], notify)
        notify("comparing answers")
        agreement = Agreement.of(load_model(checked, lazy=True), probes, reference)
        weights = ConvertedWeights(checked), ConvertedWeights(folder)
        errors = weight_errors(*weights, notify)
        drifts = []
        least_bits = None
        for segment, error in _output_errors(checked, folder, probes, notify):
            bits = min((each for each in (pair.bits(segment) for pair in weights) if each is not None), default=None)
            least_bits = min((each for each in (least_bits, bits) if each is not None), default=None)
            limit = tolerance(bits) if allowed is None else allowed
            drifts.append(_drift(segment, error, errors, limit))
    expected = CLOSE if least_bits is None or least_bits >= 8 else SIMILAR
    return Verification(
        segments=tuple(drifts),
        weight_errors=errors_by_part(errors),
        agreement=agreement,
        gates=tuple(conditions or map(Gate.parse, expected)),
    )


@contextmanager
def _converted(name: str | Path, notify: Notify) -> Iterator[Path]:
    """The folder of a converted checkpoint, or of a fresh conversion, which is removed at the end."""
    path = parse_name(name).path
    if path and is_converted(path):
        yield path
        return
    with scratch_folder() as scratch:
        notify(f"converting {name}")
        convert_checkpoint(name, scratch / "converted", dtype="float32", notify=notify)
        yield scratch / "converted"


def _drift(segment: Segment, output_error: float, errors: Mapping[str, WeightError], allowed: float) -> SegmentDrift:
    """The drift of a segment with the errors of its parameters among all `errors`."""
    relative = {
        name: error.relative if error.norm else error.change for name, error in errors.items() if segment.holds(name)
    }
    worst = max(relative, key=lambda name: relative[name], default="")
    return SegmentDrift(
        name=segment.name,
        output_error=output_error,
        weight_error=relative.get(worst, 0.0),
        worst=worst,
        allowed=allowed,
    )


def _output_errors(converted: Path, reference: Path, probes: Probes, notify: Notify) -> Iterator[tuple[Segment, float]]:
    """The segments of the reference in the order of the forward pass, each with the error of the other's output.

    Both models run side by side in float32.
    """
    models = [load_model(folder, dtype="float32", lazy=True) for folder in (converted, reference)]
    mine, theirs = map(segments, models)
    state = mx.array(probes.pixels[:1])
    for first, second in zip(mine.vision, theirs.vision, strict=True):
        notify(f"running {second.name}")
        error, state = _compare(first, second, state)
        yield second, error
    ids = probes.prompts[0]
    error, _ = _compare(mine.embedding, theirs.embedding, mx.array(ids[ids != IMAGE_TOKEN]))
    yield theirs.embedding, error
    state = models[1].embed(ids, visual_tokens=state)
    for first, second in zip(mine.decoder, theirs.decoder, strict=True):
        notify(f"running {second.name}")
        error, state = _compare(first, second, state)
        yield second, error


def _compare(mine: Segment, theirs: Segment, state: mx.array) -> tuple[float, mx.array]:
    """The error of a segment relative to what the reference's adds to its input, and the reference's output."""
    first, second = mine.run(state).astype(mx.float32), theirs.run(state).astype(mx.float32)
    added = second - state if second.shape == state.shape and ".cpe" not in theirs.name else second
    norm = float(mx.linalg.norm(added))
    error = float(mx.linalg.norm(first - second))
    mx.eval(second)
    return error / norm if norm else error, second
