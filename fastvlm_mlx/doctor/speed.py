"""Measures how fast the model is here, and how far that is from what the chip allows."""

import statistics
import time
from collections.abc import Iterator, Mapping

import numpy as np

from fastvlm_mlx.backend import device, mx
from fastvlm_mlx.bench.candidate import Candidate
from fastvlm_mlx.bench.costs import Chip, chips, costs
from fastvlm_mlx.bench.graph import kernels
from fastvlm_mlx.bench.images import Images
from fastvlm_mlx.bench.measure import PHASES, measure, time_cold
from fastvlm_mlx.bench.report import Row
from fastvlm_mlx.checkpoint.folder import read_weights
from fastvlm_mlx.doctor.checks import Check
from fastvlm_mlx.doctor.forms import Segment, cpu_segments, device_segments
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.streams import turn

PART = "speed"
PROMPT = "Describe the image."
ROWS = (1, 4, 8)
"""Sizes of the batches whose throughput is measured."""

CPU_SIDE = 256
"""Pixels per side at which a CPU is measured: at 1024 a large model takes minutes."""

SLOW = 10.0
"""How many times as long as the others, for its arithmetic and traffic, a segment may take."""
_SLOW_REASON = "on a CPU segments took 0.2 to 1.9 times the median's; far more is a kernel on a slow path"
_SLOW_SHARE = 0.25
"""A segment that takes less than this of the whole is never called slow: launches and noise dominate it."""

_LAUNCH = 5e-6
"""Seconds that launching a kernel takes, roughly."""

_PARTS = {"vision": "vision tower", "projector": "projector", "prefill": "prefill"}
"""The phases of a measurement that have a cost, and its name."""


def side(model: FastVLM) -> int:
    """Pixels per side that the model is measured at on this device."""
    own = model.config.vision_config.image_size
    return own if device() == "gpu" else min(own, CPU_SIDE)


def find_chip(name: str) -> Chip | None:
    """The chip of this name in `chips.json`; None if it is not there."""
    return next((chip for chip in chips()[0] if chip.name == name.removeprefix("Apple ")), None)


def staged(candidate: Candidate, chip: Chip | None, runs: int = 2) -> Iterator[Check]:
    """Yields the time to first token by phase and the rate of decoding, beside the least time on `chip`."""
    row = measure(
        candidate,
        images=Images(),
        prompt=PROMPT,
        resolution=side(candidate.model),
        runs=runs,
        warmup=1,
        max_tokens=16,
    )
    least = _least(candidate, row, chip) if chip else {}
    for name, label in (("wall_ttft", f"first token at {row.pixels} px"), *((phase, phase) for phase in PHASES)):
        seconds = row.median(name)
        if seconds is not None and name != "load":
            yield _timed(label.replace("_", " "), seconds, least.get(name), chip)
    rate = row.median("decode_rate")
    if rate is not None:
        yield _timed("one token", 1 / rate, least.get("decode_rate"), chip)


def _timed(name: str, seconds: float, least: float | None, chip: Chip | None) -> Check:
    beside = f"{seconds / least:.1f} times the least time of an {chip.name}" if least and chip else ""
    return Check(part=PART, name=name, value=readable_seconds(seconds), reason=beside)


def _least(candidate: Candidate, row: Row, chip: Chip) -> dict[str, float]:
    """The least seconds of each metric that has a cost."""
    names = read_weights(candidate.folder) if candidate.folder else ()
    parts = {cost.part: cost.roofline(chip) for cost in costs(candidate.model.config, [row.pixels], names)}
    least = {phase: parts[part] for phase, part in _PARTS.items()}
    return {**least, "wall_ttft": sum(least.values()), "decode_rate": parts["decode step"]}


def readable_seconds(seconds: float) -> str:
    """Seconds with three digits: `12.3 ms`, `1.04 s`."""
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def prepared_segments(model: FastVLM) -> dict[str, Segment]:
    """The tower's segments and the projector in the form that runs on this device."""
    if device() == "cpu" and model.dtype == mx.float32:
        return cpu_segments(model)
    return {name: mx.compile(run) for name, run in device_segments(model).items()}


