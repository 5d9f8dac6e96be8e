"""Measures the time to first token, phase by phase and as a whole.

What is measured, and where the clock starts and stops:

- **wall TTFT**: encoded image bytes and a prompt -> the first token id on the host, model loaded. This is what a user
  of a program that stays alive waits for. It is measured on `stream_generate`, the function behind `fastvlm generate`;
  nothing is left out and nothing is added. As such a program does, the benchmark passes the same `PrefixCache` to all
  answers of a model; since every image is new, what they share is the system prompt.
- **cold TTFT**: start of a `fastvlm generate` process -> the first character on its standard output.
- **paper TTFT**: pixel values -> logits after the visual tokens alone: vision tower, projector and the prefill of the
  N visual tokens, as arXiv 2412.13303 counts it. No image decoding, no text.
- **phases**: load, decode (bytes -> image), preprocess (image and prompt -> pixel values and token ids), vision,
  projector, prefill (all positions, to logits), first token (logits -> token id on the host). Every phase ends with an
  evaluation, so nothing overlaps and their sum exceeds the wall TTFT.
- **decode rate**: generated tokens per second after the first one; end tokens do not end the answer.

Every run gets an image of its own, so that no answer can come from a cache. All samples are kept.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastvlm_mlx.backend import mx
from fastvlm_mlx.bench.candidate import Candidate, precision
from fastvlm_mlx.bench.conditions import peak_resident_bytes
from fastvlm_mlx.bench.images import Images
from fastvlm_mlx.bench.report import Memory, Row, Tokens
from fastvlm_mlx.bench.statistics import Metric, Stopwatch
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.engine.prefix_cache import PrefixCache
from fastvlm_mlx.engine.sampling import Sampler
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.generation.generate import stream_generate
from fastvlm_mlx.generation.result import GenerationResult
from fastvlm_mlx.inputs.images import load_image
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.inputs.resolution import Resolution
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.streams import turn

PHASES = ("load", "decode", "preprocess", "vision", "projector", "prefill", "first_token")

Progress = Callable[[int, int], None]
"""Called with the number of finished runs and of all runs, warm-up included."""


def time_phases(
    model: FastVLM, processor: FastVLMProcessor, image: bytes, prompt: str, resolution: Resolution
) -> dict[str, float]:
    """Returns the seconds of every phase from `decode` on."""
    watch = Stopwatch()
    decoded = watch.time("decode", lambda: load_image(image))
    inputs = watch.time("preprocess", lambda: processor(decoded, prompt, resolution=resolution))
    features = watch.time("vision", lambda: model.vision_features(inputs["pixel_values"]))
    visual_tokens = watch.time("projector", lambda: model.project(features))
    logits = watch.time("prefill", lambda: model.prefill(inputs["input_ids"], visual_tokens=visual_tokens)[0])
    sampler = Sampler(GenerationConfig(), [])

    def first_token() -> int:
        with turn():
            token = sampler(logits)
        return int(np.asarray(token)[0])

    watch.time("first_token", first_token)
    return watch.seconds


def time_paper(model: FastVLM, processor: FastVLMProcessor, image: bytes, resolution: Resolution) -> float:
    """Returns the paper TTFT in seconds."""
    pixel_values = processor.prepare_images([image], resolution)
    watch = Stopwatch()

    def run() -> mx.array:
        with turn():
            cache = model.language_model.make_cache()
            logits = model.language_model.prefill(model.encode_image(pixel_values), cache)
            mx.eval(logits, [layer.state for layer in cache])
        return logits

    watch.time("paper", run)
    return watch.seconds["paper"]


def time_generate(
    model: FastVLM,
    processor: FastVLMProcessor,
    image: bytes,
    prompt: str,
    resolution: Resolution,
    max_tokens: int,
    prefix_cache: PrefixCache | None = None,
) -> GenerationResult:
    """Returns the last piece of an answer of exactly `max_tokens`, with its timings and counts."""
    stream = stream_generate(
        model,
        processor,
        image=image,
        prompt=prompt,
        resolution=resolution,
        config=GenerationConfig(max_tokens=max_tokens, ignore_eos=True),
        prefix_cache=prefix_cache,
    )
    *_, last = stream
    return last


def time_cold(folder: Path, image: bytes, prompt: str, resolution: Resolution, dtype: str | None = None) -> float:
    """Returns the cold TTFT in seconds: from the start of `fastvlm generate` as a new process to its first character.

    Files that were read before are still in the operating system's cache.

    Raises:
        CheckpointError: If the process fails.
    """
    arguments = ["generate", "-", "--model", str(folder), "--prompt", prompt, "--max-tokens", "8"]
    if resolution is not None:
        arguments += ["--resolution", str(resolution)]
    if dtype is not None:
        arguments += ["--dtype", dtype]
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as errors:
        stdin.write(image)
        stdin.seek(0)
        start = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-c", "from fastvlm_mlx.cli import main; main()", *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            seconds = time.perf_counter() - start
            process.stdout.read()
        errors.seek(0)
        if process.returncode:
            raise CheckpointError(f"fastvlm generate failed: {errors.read().decode(errors='replace').strip()}")
    return seconds


def measure(
    candidate: Candidate,
    *,
    images: Images,
    prompt: str,
    resolution: Resolution = None,
    runs: int = 10,
    warmup: int = 3,
    max_tokens: int = 32,
    cold: bool = False,
    progress: Progress = lambda done, total: None,
) -> Row:
    """Measures a model at one resolution and returns a row of a report.

    Args:
        candidate: The model to measure.
        images: The images to show it.
        prompt: The question.
        resolution: As in `stream_generate`.
        runs: The number of measured runs.
        warmup: The number of runs before these.
        max_tokens: The length of each answer.
        cold: Whether to measure the cold TTFT, too.
        progress: Called before each run.
    """
    model, processor = candidate.model, candidate.processor
    samples: dict[str, list[float]] = {}
    if candidate.load_seconds is not None:
        samples["load"] = [candidate.load_seconds]
    mx.reset_peak_memory()
    for run in range(warmup + runs):
        progress(run, warmup + runs)
        first, second, third = (images(3 * run + offset) for offset in range(3))
        values = time_phases(model, processor, first, prompt, resolution)
        values["paper_ttft"] = time_paper(model, processor, second, resolution)
        result = time_generate(model, processor, third, prompt, resolution, max_tokens, candidate.prefix_cache)
        values["wall_ttft"] = result.timings.ttft
        if result.generated_tokens > 1:
            values["decode_rate"] = result.tokens_per_second
        if run < warmup:
            continue
        if cold and candidate.folder:
            values["cold_ttft"] = time_cold(candidate.folder, third, prompt, resolution, candidate.dtype)
        for name, value in values.items():
            samples.setdefault(name, []).append(value)
    visual = result.visual_tokens
    return Row(
        model=candidate.name,
        weights_sha256=candidate.sha256,
        source=model.config.source,
        hidden_size=model.config.text_config.hidden_size,
        precision=precision(model),
        resolution="native" if resolution is None else resolution,
        pixels=round(visual**0.5) * processor.patch_size,
        tokens=Tokens(
            visual=visual,
            text=result.prompt_tokens - visual,
            prompt=result.prompt_tokens,
            generated=result.generated_tokens,
        ),
        memory=Memory(
            peak_bytes=mx.get_peak_memory(),
            active_bytes=mx.get_active_memory(),
            process_peak_bytes=peak_resident_bytes(),
        ),
        megapixels=images.megapixels,
        form=images.form,
        metrics={
            name: Metric(unit="tokens/s" if name == "decode_rate" else "s", samples=tuple(values))
            for name, values in samples.items()
        },
    )
