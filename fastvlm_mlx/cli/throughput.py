"""`fastvlm bench throughput`: pictures and tokens a second by the number of questions at once."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastvlm_mlx.cli.candidates import AnswerLength, JsonReport, Models, RandomWeights, check_models, load_candidates
from fastvlm_mlx.cli.options import (
    DEFAULT_PROMPT,
    LoadDType,
    Resolution,
    Revision,
)
from fastvlm_mlx.cli.terminal import LiveLine, show, warn_of_slow_blas
from fastvlm_mlx.formatting import as_markdown, as_text

if TYPE_CHECKING:
    from fastvlm_mlx.bench.candidate import Candidate
    from fastvlm_mlx.bench.images import Images
    from fastvlm_mlx.bench.throughput import Load, Row

_STDOUT = Path("-")


def throughput(
    models: Models = None,
    revision: Revision = None,
    random_weights: RandomWeights = None,
    batches: Annotated[
        list[int] | None,
        typer.Option(
            "--batch",
            "-b",
            metavar="N",
            min=1,
            help="Questions at once, in one process; repeatable. [default: 1, 8 and 16; none with --clients]",
        ),
    ] = None,
    clients: Annotated[
        list[int] | None,
        typer.Option(
            "--clients",
            "-c",
            metavar="N",
            min=1,
            help="Clients of a server at once; repeatable. [default: 1 and 8; none with --batch]",
        ),
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="The question.")] = DEFAULT_PROMPT,
    resolution: Resolution = None,
    megapixels: Annotated[float, typer.Option(metavar="N", min=0.01, max=200, help="Size of the images.")] = 1.2,
    runs: Annotated[int, typer.Option(metavar="N", min=1, help="Measured runs, which take turns.")] = 3,
    max_tokens: AnswerLength = 32,
    dtype: LoadDType = None,
    json_file: JsonReport = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """Measure pictures and tokens a second, by how many questions are answered at once.

    In one process: from encoded images to the last token, as `fastvlm caption` answers. Through a server, which listens
    on this machine only: each client asks again as soon as it has its answer. The first token counts from the
    connection. Every image is new and synthetic; two questions follow one another in each place.
    """
    from fastvlm_mlx.bench.conditions import conditions
    from fastvlm_mlx.bench.images import Images
    from fastvlm_mlx.bench.throughput import Load, report, tables
    from fastvlm_mlx.outputs import check_output, write_output

    check_models(models, revision, random_weights)
    if json_file and json_file != _STDOUT:
        check_output(json_file)
    if batches is None and clients is None:
        batches, clients = [1, 8, 16], [1, 8]
    load = Load(prompt=prompt, resolution=resolution, max_tokens=max_tokens, runs=runs)
    images = Images(megapixels=megapixels)
    warn_of_slow_blas()
    before = conditions()
    rows = [
        row
        for candidate in load_candidates(models, revision, random_weights, dtype.value if dtype else None)
        for row in _measure(candidate, load, images, batches or (), clients or ())
    ]
    formatted = partial(as_markdown, left=1) if markdown else as_text
    text = "\n\n".join(f"{title}\n\n{formatted(lines)}" for title, lines in tables(rows, load))
    show(text, err=json_file == _STDOUT)
    values = json.dumps({**report(rows, load, before), "megapixels": megapixels}, indent=1) + "\n"
    if json_file == _STDOUT:
        typer.echo(values, nl=False)
    elif json_file:
        write_output(json_file, values.encode())


def _measure(
    candidate: "Candidate", load: "Load", images: "Images", batches: Sequence[int], clients: Sequence[int]
) -> list["Row"]:
    """Measures one model; the server's clients come after the batches, since the server has a batch of its own."""
    from fastvlm_mlx.bench.clients import Clients
    from fastvlm_mlx.bench.throughput import Throughput

    measured = Throughput(candidate, load, images)
    with LiveLine() as line:
        line.show(f"{candidate.name}: warming up")
        measured.engine(1, each=1)
        measured.forget()
        for run in range(load.runs):
            for count in dict.fromkeys(batches):
                line.show(f"{candidate.name}, {count} at once: run {run + 1} of {load.runs}")
                measured.engine(count)
            if clients:
                with served(candidate, max(clients)) as port, Clients() as asking:
                    for count in dict.fromkeys(clients):
                        line.show(f"{candidate.name}, {count} clients: run {run + 1} of {load.runs}")
                        measured.server(port, asking, count)
    return list(measured.rows())


@contextmanager
def served(candidate: "Candidate", rows: int) -> Iterator[int]:
    """The port of this machine at which a model is served, so many rows at once."""
    from fastvlm_mlx.generation.engine import Engine
    from fastvlm_mlx.server.app import make_app
    from fastvlm_mlx.server.run import Running
    from fastvlm_mlx.server.service import Service
    from fastvlm_mlx.server.settings import Settings
    from fastvlm_mlx.server.sockets import listen

    settings = Settings(port=0)
    service = Service(candidate.name, settings)
    queue = settings.max_queue + settings.max_choices
    sockets = listen(settings)
    with (
        Engine(candidate.model, candidate.processor, max_batch=rows, queue_size=queue) as engine,
        Running(make_app(service, settings), service, settings, sockets),
    ):
        service.start(engine)
        yield sockets[0].getsockname()[1]