def segment_speed(model: FastVLM, segments: Mapping[str, Segment] | None = None, runs: int = 3) -> Iterator[Check]:
    """Yields a check of every segment of the tower and of the projector: that none is slow for its size.

    Args:
        model: Prepared for the device.
        segments: As they run; by default `prepared_segments`.
        runs: The fastest of so many counts, after one that does not.
    """
    plain = device_segments(model)
    shape = (1, side(model), side(model), 3)
    x = mx.array(np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)).astype(model.dtype)
    seconds, least = {}, {}
    for name, run in (segments or prepared_segments(model)).items():
        least[name] = sum(
            max(kernel.flops / 2.6e12, kernel.bytes / 68e9) + _LAUNCH for kernel in kernels(plain[name], x)
        )
        seconds[name], x = _fastest(run, x, runs)
    yield from slow_segments(seconds, least)


def _fastest(run: Segment, x: mx.array, runs: int) -> tuple[float, mx.array]:
    """The least seconds of `run`, and its result."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        with turn():
            y = run(x)
            mx.eval(y)
        times.append(time.perf_counter() - start)
    return min(times[1:]), y


def slow_segments(seconds: Mapping[str, float], least: Mapping[str, float]) -> Iterator[Check]:
    """Yields a check of every segment: its time per arithmetic and traffic, in units of the median segment's.

    Args:
        seconds: That each segment took.
        least: That each would take at the peaks of one chip, whichever.
    """
    ratios = {name: seconds[name] / least[name] for name in seconds}
    median, whole = statistics.median(ratios.values()), sum(seconds.values())
    for name, ratio in ratios.items():
        share = seconds[name] / whole
        ok = ratio / median <= SLOW or share < _SLOW_SHARE
        yield Check(
            part=PART,
            name=name,
            value=f"{readable_seconds(seconds[name])}, {share:.0%} of the tower",
            limit=SLOW,
            reason=f"{ratio / median:.2g} times the median segment's time for its size; {_SLOW_REASON}",
            ok=ok,
        )


def throughput(candidate: Candidate, tokens: int = 9, repeats: int = 2) -> Iterator[Check]:
    """Yields the tokens per second of batches of equal prompts, and that a batch of 8 is no slower than single rows.

    Args:
        candidate: The model as a user runs it.
        tokens: Length of an answer; the time of the prompt and the first token is left out.
        repeats: The fastest of so many counts.
    """
    model, processor = candidate.model, candidate.processor
    pixels = np.zeros((1, min(side(model), 128), min(side(model), 128), 3), np.uint8)
    ids = processor.encode(PROMPT, n_images=1)
    rates = {}
    for rows in ROWS:

        def decode(length: int, rows: int = rows) -> float:
            start = time.perf_counter()
            model.generate([ids] * rows, np.repeat(pixels, rows, axis=0), max_tokens=length, ignore_eos=True)
            return time.perf_counter() - start

        decode(2)
        longer, shorter = (min(decode(length) for _ in range(repeats)) for length in (tokens, 1))
        rates[rows] = rows * (tokens - 1) / max(longer - shorter, 1e-9)
        slower = rows == ROWS[-1] and rates[rows] < 0.8 * rates[1]
        yield Check(
            part=PART,
            name=f"{rows} row{'s' if rows > 1 else ''} at a time",
            value=f"{rates[rows]:.3g} tokens/s",
            reason="a batch must not be slower than its rows one after another" if slower else "",
            ok=None if rows < ROWS[-1] else not slower,
        )


def cold_start(candidate: Candidate) -> Iterator[Check]:
    """Yields the seconds from the start of a `fastvlm generate` process to the first character of its answer.

    Raises:
        ConfigError: If the model is not on disk.
    """
    if candidate.folder is None:
        raise ConfigError("a cold start needs a model on disk, not random weights")
    seconds = time_cold(candidate.folder, Images()(0), PROMPT, side(candidate.model), candidate.dtype)
    yield Check(part=PART, name="start of the program to the first character", value=readable_seconds(seconds))
