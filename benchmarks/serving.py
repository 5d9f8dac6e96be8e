"""Measures what a server adds to the engine behind it, and what many clients at once gain.

The server listens on a socket of this machine, in the process that holds the model; its clients are a process of their
own, as they would be. Measurements of one kind take turns, every picture is new, and answers have a fixed length, as
end tokens are ignored.

- **first token**: of `stream_generate`, and through the server from the connection to the first piece of text.
- **second question**: the same through the server, about a picture that it has seen.
- **clients**: tokens per second of 16 clients at once, and of one client that asks again and again.
- **joining**: the first token of a request that comes while 8 others are decoded, and a step of those.

    python benchmarks/serving.py                         # 0.5b, random weights; about 10 minutes on two cores
    python benchmarks/serving.py --model demo --resolution 192
    python benchmarks/serving.py --record
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from peers import where
from recording import write_report, write_tables

from fastvlm_mlx import stream_generate
from fastvlm_mlx.bench.candidate import Candidate
from fastvlm_mlx.bench.clients import Body, Clients, ServedAnswer, question
from fastvlm_mlx.bench.conditions import Conditions, conditions
from fastvlm_mlx.bench.images import Images
from fastvlm_mlx.cli.throughput import served
from fastvlm_mlx.formatting import as_markdown

PROMPT, SECOND = "Describe the image.", "How many things are there?"
ROWS = 8
"""That are decoded while another request joins."""


@dataclass
class Samples:
    """Everything that was measured; seconds, and tokens per second."""

    direct: list[float] = field(default_factory=list)
    served: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    one_client: list[float] = field(default_factory=list)
    many_clients: list[float] = field(default_factory=list)
    joining: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)


class Bench:
    """Measures a model and its server.

    Args:
        candidate: The model.
        port: Where it is served.
        clients: The process of the clients.
        options: Of the command line.
    """

    def __init__(self, candidate: Candidate, port: int, clients: Clients, options: argparse.Namespace) -> None:
        self._candidate = candidate
        self._port = port
        self._clients = clients
        self._options = options
        self._images = Images()
        self._shown = 0
        self.samples = Samples()

    def _picture(self) -> bytes:
        self._shown += 1
        return self._images(self._shown)

    def _body(self, picture: bytes, prompt: str = PROMPT, tokens: int | None = None) -> Body:
        max_tokens = self._options.max_tokens if tokens is None else tokens
        return question(picture, prompt, self._options.resolution, max_tokens)

    def first_tokens(self) -> None:
        """Measures first tokens, without the server and with it, and those of second questions."""
        picture = self._picture()
        start = time.perf_counter()
        pieces = stream_generate(
            self._candidate.model,
            self._candidate.processor,
            PROMPT,
            picture,
            resolution=self._options.resolution,
            max_tokens=2,
            ignore_eos=True,
        )
        next(pieces)
        self.samples.direct.append(time.perf_counter() - start)
        list(pieces)
        picture = self._picture()
        first, second = (
            self._clients.ask(self._port, [self._body(picture, prompt, 2)])[0] for prompt in (PROMPT, SECOND)
        )
        self.samples.served.append(first.pieces[0])
        self.samples.second.append(second.pieces[0])

    def throughput(self) -> None:
        """Measures tokens per second of one client, and of many at once."""
        options = self._options
        for count, at_once, rates in (
            (options.alone, 1, self.samples.one_client),
            (options.clients, options.clients, self.samples.many_clients),
        ):
            bodies = [self._body(self._picture()) for _ in range(count)]
            start = time.perf_counter()
            answers = self._clients.ask(self._port, bodies, at_once)
            rates.append(sum(answer.tokens for answer in answers) / (time.perf_counter() - start))

    def joining(self) -> None:
        """Measures the first token of a request that finds others at work."""
        # Long enough that all of them are decoded, by steps of at most so many rows, when the new one comes.
        rows = [self._body(self._picture(), tokens=self._options.max_tokens * 2) for _ in range(ROWS)]
        *others, late = self._clients.ask(self._port, [*rows, self._body(self._picture(), tokens=2)], ROWS + 1, late=1)
        self.samples.joining.append(late.pieces[0])
        self.samples.step.append(usual_step(others))


def usual_step(answers: Sequence[ServedAnswer]) -> float:
    """The median time between two pieces of an answer."""
    return median(after - before for answer in answers for before, after in pairwise(answer.pieces))


def measure(candidate: Candidate, options: argparse.Namespace) -> Samples:
    """The samples of all measurements."""
    with served(candidate, max(options.clients, ROWS + 1)) as port, Clients() as clients:
        bench = Bench(candidate, port, clients, options)
        bench.first_tokens()
        bench.samples = Samples()  # that was the warm-up
        for run in range(options.runs):
            for _ in range(options.firsts):
                bench.first_tokens()
            bench.throughput()
            bench.joining()
            print(f"run {run + 1}/{options.runs}: {summary(bench.samples)}", flush=True)
    return bench.samples


def summary(samples: Samples) -> str:
    """The medians so far, on one line."""
    return (
        f"first token {median(samples.direct):.4f} s, served {median(samples.served):.4f} s, second question "
        f"{median(samples.second):.4f} s; {median(samples.many_clients):.1f} tokens/s at once, "
        f"{median(samples.one_client):.1f} one by one; joining {median(samples.joining):.4f} s, step "
        f"{median(samples.step):.4f} s"
    )


def report(candidate: Candidate, options: argparse.Namespace, before: Conditions, samples: Samples) -> dict[str, Any]:
    """The JSON object with every sample."""
    names = ("resolution", "max_tokens", "clients", "alone", "firsts", "runs")
    return {
        "conditions": before.to_dict(),
        "model": candidate.name,
        "dtype": str(candidate.model.dtype).rpartition(".")[2],
        "settings": {name: getattr(options, name) for name in names} | {"rows": ROWS},
        "samples": vars(samples),
    }


def table(values: dict[str, Any]) -> Iterator[str]:
    """The lines of the Markdown table of a report, and its caption."""
    medians = {name: median(samples) for name, samples in values["samples"].items()}
    settings = values["settings"]
    direct, clients = medians["direct"], settings["clients"]
    steps = (medians["joining"] - medians["served"]) / medians["step"]
    rows = [
        ["", "", "beside"],
        ["first token, `stream_generate`", f"{direct * 1000:.1f} ms", ""],
        ["first token, served", f"{medians['served'] * 1000:.1f} ms", f"{medians['served'] / direct:.2f}×"],
        [
            "second question on a picture, served",
            f"{medians['second'] * 1000:.1f} ms",
            f"{medians['second'] / direct:.2f}×",
        ],
        ["one client", f"{medians['one_client']:.1f} tokens/s", ""],
        [
            f"{clients} clients at once",
            f"{medians['many_clients']:.1f} tokens/s",
            f"{medians['many_clients'] / medians['one_client']:.1f}×",
        ],
        [
            f"first token while {settings['rows']} others are decoded",
            f"{medians['joining'] * 1000:.1f} ms",
            f"alone + {steps:.1f} steps of {medians['step'] * 1000:.1f} ms",
        ],
    ]
    yield as_markdown(rows)
    machine = Conditions.from_dict(values["conditions"]).machine
    yield ""
    yield (
        f"{values['model']}, {values['dtype']}, {settings['resolution']} px, answers of {settings['max_tokens']} "
        f"tokens; medians of {settings['runs']} runs that took turns, with {settings['firsts']} first tokens each. "
        f"Measured {where(machine)}: {machine.chip}, {machine.cores} cores, shared by server and clients."
    )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="instead of random weights")
    parser.add_argument("--size", default="0.5b", help="of the random weights")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--clients", type=int, default=16, help="that ask at once")
    parser.add_argument("--alone", type=int, default=3, help="questions of the client that asks alone")
    parser.add_argument("--firsts", type=int, default=5, help="first tokens in each run")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="replace the tracked results and tables at the end")
    options = parser.parse_args()
    candidate = Candidate.load(options.model) if options.model else Candidate.random(options.size)
    before = conditions()
    values = report(candidate, options, before, measure(candidate, options))
    write_report("serving", values, candidate.name, str(options.resolution), record=options.record)
    print("\n".join(table(values)))
    if options.record:
        write_tables("serving", table)


if __name__ == "__main__":
    main()
