"""Random public calls from several threads and processes on one cache, each compared with what it gives alone.

python -m tests.stress.sequences -n 300 --seed 0
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fastvlm_mlx import (
    Engine,
    FastVLM,
    FastVLMProcessor,
    GenerationConfig,
    PrefixCache,
    Request,
    generate,
    load,
    stream_generate,
)
from tests.checkpoints import APPLE, SOURCES

ROOT = Path(__file__).parents[2]
MODELS = {"apple": SOURCES["apple"], "4 bits": SOURCES["mlx-vlm-q4"]}
IMAGES = [APPLE / "images" / f"{name}.png" for name in ("landscape", "square")]
QUESTIONS: list[dict[str, Any]] = [
    {"image": image, "prompt": prompt, "max_tokens": 4, **more}
    for image in (*IMAGES, IMAGES, None)
    for prompt in ("What is it?", "What is in the picture, and where?")
    for more in ({}, {"resolution": 192}, {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.3})
]
ROWS = (([1, 2, -200, 7], [5, 3, 2, -200]), ([4, 9, 9, -200], [-200, 8, 1, 1]))
"""Pairs of rows of token ids, each with an image."""
LENGTH = 6
"""The most calls of a sequence."""

Answers = dict[str, list[list[int]]]
Loaded = tuple[FastVLM, FastVLMProcessor]


def _batch(model: FastVLM, number: int) -> list[list[int]]:
    pixels = np.random.default_rng(number).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    return model.generate(list(ROWS[number]), pixels, max_tokens=5)


def answers_alone() -> Answers:
    """The answers of every model to every question and every batch of rows, one after another in one thread."""
    answers: Answers = {}
    for name, source in MODELS.items():
        model, processor = load(source)
        answers[name] = [list(generate(model, processor, **question).token_ids) for question in QUESTIONS]
        answers[name] += [ids for number in range(len(ROWS)) for ids in _batch(model, number)]
    return answers


def _request(question: dict[str, Any]) -> Request:
    options = dict(question)
    asked = {name: options.pop(name) for name in ("image", "prompt", "resolution") if name in options}
    return Request(**asked, config=GenerationConfig(**options))


class Caller:
    """Makes random calls on models that several threads share.

    Args:
        expected: From `answers_alone`.
        prefix_caches: Whether questions share the keys and values of earlier ones.
    """

    def __init__(self, expected: Answers, *, prefix_caches: bool) -> None:
        self._expected = expected
        self._lock = threading.Lock()
        self._models: dict[str, Loaded] = {}
        self._engines: dict[str, Engine] = {}
        self._caches: dict[str, PrefixCache | None] = {
            name: PrefixCache(300_000) if prefix_caches else None for name in MODELS
        }

    def sequence(self, seed: int) -> None:
        """Makes the calls that a seed decides; an AssertionError names the first with another answer."""
        random = Random(seed)
        for step in range(random.randint(2, LENGTH)):
            name = random.choice(list(MODELS))
            call = random.choice(
                (
                    self._ask,
                    self._stream,
                    self._abandon,
                    self._together,
                    self._rows,
                    self._again,
                    self._engine,
                    self._own,
                )
            )
            call(random, name, f"sequence {seed}, step {step}, {call.__name__} of {name}")

    def _model(self, name: str) -> Loaded:
        """A model that all threads share, loaded by the first that needs it, or by several at once."""
        if name not in self._models:
            self._models.setdefault(name, load(MODELS[name]))
        return self._models[name]

    def _question(self, random: Random, name: str) -> tuple[dict[str, Any], list[int]]:
        number = random.randrange(len(QUESTIONS))
        return {**QUESTIONS[number], "prefix_cache": self._caches[name]}, self._expected[name][number]

    def _ask(self, random: Random, name: str, where: str) -> None:
        question, expected = self._question(random, name)
        assert list(generate(*self._model(name), **question).token_ids) == expected, where

    def _stream(self, random: Random, name: str, where: str) -> None:
        question, expected = self._question(random, name)
        pieces = stream_generate(*self._model(name), **question)
        assert [token for piece in pieces for token in piece.token_ids] == expected, where

    def _abandon(self, random: Random, name: str, where: str) -> None:
        question, expected = self._question(random, name)
        stream = stream_generate(*self._model(name), **question)
        started = [next(stream).token_ids for _ in range(random.choice((0, 1, 2)))]
        assert [token for ids in started for token in ids] == expected[: len(started)], where

    def _together(self, random: Random, name: str, where: str) -> None:
        """Two streams in turns."""
        chosen = [self._question(random, name) for _ in range(2)]
        streams = [stream_generate(*self._model(name), **question) for question, _ in chosen]
        ids: list[list[int]] = [[], []]
        waiting = [0, 1]
        while waiting:
            place = random.choice(waiting)
            piece = next(streams[place], None)
            if piece is None:
                waiting.remove(place)
            else:
                ids[place] += piece.token_ids
        assert ids == [expected for _, expected in chosen], where

    def _rows(self, random: Random, name: str, where: str) -> None:
        number = random.randrange(len(ROWS))
        start = len(QUESTIONS) + 2 * number
        assert _batch(self._model(name)[0], number) == self._expected[name][start : start + 2], where

    def _engine(self, random: Random, name: str, where: str) -> None:
        """Several questions to an engine that all threads share."""
        with self._lock:
            if name not in self._engines:
                self._engines[name] = Engine(*self._model(name), max_batch=3)
        self._submit(random, name, self._engines[name], where)

    def _own(self, random: Random, name: str, where: str) -> None:
        """Several questions to an engine that is closed afterwards."""
        with Engine(*self._model(name), max_batch=2) as engine:
            self._submit(random, name, engine, where)
            engine.submit(Request(prompt="Who waits for this?"))

    def _submit(self, random: Random, name: str, engine: Engine, where: str) -> None:
        numbers = [random.randrange(len(QUESTIONS)) for _ in range(random.choice((1, 2, 4)))]
        handles = [engine.submit(_request(QUESTIONS[number])) for number in numbers]
        cancelled = random.randrange(len(handles)) if random.random() < 0.3 else None
        if cancelled is not None:
            handles[cancelled].cancel()
        for place, (number, handle) in enumerate(zip(numbers, handles, strict=True)):
            if place != cancelled:
                assert list(handle.result(120).token_ids) == self._expected[name][number], where

    def close(self) -> None:
        """Ends the engines."""
        for engine in self._engines.values():
            engine.close()

    def _again(self, random: Random, name: str, where: str) -> None:
        """A model loaded anew, through the cache."""
        question, expected = self._question(random, name)
        loaded = load(MODELS[name], lazy=random.random() < 0.5)
        assert list(generate(*loaded, **{**question, "prefix_cache": None}).token_ids) == expected, where


def run_threads(expected: Answers, seeds: Sequence[int], threads: int, *, prefix_caches: bool) -> None:
    """Runs sequences in several threads of this process."""
    caller = Caller(expected, prefix_caches=prefix_caches)
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(caller.sequence, seed) for seed in seeds]:
            done.result()
    caller.close()


def run_processes(expected: Answers, seeds: Sequence[int], processes: int, threads: int, folder: Path) -> None:
    """Runs sequences in several processes at once, which begin with one empty cache."""
    answers = folder / "answers.json"
    answers.write_text(json.dumps(expected))
    environment = {**os.environ, "FASTVLM_CACHE": str(folder / "cache")}
    arguments = [sys.executable, "-m", "tests.stress.sequences", "--threads", str(threads), "--answers", str(answers)]
    started = []
    for number in range(processes):
        some = ",".join(map(str, seeds[number::processes]))
        started.append(
            subprocess.Popen(
                [*arguments, "--seeds", some],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    for process in started:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output.decode(errors="replace")[-2000:]


def main() -> None:
    """Runs sequences in threads and in processes, half of them with shared prefix caches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--number", type=int, default=300, help="how many sequences")
    parser.add_argument("--seed", type=int, default=0, help="the first sequence")
    parser.add_argument("--threads", type=int, default=4, help="threads of a process")
    parser.add_argument("--processes", type=int, default=3, help="processes at once")
    parser.add_argument("--seeds", help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answers:
        seeds = [int(seed) for seed in options.seeds.split(",") if seed]
        half = len(seeds) // 2
        expected = json.loads(options.answers.read_text())
        run_threads(expected, seeds[:half], options.threads, prefix_caches=True)
        run_threads(expected, seeds[half:], options.threads, prefix_caches=False)
        return
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTVLM_CACHE"] = str(Path(folder, "alone"))
        expected = answers_alone()
        seeds = range(options.seed, options.seed + options.number)
        run_processes(expected, seeds, options.processes, options.threads, Path(folder))
    print(f"{options.number} sequences: every answer is the one computed alone; {time.monotonic() - start:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main()
