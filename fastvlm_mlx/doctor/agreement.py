"""Compares what the device computes with the CPU's float32, segment by segment and as a whole.

Every segment runs on the reference's input, so its error is its own and a fault is named where it is.

Shapes: B batch, R resolution, N visual tokens, L positions, D hidden size, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.backend import mx
from fastvlm_mlx.doctor.checks import FAILURES, Check
from fastvlm_mlx.doctor.forms import (
    Segment,
    cpu_segments,
    decoder_segments,
    device_segments,
    on_cpu,
    on_device,
    parameters,
    rounds_to_tf32,
)
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.model.fastvlm import FastVLM

PART = "agreement"
SIZE = (128, 192)
"""Height and width of the images that are compared: not a square, so that a confusion of the two shows."""

PROMPTS = ("What is in the picture?", "Describe the shapes from left to right.")
"""Of different lengths, so that a batch of them is padded."""

STEPS = 32
"""Tokens that are decoded."""

_ALLOWED = {
    "float32": (1e-4, "the rule of this project for float32, whatever the order in which sums are taken"),
    "tf32": (5e-3, "TF32 keeps 10 bits of each factor; MLX_ENABLE_TF32=0 turns it off"),
    "float16": (5e-2, "float16 rounds at 5e-4, dozens of layers follow one another, and a CPU sums in float16, too"),
}
_WHOLE = 8
"""Segments of vision in a row: the whole may be off by so many times as much as one of them."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the model is shown.

    Attributes:
        pixels: (2, H, W, 3) in [0, 1].
        prompts: Token ids of two prompts, each with one image.
    """

    pixels: npt.NDArray[np.float32]
    prompts: tuple[list[int], ...]

    @classmethod
    def of(cls, processor: FastVLMProcessor) -> "Probe":
        """Two gradients under grain, and two questions."""
        random = np.random.default_rng(0)
        height, width = SIZE
        ramps = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
        colours = random.uniform(0, 1, (2, 2, 3))
        images = np.stack([a * ramps[0] + b * ramps[1] for a, b in colours]) / 2
        pixels = np.clip(images + random.normal(0, 0.1, images.shape), 0, 1).astype(np.float32)
        return cls(pixels=pixels, prompts=tuple(processor.encode(prompt, n_images=1) for prompt in PROMPTS))


def allowed(precision: str) -> tuple[float, str]:
    """The largest relative error of a segment that is no fault, and why."""
    return _ALLOWED["tf32" if precision == "float32" and rounds_to_tf32() else precision]


def relative_error(value: Any, expected: npt.NDArray[Any]) -> float:
    """The largest difference in units of the largest expected value; infinite if `value` has a NaN or an infinity."""
    if value.shape != expected.shape:
        return float("inf")
    if not np.isfinite(value).all():
        return float("inf")
    return float(np.abs(value - expected).max() / max(float(np.abs(expected).max()), 1e-30))


def values(array: mx.array) -> npt.NDArray[np.float32]:
    """The values of an array on the host."""
    return np.array(array.astype(mx.float32))


def weights_are_finite(model: FastVLM) -> Iterator[Check]:
    """A check of each weight with a NaN or an infinity, or one check that there is none."""
    weights = parameters(model)
    finite = {name: mx.isfinite(weight).all() for name, weight in weights.items() if _is_floating(weight)}
    mx.eval(finite)
    wrong = [name for name, flag in finite.items() if not flag.item()]
    for name in wrong:
        reason = "this weight has a NaN or an infinity: convert the checkpoint again, or get it again"
        yield Check(part=PART, name=name, value="not finite", reason=reason, ok=False)
    if not wrong:
        yield Check(part=PART, name="weights", value=f"{len(weights)} tensors, all finite", ok=True)


def _is_floating(array: mx.array) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating))


def allowed_whole(precision: str) -> tuple[float, str]:
    """The largest relative error of all segments in a row that is no fault, and why."""
    return _WHOLE * allowed(precision)[0], f"{_WHOLE} segments in a row, each with an error of its own"


def _compared(
    name: str,
    precision: str,
    run: Callable[[], mx.array],
    expected: npt.NDArray[Any],
    limits: Callable[[str], tuple[float, str]] = allowed,
) -> Check:
    """The check of one result against the reference's."""
    limit, reason = limits(precision)
    if not np.isfinite(expected).all():
        return Check(
            part=PART,
            name=name,
            value="not finite",
            reason="the CPU itself computes a NaN or an infinity here: see the weights",
            ok=False,
            precision=precision,
        )
    try:
        with on_device():
            result = run()
            mx.eval(result)
        found = values(result)
    except FAILURES as err:
        return Check(part=PART, name=name, value="fails", reason=str(err), ok=False, precision=precision)
    if not np.isfinite(found).all():
        reason = f"a NaN or an infinity where the CPU has values up to {np.abs(expected).max():.3g}"
        return Check(part=PART, name=name, value="not finite", reason=reason, ok=False, precision=precision)
    return Check.below(PART, name, relative_error(found, expected), limit, reason, precision)


