"""The steps of an examination, in order."""

from collections.abc import Callable, Iterable, Iterator

from fastvlm_mlx.backend import device
from fastvlm_mlx.bench.candidate import precision
from fastvlm_mlx.doctor.agreement import (
    STEPS,
    compare_batched,
    compare_compiled,
    compare_segments,
    compare_whole,
    weights_are_finite,
)
from fastvlm_mlx.doctor.answers import demo_answers, shipped_questions
from fastvlm_mlx.doctor.checks import FAILURES, Check, Step
from fastvlm_mlx.doctor.environment import PART as ENVIRONMENT
from fastvlm_mlx.doctor.environment import environment
from fastvlm_mlx.doctor.forms import parameters
from fastvlm_mlx.doctor.primitives import padded_masks, quantized_products, rotary_positions
from fastvlm_mlx.doctor.speed import cold_start, find_chip, segment_speed, staged, throughput
from fastvlm_mlx.doctor.subject import Subject
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.machine import describe

_CPU_HALF_STEPS = 4
"""Tokens decoded in float16 on a CPU, which has no fast arithmetic for it."""

_CPU_HALF_WEIGHTS = 50_000_000
"""Up to so many weights a CPU runs the whole model in float16; a larger one takes minutes."""

_CPU_HALF_POSITIONS = 8
"""Positions that a larger one's decoder gets in float16 on a CPU."""


def examination_steps(subject: Subject, demo: Subject) -> list[Step]:
    """All steps for a model; `demo` is the demo model, and may be the same one."""
    half_steps = STEPS if device() == "gpu" else _CPU_HALF_STEPS

    def is_slow_in_half() -> bool:
        weights = sum(weight.size for weight in parameters(subject.candidate.model).values())
        return device() == "cpu" and weights > _CPU_HALF_WEIGHTS

    def segments_in_half() -> Iterator[Check]:
        positions = _CPU_HALF_POSITIONS if is_slow_in_half() else None
        return compare_segments(subject.float16, subject.reference, subject.probe, positions=positions)

    def whole_in_half(run: Callable[[], Iterable[Check]]) -> Callable[[], Iterator[Check]]:
        def checked() -> Iterator[Check]:
            if is_slow_in_half():
                raise ConfigError("a CPU takes minutes for this in float16; the segments above ran in it")
            yield from run()

        return checked

    def answers() -> Iterator[Check]:
        candidate = demo.candidate
        return demo_answers(candidate.model, candidate.processor, shipped_questions(), lambda: demo.reference)

    def load() -> Iterator[Check]:
        try:
            candidate = subject.candidate
        except FAILURES as err:
            yield Check(part=ENVIRONMENT, name="the model", value="does not load", reason=str(err), ok=False)
            return
        precisions = " / ".join(dict.fromkeys(precision(candidate.model).values()))
        yield Check(part=ENVIRONMENT, name="the model", value=f"loads, {precisions}", ok=True)

    def primitives() -> Iterator[Check]:
        yield from rotary_positions(subject.candidate.model)
        yield from padded_masks(subject.candidate.model)
        yield from quantized_products(subject.float32)
        yield from quantized_products(subject.float16)

    def weights() -> Iterable[Check]:
        return weights_are_finite(subject.candidate.model)

    return [
        Step(name="environment", run=environment),
        Step(name="loading the model", run=load),
        Step(name="questions to the demo model", run=answers),
        Step(name="weights", run=weights),
        Step(name="rotary positions, masks and quantized products", run=primitives),
        Step(
            name="segments in float32",
            run=lambda: compare_segments(subject.float32, subject.reference, subject.probe),
        ),
        Step(
            name="the whole model in float32",
            run=lambda: compare_whole(subject.float32, subject.reference, subject.probe),
        ),
        Step(name="the compiled tower in float32", run=lambda: compare_compiled(subject.float32, subject.probe)),
        Step(name="batches in float32", run=lambda: compare_batched(subject.float32, subject.probe)),
        Step(name="segments in float16", run=segments_in_half),
        Step(
            name="the whole model in float16",
            run=whole_in_half(lambda: compare_whole(subject.float16, subject.reference, subject.probe, half_steps)),
        ),
        Step(
            name="the compiled tower in float16",
            run=whole_in_half(lambda: compare_compiled(subject.float16, subject.probe)),
        ),
        Step(
            name="batches in float16",
            run=whole_in_half(lambda: compare_batched(subject.float16, subject.probe, half_steps // 4)),
        ),
        Step(name="time to first token", run=lambda: staged(subject.candidate, find_chip(describe().chip))),
        Step(name="speed of the segments", run=lambda: segment_speed(subject.candidate.model)),
        Step(name="throughput of batches", run=lambda: throughput(subject.candidate)),
        Step(name="cold start", run=lambda: cold_start(subject.candidate)),
    ]
