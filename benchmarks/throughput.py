"""Measures how many tokens and pictures a second an engine gives, by the number of rows that it decodes at once.

Everything happens in one warm process; the measurements take turns, so that a busy moment of the machine hits all.

- **decoding**: tokens per second of so many rows together, after their prompts.
- **captioning**: pictures per second of `Engine.map`, each picture new, from the file to its last token, beside
  `generate` for one at a time.

Answers have a fixed length, as end tokens are ignored. mlx-vlm's `batch_generate` is measured beside it, with prompts
of one length since it ends in an error for others, if an environment and a model for it are named:

    python benchmarks/throughput.py                        # 0.5b, random weights; about 10 minutes on two cores
    python benchmarks/throughput.py --model 0.5b --resolution 512 --record
    python benchmarks/throughput.py --mlx-vlm ENV/bin/python MODEL
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from peers import where
from recording import write_report, write_tables

from fastvlm_mlx import Engine, GenerationConfig, Request, generate
from fastvlm_mlx.bench.candidate import Candidate
from fastvlm_mlx.bench.conditions import Conditions, conditions
from fastvlm_mlx.bench.images import Images
from fastvlm_mlx.engine.row import Row
from fastvlm_mlx.engine.scheduler import Scheduler
from fastvlm_mlx.formatting import as_markdown

HERE = Path(__file__).resolve().parent
PROMPT = "Describe the image."
STEPS = 16
"""Decoding steps that are timed."""

Samples = dict[str, list[float]]
"""By the number of rows, as text, since JSON has no other keys."""


def decoding(candidate: Candidate, rows: int, resolution: int) -> float:
    """Returns tokens per second of so many rows together."""
    rng = np.random.default_rng(0)
    scheduler = Scheduler(candidate.model, max_rows=rows)
    prompts = [candidate.processor.encode(PROMPT + " Why?" * (number % 3), 1) for number in range(rows)]
    scheduler.add(
        Row(
            prompt,
            rng.integers(0, 256, (1, resolution, resolution, 3), np.uint8),
            GenerationConfig(ignore_eos=True),
            max_tokens=STEPS + 2,
        )
        for prompt in prompts
    )
    scheduler.step()
    scheduler.step()
    start = time.perf_counter()
    tokens = 0
    while scheduler.is_busy:
        tokens += len(scheduler.step())
    return tokens / (time.perf_counter() - start)


class Captioning:
    """Captions pictures that no earlier measurement has shown.

    Args:
        candidate: The model.
        resolution: In pixels.
        max_tokens: Length of each caption.
    """

    def __init__(self, candidate: Candidate, resolution: int, max_tokens: int) -> None:
        self._candidate = candidate
        self._resolution = resolution
        self._config = GenerationConfig(max_tokens=max_tokens, ignore_eos=True)
        self._images = Images()
        self._shown = 0

    def _pictures(self, count: int) -> list[bytes]:
        self._shown += count
        return [self._images(number) for number in range(self._shown - count, self._shown)]

    def alone(self, count: int) -> float:
        """Returns pictures per second, one after the other."""
        pictures = self._pictures(count)
        start = time.perf_counter()
        for picture in pictures:
            generate(
                self._candidate.model,
                self._candidate.processor,
                image=picture,
                prompt=PROMPT,
                resolution=self._resolution,
                config=self._config,
            )
        return count / (time.perf_counter() - start)

    def together(self, engine: Engine, count: int) -> float:
        """Returns pictures per second of an engine."""
        requests = [
            Request(image=picture, prompt=PROMPT, resolution=self._resolution, config=self._config)
            for picture in self._pictures(count)
        ]
        start = time.perf_counter()
        for handle in engine.map(requests):
            handle.result()
        return count / (time.perf_counter() - start)


def peer(options: argparse.Namespace) -> float:
    """Returns pictures per second of mlx-vlm, in a process of its own, as many at a time as pictures it gets.

    Raises:
        SystemExit: If it fails, or an answer of it is shorter.
    """
    python, model = options.mlx_vlm
    images = Images()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{number}.jpg") for number in range(options.peer_pictures)]
        for number, file in enumerate(files):
            file.write_bytes(images(number))
        settings = {"resolution": options.resolution, "max_tokens": options.max_tokens, "batch": len(files)}
        request = {"model": model, "images": [str(file) for file in files], "prompt": PROMPT, **settings}
        preload = {"LD_PRELOAD": "libopenblas.so.0"} if sys.platform == "linux" else {}
        done = subprocess.run(
            [python, HERE / "peer_batch.py", json.dumps(request)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", **preload},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"error: mlx-vlm failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    if result["tokens"] < 0.98 * len(files) * options.max_tokens:  # it does not count the last token of an answer
        raise SystemExit(f"error: mlx-vlm gave {result['tokens']} tokens, not {len(files) * options.max_tokens}")
    return len(files) / float(result["seconds"])


def measure(candidate: Candidate, options: argparse.Namespace) -> tuple[Samples, Samples, list[float]]:
    """Returns the samples of decoding and of captioning, and those of mlx-vlm's captioning."""
    captioning = Captioning(candidate, options.resolution, options.max_tokens)
    captioning.alone(1)
    decoded: Samples = {}
    captioned: Samples = {}
    peers: list[float] = []
    for run in range(options.runs):
        for rows in options.rows:
            rate = decoding(candidate, rows, options.resolution)
            decoded.setdefault(str(rows), []).append(rate)
            print(f"run {run + 1}/{options.runs}: {rows} rows decode {rate:.1f} tokens/s", flush=True)
        for batch in options.batches:
            if batch == 1:
                rate = captioning.alone(options.alone)
            else:
                with Engine(candidate.model, candidate.processor, max_batch=batch) as engine:
                    rate = captioning.together(engine, options.pictures)
            captioned.setdefault(str(batch), []).append(rate)
            print(f"run {run + 1}/{options.runs}: {batch} at a time caption {rate:.3f} pictures/s", flush=True)
        if options.mlx_vlm:
            peers.append(peer(options))
            print(f"run {run + 1}/{options.runs}: mlx-vlm captions {peers[-1]:.3f} pictures/s", flush=True)
    return decoded, captioned, peers