def compare_segments(
    candidate: FastVLM,
    reference: FastVLM,
    probe: Probe,
    *,
    segments: Mapping[str, Segment] | None = None,
    positions: int | None = None,
) -> Iterator[Check]:
    """Yields a check of every segment of the tower, of the projector, and of every block of the decoder and its head.

    Args:
        candidate: Runs on the device, in its dtype.
        reference: The same model in float32; runs on the CPU.
        probe: What both are shown; of each image only the first is used here.
        segments: The candidate's vision segments, if others than `device_segments`.
        positions: How many positions of the prompt the decoder gets; by default all.
    """
    precision = str(candidate.dtype).removeprefix("mlx.core.")
    x = mx.array(probe.pixels[:1])
    sides = (
        ({**(segments or device_segments(candidate))}, cpu_segments(reference)),
        (decoder_segments(candidate), decoder_segments(reference)),
    )
    for ours, theirs in sides:
        for name, run in ours.items():
            with on_cpu():
                output = theirs[name](x)
                mx.eval(output)
            expected = values(output)
            given = x.astype(candidate.dtype)
            yield _compared(name, precision, functools.partial(run, given), expected)
            x = mx.array(np.nan_to_num(expected, nan=0.0, posinf=0.0, neginf=0.0))
        if "mm_projector" in ours:
            with on_cpu():
                x = reference.embed(probe.prompts[0], visual_tokens=x)[:, :positions]
                mx.eval(x)


def compare_whole(candidate: FastVLM, reference: FastVLM, probe: Probe, steps: int = STEPS) -> Iterator[Check]:
    """Yields checks of the whole path: visual tokens, logits after the prompt, and those of `steps` greedy tokens.

    Both models follow the reference's tokens, so that one token that differs does not make all later ones differ.
    """
    precision = str(candidate.dtype).removeprefix("mlx.core.")
    pixels, prompt = mx.array(probe.pixels[:1]), probe.prompts[0]
    with on_cpu():
        visual = pixels
        for run in cpu_segments(reference).values():
            visual = run(visual)
        mx.eval(visual)
        expected, tokens = _follow(reference, prompt, visual, steps=steps)

    def ours() -> mx.array:
        x = pixels.astype(candidate.dtype)
        for run in device_segments(candidate).values():
            x = run(x)
        return x

    yield _compared("visual tokens", precision, ours, values(visual), allowed_whole)
    with on_device():
        mine = ours()
        mx.eval(mine)
        logits, _ = _follow(candidate, prompt, mine, tokens=tokens)
    yield _compared("logits after the prompt", precision, lambda: mx.array(logits[0]), expected[0], allowed_whole)
    yield _compared("logits while decoding", precision, lambda: mx.array(logits), expected, allowed_whole)
    yield _same_tokens(precision, logits, expected)


