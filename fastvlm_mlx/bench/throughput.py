"""Measures how many pictures and tokens a second a model gives when it answers many questions at once.

- **one process**: `Engine.map` with so many rows at once, from the encoded pictures to the last token.
- **server**: so many clients, each of which asks again as soon as it has its answer, over HTTP on this machine. Their
  first token is counted from the connection to the first piece of text.

Every picture is new, answers have a fixed length, as end tokens are ignored, and measurements take turns.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from fastvlm_mlx.bench.candidate import Candidate, precision
from fastvlm_mlx.bench.clients import Clients, question
from fastvlm_mlx.bench.conditions import Conditions
from fastvlm_mlx.bench.images import Images
from fastvlm_mlx.bench.statistics import Metric
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.generation.engine import Engine
from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.inputs.resolution import Resolution

THROUGHPUT_VERSION = 1
EACH = 2
"""Questions that follow one another in each place: of a batch, or of a client."""
ENGINE, SERVER = "one process", "server"

Progress = Callable[[str], None]
"""Called with a description before each measurement."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked.

    Attributes:
        prompt: The question.
        resolution: As in `generate`.
        max_tokens: Length of each answer.
        runs: How often everything is measured.
    """

    prompt: str
    resolution: Resolution
    max_tokens: int
    runs: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """So many questions at once.

    Attributes:
        model: Its name.
        precision: What the decoder computes in.
        way: `ENGINE` or `SERVER`.
        at_once: Rows of a batch, or clients.
        answers: Of one run.
        metrics: `answers` and `tokens`, per second; of a server also `first_token`, in seconds.
    """

    model: str
    precision: str
    way: str
    at_once: int
    answers: int
    metrics: dict[str, Metric]

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return {**vars(self), "metrics": {name: metric.to_dict() for name, metric in self.metrics.items()}}


class Throughput:
    """Measures one model.

    Args:
        candidate: The model.
        load: What is asked.
        images: The pictures.
    """

    def __init__(self, candidate: Candidate, load: Load, images: Images) -> None:
        self._candidate, self._load, self._images = candidate, load, images
        self._shown = 0
        self._samples: dict[tuple[str, int], dict[str, list[float]]] = {}

    def _pictures(self, count: int) -> list[bytes]:
        self._shown += count
        return [self._images(number) for number in range(self._shown - count, self._shown)]

    def _add(self, way: str, at_once: int, answers: int, tokens: int, seconds: float) -> dict[str, list[float]]:
        samples = self._samples.setdefault((way, at_once), {})
        samples.setdefault("answers", []).append(answers / seconds)
        samples.setdefault("tokens", []).append(tokens / seconds)
        return samples

    def engine(self, rows: int, each: int = EACH) -> None:
        """Answers about `each` pictures for each row of a batch."""
        load = self._load
        config = GenerationConfig(max_tokens=load.max_tokens, ignore_eos=True)
        requests = [
            Request(image=picture, prompt=load.prompt, resolution=load.resolution, config=config)
            for picture in self._pictures(each * rows)
        ]
        with Engine(self._candidate.model, self._candidate.processor, max_batch=rows) as engine:
            start = time.perf_counter()
            tokens = sum(handle.result().generated_tokens for handle in engine.map(requests))
            self._add(ENGINE, rows, len(requests), tokens, time.perf_counter() - start)

    def server(self, port: int, asking: Clients, clients: int, each: int = EACH) -> None:
        """Lets so many clients ask about `each` pictures, one after the other."""
        load = self._load
        bodies = [
            question(picture, load.prompt, load.resolution, load.max_tokens)
            for picture in self._pictures(each * clients)
        ]
        start = time.perf_counter()
        answers = asking.ask(port, bodies, clients)
        seconds = time.perf_counter() - start
        samples = self._add(SERVER, clients, len(answers), sum(answer.tokens for answer in answers), seconds)
        samples.setdefault("first_token", []).extend(answer.pieces[0] for answer in answers)

    def forget(self) -> None:
        """Drops what was measured so far, which was the warm-up."""
        self._samples.clear()

    def rows(self) -> Iterator[Row]:
        """What was measured, by way and number."""
        units = {"answers": "pictures/s", "tokens": "tokens/s", "first_token": "s"}
        decoder = precision(self._candidate.model)["language_model"]
        for (way, at_once), samples in self._samples.items():
            yield Row(
                model=self._candidate.name,
                precision=decoder,
                way=way,
                at_once=at_once,
                answers=EACH * at_once,
                metrics={name: Metric(unit=units[name], samples=tuple(values)) for name, values in samples.items()},
            )


def report(rows: Sequence[Row], load: Load, conditions: Conditions) -> dict[str, Any]:
    """Returns the JSON object with every sample."""
    return {
        "fastvlm_throughput": THROUGHPUT_VERSION,
        "conditions": conditions.to_dict(),
        "settings": asdict(load),
        "rows": [row.to_dict() for row in rows],
    }


def tables(rows: Sequence[Row], load: Load) -> Iterator[tuple[str, list[list[str]]]]:
    """Yields for each model a title, and a header and the medians of each row as text.

    Factors are relative to one question at once, if that was measured.
    """
    for (model, decoder), group in groupby(rows, key=lambda row: (row.model, row.precision)):
        side = "native resolution" if load.resolution is None else f"{load.resolution} px"
        runs = "one run" if load.runs == 1 else f"medians of {load.runs} runs"
        title = f"{model}, {decoder}, {side}: answers of {load.max_tokens} tokens, {runs}"
        lines = [["through", "at once", "pictures/s", "tokens/s", "", "first token", "p90"]]
        alone: dict[str, float] = {}
        for row in group:
            statistics = {name: metric.statistics for name, metric in row.metrics.items()}
            rate = statistics["tokens"].median
            if row.at_once == 1:
                alone[row.way] = rate
            factor = f"{rate / alone[row.way]:.1f}×" if row.at_once > 1 and row.way in alone else ""
            pictures = f"{statistics['answers'].median:.3g}"
            first = statistics.get("first_token")
            times = [f"{1000 * value:.0f} ms" for value in (first.median, first.p90)] if first else ["", ""]
            lines.append([row.way, str(row.at_once), pictures, f"{rate:.1f}", factor, *times])
        yield title, lines