def report(
    candidate: Candidate, options: argparse.Namespace, before: Conditions, samples: tuple[Samples, Samples, list[float]]
) -> dict[str, Any]:
    """Returns the JSON object with every sample."""
    names = ("resolution", "max_tokens", "pictures", "alone", "peer_pictures", "runs")
    return {
        "conditions": before.to_dict(),
        "model": candidate.name,
        "dtype": str(candidate.model.dtype).rpartition(".")[2],
        "settings": {name: getattr(options, name) for name in names},
        "decoding": samples[0],
        "captioning": samples[1],
        "mlx_vlm": samples[2],
    }


def table(values: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of the Markdown table of a report, and its caption."""
    header, rows = ["rows at once"], [["decoding, tokens/s"], ["captioning, pictures/s"]]
    parts = [values["decoding"], values["captioning"]]
    counts = sorted({int(count) for part in parts for count in part})
    for count in map(str, counts):
        header.append(count)
        for row, part, digits in zip(rows, parts, (1, 2), strict=True):
            if count not in part:
                row.append("")
                continue
            rate, alone = median(part[count]), median(part["1"])
            row.append(f"{rate:.{digits}f}" + ("" if count == "1" else f" ({rate / alone:.1f}×)"))
    yield as_markdown([header, *rows])
    settings = values["settings"]
    machine = Conditions.from_dict(values["conditions"]).machine
    peers = values.get("mlx_vlm", [])
    count = settings.get("peer_pictures")
    ours = median(values["captioning"].get(str(count), [0.0]))
    beside = ""
    if peers:
        beside = f" mlx-vlm's `batch_generate` captions {median(peers):.3f} pictures/s with {count} at once"
        beside += f", a factor of {ours / median(peers):.1f}." if ours else "."
    yield ""
    yield (
        f"{values['model']}, {values['dtype']}, {settings['resolution']} px, captions of {settings['max_tokens']} "
        f"tokens; {settings['pictures']} pictures, or {settings['alone']} one at a time; medians of {settings['runs']} "
        f"runs that took turns in one process. Measured {where(machine)}: {machine.chip}, {machine.cores} cores."
        f"{beside}"
    )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="instead of random weights")
    parser.add_argument("--size", default="0.5b", help="of the random weights")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16], help="to decode at once; 1 among them")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16], help="to caption at once; 1 among them")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--alone", type=int, default=6, help="pictures that are captioned one at a time")
    parser.add_argument("--mlx-vlm", nargs=2, metavar=("PYTHON", "MODEL"), help="measure mlx-vlm, too")
    parser.add_argument("--peer-pictures", type=int, default=16, help="pictures that mlx-vlm captions at once")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="replace the tracked results and tables at the end")
    options = parser.parse_args()
    candidate = Candidate.load(options.model) if options.model else Candidate.random(options.size)
    before = conditions()
    values = report(candidate, options, before, measure(candidate, options))
    write_report("throughput", values, candidate.name, str(options.resolution), record=options.record)
    print("\n".join(table(values)))
    if options.record:
        write_tables("throughput", table)


if __name__ == "__main__":
    main()
