"""Counts and durations of the server, as the text that Prometheus reads; the names are vLLM's, so dashboards fit."""

from __future__ import annotations

import bisect
import math
import threading
from collections.abc import Callable, Iterator, Sequence

from fastvlm_mlx.generation.result import GenerationResult

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_PREFIX = "fastvlm_"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)


class Counter:
    """A number that only grows, for each value of at most one label.

    Args:
        name: Without the prefix; Prometheus wants it to end in `_total`.
        text: What it counts.
        label: The name of the label; empty for none.
        values: What the label may be from the start, so that a rate is known from the first event on.
    """

    kind = "counter"

    def __init__(self, name: str, text: str, label: str = "", values: Sequence[str] = ()) -> None:
        self.name, self.text, self._label = name, text, label
        self._counts: dict[str, float] = dict.fromkeys(values if label else ("",), 0)

    def add(self, amount: float = 1, value: str = "") -> None:
        """Counts `amount` more under the label's `value`."""
        self._counts[value] = self._counts.get(value, 0) + amount

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """The suffix of the name, the labels and the value of each line."""
        for value, count in self._counts.items():
            yield "", {self._label: value} if self._label else {}, count


class Gauge:
    """A number that is asked for when it is written.

    Args:
        name: Without the prefix.
        text: What it is.
        read: Gives the number.
    """

    kind = "gauge"

    def __init__(self, name: str, text: str, read: Callable[[], float]) -> None:
        self.name, self.text, self._read = name, text, read

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """The one line."""
        yield "", {}, self._read()


class Histogram:
    """How often a number was below each of several bounds.

    Args:
        name: Without the prefix.
        text: What is measured.
        bounds: Growing; the last bucket, which holds everything, is added.
    """

    kind = "histogram"

    def __init__(self, name: str, text: str, bounds: Sequence[float] = _SECONDS) -> None:
        self.name, self.text, self._bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts a measured number, as if it had been measured `times` times; NaN is left out."""
        if not math.isnan(value):
            self._counts[bisect.bisect_left(self._bounds, value)] += times
            self._sum += value * times

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """The buckets, each with all that is below it, the sum and the count."""
        total = 0
        for bound, count in zip((*self._bounds, math.inf), self._counts, strict=True):
            total += count
            yield "_bucket", {"le": _number(bound)}, total
        yield "_sum", {}, self._sum
        yield "_count", {}, total


class Metrics:
    """What the server counts. Any thread may use it.

    Args:
        model_name: The label `model_name` of every line, as vLLM has it.
    """

    def __init__(self, model_name: str = "") -> None:
        self.model_name = model_name
        self._lock = threading.Lock()
        self._ttft = Histogram("time_to_first_token_seconds", "From a request to its first token.")
        self._gap = Histogram("inter_token_latency_seconds", "From one token of an answer to the next.", _GAPS)
        self._total = Histogram("e2e_request_latency_seconds", "From a request to its last token.")
        self._queue = Histogram("queue_time_seconds", "What a request waited for others.")
        self._preprocess = Histogram("preprocess_seconds", "From images and prompt to arrays: read, decoded, resized.")
        self._vision = Histogram(
            "vision_seconds", "From joining to the first token, where images had to be seen: tower and prompt."
        )
        self._decode = Histogram("request_decode_time_seconds", "From the first token of an answer to its last.")
        self._prompt_length = Histogram("request_prompt_tokens", "Tokens of a prompt, images included.", _TOKENS)
        self._length = Histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._prompt_tokens = Counter("prompt_tokens_total", "Tokens of prompts, images included.")
        self._image_tokens = Counter("image_tokens_total", "Tokens of images.")
        self._tokens = Counter("generation_tokens_total", "Tokens of answers.")
        self._success = Counter(
            "request_success_total", "Requests that were answered.", "finished_reason", ("stop", "length", "abort")
        )
        self._refused = Counter("requests_refused_total", "Requests that were refused.", "reason")
        self._queries = Counter("prefix_cache_queries_total", "Tokens of prompts that were looked up.")
        self._hits = Counter("prefix_cache_hits_total", "Tokens of prompts that did not have to be computed.")
        self._families: list[Counter | Gauge | Histogram] = [
            each for each in vars(self).values() if isinstance(each, (Counter, Histogram))
        ]

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Adds a gauge: what `read` gives whenever the metrics are written."""
        with self._lock:
            self._families.append(Gauge(name, text, read))

    def refused(self, reason: str) -> None:
        """Counts a refused request; the reason is one of a few words of ours, never a client's text."""
        with self._lock:
            self._refused.add(1, reason)

    def piece(self, piece: GenerationResult, before: GenerationResult | None) -> None:
        """Counts a piece of an answer as it comes.

        Args:
            piece: The piece.
            before: The one before it; None if it is the first.
        """
        with self._lock:
            if before is None:
                self._begin(piece)
            elif (tokens := piece.generated_tokens - before.generated_tokens) > 0:
                self._gap.observe((piece.timings.decode - before.timings.decode) / tokens, tokens)
                self._tokens.add(tokens)
            if piece.finish_reason is not None:
                self._end(piece, piece.finish_reason)

    def aborted(self, answers: int) -> None:
        """Counts answers that were not given to their end."""
        with self._lock:
            self._success.add(answers, "abort")

    def _begin(self, piece: GenerationResult) -> None:
        timings = piece.timings
        self._ttft.observe(timings.ttft)
        self._queue.observe(timings.queue)
        self._preprocess.observe(timings.preprocess)
        if piece.visual_tokens > 0 and piece.reused_tokens < piece.visual_tokens:
            self._vision.observe(max(0.0, timings.ttft - timings.queue - timings.preprocess))
        self._prompt_length.observe(piece.prompt_tokens)
        self._prompt_tokens.add(piece.prompt_tokens)
        self._image_tokens.add(piece.visual_tokens)
        self._tokens.add(piece.generated_tokens)
        self._queries.add(piece.prompt_tokens)
        self._hits.add(piece.reused_tokens)

    def _end(self, piece: GenerationResult, reason: str) -> None:
        self._total.observe(piece.timings.total)
        self._decode.observe(piece.timings.decode)
        self._length.observe(piece.generated_tokens)
        self._success.add(1, reason)

    def render(self) -> str:
        """Everything as Prometheus reads it, version 0.0.4 of its text format."""
        lines: list[str] = []
        with self._lock:
            for family in self._families:
                name = _PREFIX + family.name
                lines += [f"# HELP {name} {family.text}", f"# TYPE {name} {family.kind}"]
                for suffix, labels, value in family.samples():
                    shown = ",".join(
                        f'{key}="{_escaped(text)}"' for key, text in {"model_name": self.model_name, **labels}.items()
                    )
                    lines.append(f"{name}{suffix}{{{shown}}} {_number(value)}")
        return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    """A number as Prometheus and Go read it."""
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if math.isnan(value):
        return "NaN"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))


def _escaped(text: str) -> str:
    """The value of a label."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