def _follow(
    model: FastVLM,
    prompt: Sequence[int],
    visual: mx.array,
    *,
    steps: int = 0,
    tokens: Sequence[int] = (),
) -> tuple[npt.NDArray[np.float32], list[int]]:
    """Logits (steps, V) of an answer and its tokens: the greedy ones, or those given."""
    step, cache = model.prefill(prompt, visual_tokens=visual)
    logits: list[npt.NDArray[np.float32]] = []
    followed: list[int] = []
    for number in range(steps or len(tokens)):
        mx.eval(step)
        logits.append(values(step[0]))
        followed.append(int(logits[-1].argmax()) if not tokens else tokens[number])
        if number < (steps or len(tokens)) - 1:
            step = model.language_model(mx.array([followed[-1:]]), cache)[:, -1]
    return np.stack(logits), followed


def _same_tokens(precision: str, logits: npt.NDArray[Any], expected: npt.NDArray[Any]) -> Check:
    """The check that both prefer the same tokens; where two are as good as equal, either is right."""
    limit = allowed_whole(precision)[0]
    mine, theirs = logits.argmax(axis=-1), expected.argmax(axis=-1)
    steps = np.arange(len(expected))
    margin = expected[steps, theirs] - expected[steps, mine]
    ties = (mine != theirs) & (margin <= 2 * limit * np.abs(expected).max())
    same, wrong = int((mine == theirs).sum()), int(((mine != theirs) & ~ties).sum())
    tied = f", {int(ties.sum())} more as good as tied" if ties.any() else ""
    return Check(
        part=PART,
        name="decoded tokens",
        value=f"{same} of {len(steps)} the same{tied}",
        reason="a token may differ only where the reference's two best are closer than twice the allowed error",
        ok=wrong == 0,
        precision=precision,
    )


def compare_compiled(candidate: FastVLM, probe: Probe) -> Iterator[Check]:
    """Yields the check that the compiled tower computes what the eager one does."""
    precision = str(candidate.dtype).removeprefix("mlx.core.")
    tower, pixels = candidate.vision_tower, mx.array(probe.pixels[:1]).astype(candidate.dtype)
    with on_device():
        eager = tower(pixels)
        mx.eval(eager)
    yield _compared("compiled tower against eager", precision, lambda: mx.compile(tower)(pixels), values(eager))


def compare_batched(candidate: FastVLM, probe: Probe, steps: int = 4) -> Iterator[Check]:
    """Yields checks that rows of a batch, padded on their left, get what each gets alone."""
    precision = str(candidate.dtype).removeprefix("mlx.core.")
    pixels = mx.array(probe.pixels).astype(candidate.dtype)

    def visual(images: mx.array) -> mx.array:
        for run in device_segments(candidate).values():
            images = run(images)
        return images

    with on_device():
        each = [visual(pixels[row : row + 1]) for row in range(len(pixels))]
        mx.eval(each)
        alone, answers = [], []
        for prompt, tokens in zip(probe.prompts, each, strict=True):
            logits, answer = _follow(candidate, prompt, tokens, steps=steps)
            alone.append(logits)
            answers.append(answer)
    yield _compared("batched images against single", precision, lambda: visual(pixels), values(mx.concatenate(each)))

    def batch() -> mx.array:
        longest = max(map(len, probe.prompts))
        ids = [[0] * (longest - len(prompt)) + prompt for prompt in probe.prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in probe.prompts]
        step, cache = candidate.prefill(ids, attention_mask=mask, visual_tokens=mx.concatenate(each))
        logits = [step]
        for number in range(steps - 1):
            tokens = mx.array([[answer[number]] for answer in answers])
            logits.append(candidate.language_model(tokens, cache)[:, -1])
        return mx.stack(logits, axis=1)

    yield _compared("batched rows against single", precision, batch, np.stack(alone))
