"""Time to first token, stage by stage and as a whole.

What is measured, and where the clock starts and stops:

- **wall TTFT**: encoded image bytes and a prompt -> the first token id on the host, model loaded. The user's wait in a
  program that stays alive. Measured on `stream_generate`, the function behind `fastvlm generate`; nothing is left out
  and nothing is added.
- **cold TTFT**: start of a `fastvlm generate` process -> the first character on its standard output.
- **paper TTFT**: pixel values -> logits after the visual tokens alone: vision tower, projector and the prefill of the
  N visual tokens, as arXiv 2412.13303 counts it. No image decoding, no text.
- **stages**: load, decode (bytes -> picture), preprocess (picture and prompt -> pixel values and token ids), vision,
  projector, prefill (all positions, to logits), first token (logits -> token id on the host). Each is closed by an
  evaluation, so their sum exceeds the wall TTFT: nothing overlaps any more.
- **decode rate**: generated tokens per second after the first one; end tokens do not end the answer.

Every run gets a picture of its own, so that nothing can be answered from a cache. Each sample is kept.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_mlx.backend import mx
from fastvlm_mlx.bench.candidate import Candidate, precision
from fastvlm_mlx.bench.conditions import peak_resident_bytes
from fastvlm_mlx.bench.images import Pictures
from fastvlm_mlx.bench.statistics import Statistics, Stopwatch
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.engine.prefix_cache import PrefixCache
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.generation.generate import stream_generate
from fastvlm_mlx.generation.result import GenerationResult
from fastvlm_mlx.inputs.images import Resolution, load_image
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.streams import turn

STAGES = ("load", "decode", "preprocess", "vision", "projector", "prefill", "first_token")

Progress = Callable[[int, int], None]
"""Called with the runs done and all of them, warm-up included."""


def time_stages(
    model: FastVLM, processor: FastVLMProcessor, image: bytes, prompt: str, resolution: Resolution
) -> dict[str, float]:
    """Seconds of every stage from `decode` on."""
    watch = Stopwatch()
    picture = watch.time("decode", lambda: load_image(image))
    inputs = watch.time("preprocess", lambda: processor(picture, prompt, resolution=resolution))
    features = watch.time("vision", lambda: model.vision_features(inputs["pixel_values"]))
    visual_tokens = watch.time("projector", lambda: model.project(features))
    logits = watch.time("prefill", lambda: model.prefill(inputs["input_ids"], visual_tokens=visual_tokens)[0])
    watch.time("first_token", lambda: np.asarray(mx.argmax(logits, axis=-1)))
    return watch.seconds


def time_paper(model: FastVLM, processor: FastVLMProcessor, image: bytes, resolution: Resolution) -> float:
    """The paper TTFT in seconds."""
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
    """The last piece of an answer of exactly `max_tokens`, with its timings and counts."""
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
    """The cold TTFT in seconds: what `fastvlm generate` takes as a new process until it has written a character.

    Files that were read before are still in the operating system's cache.

    Raises:
        CheckpointError: If the process fails.
    """
    arguments = ["generate", "-", "--model", str(folder), "--prompt", prompt, "--max-tokens", "8"]
    if resolution is not None:
        arguments += ["--resolution", str(resolution)]
    if dtype is not None:
        arguments += ["--dtype", dtype]
    with tempfile.TemporaryFile() as picture, tempfile.TemporaryFile() as errors:
        picture.write(image)
        picture.seek(0)
        start = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-c", "from fastvlm_mlx.cli import main; main()", *arguments],
            stdin=picture,
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
    pictures: Pictures,
    prompt: str,
    resolution: Resolution = None,
    runs: int = 10,
    warmup: int = 3,
    max_tokens: int = 32,
    cold: bool = False,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """One row of a report: `tokens`, `memory` in bytes, and `metrics`, each with its unit, statistics and samples.

    Args:
        candidate: The model to measure.
        pictures: What to show it.
        prompt: What to ask.
        resolution: As in `stream_generate`.
        runs: How often everything is measured.
        warmup: How often it is run before that.
        max_tokens: The length of each answer.
        cold: Whether to measure the cold TTFT too.
        progress: Told how far it is.
    """
    model, processor = candidate.model, candidate.processor
    samples: dict[str, list[float]] = {}
    if candidate.load_seconds is not None:
        samples["load"] = [candidate.load_seconds]
    mx.reset_peak_memory()
    for run in range(warmup + runs):
        progress(run, warmup + runs)
        staged, paper, whole = (pictures(3 * run + which) for which in range(3))
        taken = time_stages(model, processor, staged, prompt, resolution)
        taken["paper_ttft"] = time_paper(model, processor, paper, resolution)
        result = time_generate(model, processor, whole, prompt, resolution, max_tokens)
        taken["wall_ttft"] = result.timings.ttft
        if result.generated_tokens > 1:
            taken["decode_rate"] = result.tokens_per_second
        if run < warmup:
            continue
        if cold and candidate.folder:
            taken["cold_ttft"] = time_cold(candidate.folder, whole, prompt, resolution, candidate.dtype)
        for name, value in taken.items():
            samples.setdefault(name, []).append(value)
    visual = result.visual_tokens
    return {
        "model": candidate.name,
        "weights_sha256": candidate.sha256,
        "source": model.config.source,
        "hidden_size": model.config.text_config.hidden_size,
        "precision": precision(model),
        "resolution": "native" if resolution is None else resolution,
        "pixels": round(visual**0.5) * processor.patch_size,
        "tokens": {
            "visual": visual,
            "text": result.prompt_tokens - visual,
            "prompt": result.prompt_tokens,
            "generated": result.generated_tokens,
        },
        "memory": {
            "peak_bytes": mx.get_peak_memory(),
            "active_bytes": mx.get_active_memory(),
            "process_peak_bytes": peak_resident_bytes(),
        },
        "metrics": {
            name: {
                "unit": "tokens/s" if name == "decode_rate" else "s",
                **asdict(Statistics.of(values)),
                "samples": values,
            }
            for name, values in samples.items()
        },
    }
