"""Measures what a schema costs: milliseconds of a step of so many rows without one, with one, and with one in one row.

Everything happens in one warm process; the measurements take turns, so that a busy moment of the machine hits all. The
model is of full size with random weights; its vocabulary is Qwen2's, from the tests.

- **step**: the time of one more token for every row, after their prompts; and the processor time of this process, which
  other programs disturb less.
- **masks**: the time that the schema's grammar takes for a token, on the CPU, while a device computes the logits.

    python benchmarks/structured.py                    # 0.5b, random weights; two minutes on two cores
    python benchmarks/structured.py --model demo
    python benchmarks/structured.py --record           # into results/ and README.md
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from peers import where
from recording import write_report, write_tables

from fastvlm_mlx import GenerationConfig
from fastvlm_mlx.bench.candidate import Candidate
from fastvlm_mlx.bench.conditions import Conditions, conditions
from fastvlm_mlx.engine.row import Row
from fastvlm_mlx.engine.scheduler import Scheduler
from fastvlm_mlx.formatting import as_markdown
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.inputs.tokenizer import Tokenizer
from fastvlm_mlx.structured.grammar import Grammars
from fastvlm_mlx.structured.schemas import Schema

HERE = Path(__file__).resolve().parent
VOCABULARY = HERE.parent / "tests" / "tokenizer" / "qwen2"
PROMPT = "Describe the image."
KINDS = {"free": "no row has a schema", "one": "one row has one", "all": "every row has one"}
ENDLESS = {"type": "array", "items": {"type": "string", "minLength": 60, "maxLength": 200}, "minItems": 500}
"""A schema that no answer here fulfils before it is cut."""

Samples = dict[str, dict[str, list[float]]]
"""Milliseconds, by kind and number of rows."""

Measured = tuple[Samples, Samples, list[float], float]
"""Steps, their processor time, masks, and seconds for the vocabulary."""


def with_vocabulary(candidate: Candidate) -> Candidate:
    """Returns the candidate with Qwen2's tokenizer in the place of one that knows no words."""
    config = candidate.model.config
    tokenizer = Tokenizer(VOCABULARY, config.text_config.vocab_size)
    return replace(candidate, processor=FastVLMProcessor(tokenizer, config))


def step(
    candidate: Candidate, kind: str, rows: int, options: argparse.Namespace
) -> tuple[float, float, list[list[int]]]:
    """Returns the milliseconds of a step, those of the processor, and the tokens of each row."""
    rng = np.random.default_rng(0)
    start = partial(Grammars.of(candidate.processor).start, Schema.of(ENDLESS) or Schema("", ""))
    bound = {"free": 0, "one": 1, "all": rows}[kind]
    made = [
        Row(
            candidate.processor.encode(PROMPT + " Why?" * (number % 3), 1),
            rng.integers(0, 256, (1, options.resolution, options.resolution, 3), np.uint8),
            GenerationConfig(ignore_eos=True),
            max_tokens=options.steps + 2,
            constrain=start if number < bound else None,
        )
        for number in range(rows)
    ]
    scheduler = Scheduler(candidate.model, max_rows=rows)
    scheduler.add(made)
    scheduler.step()
    scheduler.step()
    begin, used = time.perf_counter(), time.process_time()
    while scheduler.is_busy:
        scheduler.step()
    seconds, used = time.perf_counter() - begin, time.process_time() - used
    return seconds / options.steps * 1000, used / options.steps * 1000, [row.tokens for row in made]


def masks(candidate: Candidate, tokens: list[int]) -> list[float]:
    """Returns the milliseconds that the grammar takes for each token of an answer."""
    schema = Schema.of(ENDLESS)
    assert schema is not None
    matcher, times = Grammars.of(candidate.processor).start(schema), []
    for token in tokens:
        begin = time.perf_counter()
        matcher.advance(token)
        times.append((time.perf_counter() - begin) * 1000)
    return times


def measure(candidate: Candidate, options: argparse.Namespace) -> Measured:
    """Returns the samples of steps and their processor time, those of masks, and seconds for the vocabulary."""
    begin = time.perf_counter()
    Grammars.of(candidate.processor)
    vocabulary = time.perf_counter() - begin
    samples: Samples = {kind: {} for kind in KINDS}
    processor: Samples = {kind: {} for kind in KINDS}
    taken: list[float] = []
    for run in range(options.runs + 1):
        for rows in options.rows:
            for kind in KINDS:
                milliseconds, used, answers = step(candidate, kind, rows, options)
                if run == 0:  # warms up
                    continue
                samples[kind].setdefault(str(rows), []).append(milliseconds)
                processor[kind].setdefault(str(rows), []).append(used)
                print(f"run {run}/{options.runs}: {rows} rows, {KINDS[kind]}: {milliseconds:.2f} ms a step", flush=True)
                if kind == "all":
                    taken += masks(candidate, answers[0])
    return samples, processor, taken, vocabulary


def report(
    candidate: Candidate,
    options: argparse.Namespace,
    before: Conditions,
    measured: Measured,
) -> dict[str, Any]:
    """Returns the JSON object with every sample."""
    return {
        "conditions": before.to_dict(),
        "model": candidate.name,
        "dtype": str(candidate.model.dtype).rpartition(".")[2],
        "vocabulary": candidate.processor.vocab_size,
        "settings": {name: getattr(options, name) for name in ("resolution", "steps", "runs")},
        "step_ms": measured[0],
        "processor_ms": measured[1],
        "mask_ms": measured[2],
        "vocabulary_seconds": measured[3],
    }


def table(values: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of the Markdown table of a report, and its caption."""
    lines: list[list[str]] = []
    for key, unit in (("step_ms", "ms a step"), ("processor_ms", "ms of processor time")):
        steps = values[key]
        lines = lines or [["", *(f"{rows} rows" if rows != "1" else "1 row" for rows in steps["free"])]]
        for kind, name in KINDS.items():
            cells = []
            for rows, samples in steps[kind].items():
                free, milliseconds = median(steps["free"][rows]), median(samples)
                cells.append(f"{milliseconds:.2f}" + ("" if kind == "free" else f" ({milliseconds / free:.3f}×)"))
            lines.append([f"{unit}, {name}", *cells])
    yield as_markdown(lines)
    machine, settings = Conditions.from_dict(values["conditions"]).machine, values["settings"]
    slow = float(np.quantile(values["mask_ms"], 0.99))
    yield ""
    model = f"{values['model']}, {values['dtype']}, {values['vocabulary']} rows of the vocabulary"
    work = f"{settings['resolution']} px, {settings['steps']} steps; medians of {settings['runs']} runs"
    mask = f"A mask takes {median(values['mask_ms']):.3f} ms (99 %: {slow:.3f} ms)"
    yield (
        f"{model}, {work} that took turns in one process. {mask}, the vocabulary {values['vocabulary_seconds']:.2f} s "
        f"once. Measured {where(machine)}: {machine.chip}, {machine.cores} cores."
    )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="instead of random weights")
    parser.add_argument("--size", default="0.5b", help="of the random weights")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="replace the tracked results and tables at the end")
    options = parser.parse_args()
    candidate = Candidate.load(options.model) if options.model else with_vocabulary(Candidate.random(options.size))
    before = conditions()
    values = report(candidate, options, before, measure(candidate, options))
    write_report("structured", values, candidate.name, record=options.record)
    print("\n".join(table(values)))
    if options.record:
        write_tables("structured", table)


if __name__ == "__main__":
    main()
