"""Compares two checkpoints segment by segment and names the first one that drifts.

Each segment runs on the reference's input, so that its error is its own.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.backend import mx
from fastvlm_mlx.checkpoint.folder import is_converted
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.released import parse_name
from fastvlm_mlx.config import IMAGE_TOKEN, ModelConfig
from fastvlm_mlx.convert.compare.agreement import Agreement, Reference
from fastvlm_mlx.convert.compare.layerwise import Segment, segments
from fastvlm_mlx.convert.compare.probes import Probes
from fastvlm_mlx.convert.compare.weights import ConvertedWeights, WeightError, errors_by_part, weight_errors
from fastvlm_mlx.convert.conversion import convert_checkpoint
from fastvlm_mlx.convert.progress import Notify
from fastvlm_mlx.convert.scratch import scratch_folder
from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.inputs.processor import FastVLMProcessor

ROUNDING = 0.02
"""The tolerance for segments of unquantized checkpoints; float16 and bfloat16 stay well below it."""

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
        allowed: The tolerance for the weights; the output, behind several layers, may be off by twice that.
    """

    name: str
    output_error: float
    weight_error: float
    worst: str
    allowed: float

    @property
    def drifts(self) -> bool:
        """Whether it is further off than rounding explains; an error that is not a number is."""
        return not (self.output_error <= 2 * self.allowed and self.weight_error <= self.allowed)

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
    """

    segments: tuple[SegmentDrift, ...]
    weight_errors: Mapping[str, float]
    agreement: Agreement

    @property
    def first_drift(self) -> SegmentDrift | None:
        """The first segment that is further off than rounding explains."""
        return next((segment for segment in self.segments if segment.drifts), None)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        values = asdict(self)
        first = self.first_drift
        return {"stages": values.pop("segments"), **values, "first_drift": first and first.culprit}

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Rows of text for a table: segment, error of its output and of its weights, tolerance."""
        return [
            (segment.name, f"{segment.output_error:.2e}", f"{segment.weight_error:.2e}", f"{segment.allowed:.2g}")
            for segment in self.segments
        ]


def verify(
    converted: str | Path, against: str | Path, *, allowed: float | None = None, notify: Notify | None = None
) -> Verification:
    """Compares a converted checkpoint with another one, or with a fresh float32 conversion of a source.

    Args:
        converted: A folder in this project's format.
        against: The reference: such a folder, or any checkpoint that can be converted.
        allowed: The tolerance; by default it depends on the bits of each segment.
        notify: Called with a label of the current step.

    Raises:
        CheckpointError: If one of them is missing, damaged or of an unknown layout.
        ConversionError: If they are models of different architectures.
    """
    notify = notify or (lambda _: None)
    checked = Path(converted).expanduser()
    with _reference(against, notify) as folder:
        configs = ModelConfig.from_path(checked), ModelConfig.from_path(folder)
        shapes = [(each.text_config, each.vision_config.embed_dims, each.vision_config.depths) for each in configs]
        if shapes[0] != shapes[1]:
            raise ConversionError(f"{converted} and {against} are models of different architectures")
        probes = Probes.of(FastVLMProcessor.from_folder(folder))
        (reference,) = Reference.of(folder, [probes], notify)
        notify("comparing answers")
        agreement = Agreement.of(load_model(checked, lazy=True), probes, reference)
        weights = ConvertedWeights(checked), ConvertedWeights(folder)
        errors = weight_errors(*weights, notify)
        drifts = []
        for segment, error in _output_errors(checked, folder, probes, notify):
            bits = min((each for each in (pair.bits(segment) for pair in weights) if each is not None), default=None)
            limit = tolerance(bits) if allowed is None else allowed
            drifts.append(_drift(segment, error, errors, limit))
    return Verification(segments=tuple(drifts), weight_errors=errors_by_part(errors), agreement=agreement)


@contextmanager
def _reference(against: str | Path, notify: Notify) -> Iterator[Path]:
    """The folder of a converted checkpoint, or of a fresh conversion, which is removed at the end."""
    path = parse_name(against).path
    if path and is_converted(path):
        yield path
        return
    with scratch_folder() as scratch:
        notify(f"converting {against}")
        convert_checkpoint(against, scratch / "reference", dtype="float32")
        yield scratch / "reference"


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
