"""The run of `fastvlm caption`: its model, its progress, what it writes, and its summary."""

import json
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastvlm_mlx.cli.options import DType
from fastvlm_mlx.cli.terminal import ByteProgress, LiveLine, is_terminal, note, show_json, slow_note, warn_of_slow_blas
from fastvlm_mlx.errors import CheckpointError, ServerError
from fastvlm_mlx.formatting import printable

if TYPE_CHECKING:
    from fastvlm_mlx.cli.clustering import Cluster
    from fastvlm_mlx.generation.engine import Engine
    from fastvlm_mlx.jobs.asking import Answers, Record
    from fastvlm_mlx.jobs.caption import CaptionJob, Plan
    from fastvlm_mlx.jobs.exports import Exporter
    from fastvlm_mlx.jobs.fleet import Fleet
    from fastvlm_mlx.jobs.pictures import Picture
    from fastvlm_mlx.warm.client import Warm

_BOOKKEEPING = frozenset(("fingerprint", "stat", "settings"))
"""Fields of a record that only a later run needs."""
NAMED = 5
"""The most failures that are named on stderr; the output has all."""
_PREFIX_BYTES = 32 << 20
"""For the questions about the pictures at work; a picture that is done is not asked about again."""
_REPORT_SECONDS = 60.0
"""How often progress is noted where it cannot be shown in place, as in a log."""
_JSON_SECONDS = 1.0
"""How often progress is written for programs."""


class Run(NamedTuple):
    """The options that the run itself needs.

    Attributes:
        folder: Of the model; None if it was not looked for, since a server holds the model.
        identity: What the answers depend on, from `identity`.
        server: The background server that holds the model; None if there is none.
        fleet: The servers that the user has named; None if this machine answers.
        cluster: Whose workers answer; None for this process, `server` or `fleet`.
    """

    model: str
    revision: str | None
    folder: Path | None
    dtype: DType | None
    identity: Mapping[str, str]
    server: "Warm | None"
    fleet: "Fleet | None"
    cluster: "Cluster | None"
    schema: Any
    batch: int | None
    force: bool
    output: Path | None
    json_progress: bool


def found_folder(model: str, revision: str | None) -> Path | None:
    """The folder of the model if it is on this machine."""
    from fastvlm_mlx.resolve import check_names, find

    check_names([(model, revision)])
    return find(model, revision=revision)


def folder_of(model: str, revision: str | None) -> Path:
    """The folder of the model, which is fetched or converted if necessary."""
    from fastvlm_mlx.resolve import resolve

    with ByteProgress() as progress:
        return resolve(model, revision=revision, notify=note, progress=progress)


def identity(folder: Path, dtype: DType | None) -> dict[str, str]:
    """What a model's answers depend on: its files, and what it computes in."""
    from fastvlm_mlx.backend import compute_dtype
    from fastvlm_mlx.config import ModelConfig
    from fastvlm_mlx.jobs.fingerprints import checkpoint_fingerprint
    from fastvlm_mlx.machine import cache_folder

    with ByteProgress() as progress:
        weights = checkpoint_fingerprint(folder, cache_folder() / "digests.json", progress)
    computes = dtype.value if dtype else str(compute_dtype(ModelConfig.from_path(folder).dtype)).rpartition(".")[2]
    return {"weights": weights, "dtype": computes}


class _Report:
    """Says how far a run is: in place on a terminal, now and then elsewhere, or as JSON lines.

    Args:
        line: Where it is shown on a terminal.
        total: Pictures to do.
        as_json: Whether it is for programs.
    """

    def __init__(self, line: LiveLine, total: int, *, as_json: bool) -> None:
        self._line, self._total, self._as_json = line, total, as_json
        self._start = self._reported = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the run takes so far."""
        return time.monotonic() - self._start

    def update(self, counts: Mapping[str, int]) -> None:
        """Reports after a picture, if it is time."""
        since = time.monotonic() - self._reported
        if self._as_json:
            if since >= _JSON_SECONDS:
                self._reported = time.monotonic()
                self._write(counts)
            return
        progress = progress_text(counts["pictures"], self._total, self.seconds)
        self._line.show(progress)
        if since >= _REPORT_SECONDS:
            self._reported = time.monotonic()
            if not is_terminal():
                note(progress)

    def end(self, counts: Mapping[str, int]) -> None:
        """Reports for the last time."""
        self._line.clear()
        if self._as_json:
            self._write(counts)

    def _write(self, counts: Mapping[str, int]) -> None:
        done, seconds = counts["pictures"], self.seconds
        left = seconds / done * (self._total - done) if done else None if self._total else 0.0
        record = {
            "done": done,
            "failed": counts["failed"],
            "total": self._total,
            "pictures_per_second": round(done / seconds, 3) if done else 0.0,
            "seconds_left": None if left is None else round(left, 1),
        }
        note(json.dumps(record))


def run(job: "CaptionJob", plan: "Plan", exporter: "Exporter", options: Run) -> int:
    """Asks about the pictures of a plan; returns how many failed."""
    todo = set(plan.todo)
    earlier = {picture: job.record(picture) for picture in plan.todo if exporter.exports.txt}
    for picture in exporter.pictures:
        record = None if picture in todo else job.record(picture)
        if record is not None:
            exporter.write_beside(picture, record, record)
            if (embedded := exporter.embed(picture, record)) is not None:
                job.renew(picture, embedded)
    counts: Counter[str] = Counter()
    if not plan.todo:
        _Report(LiveLine(), 0, as_json=options.json_progress).end(counts)
        return 0
    with LiveLine() as line, ExitStack() as stack:
        engine = stack.enter_context(_opened(line, options))
        report = _Report(line, len(plan.todo), as_json=options.json_progress)
        answers = stack.enter_context(closing(_answers(job, engine, plan.todo, exporter, line, options)))
        try:
            for picture, record in answers:
                counts["pictures"] += 1
                counts["failed"] += "error" in record
                counts["duplicates"] += "duplicate_of" in record
                if "error" in record and counts["failed"] <= NAMED:
                    message = record["error"]["message"]
                    note(message if printable(picture.path) in message else f"{picture.name}: {message}")
                exporter.write_beside(picture, record, earlier.get(picture))
                if options.output is None:
                    line.clear()
                    show_json({key: value for key, value in record.items() if key not in _BOOKKEEPING})
                report.update(counts)
        except KeyboardInterrupt:
            report.end(counts)
            note(f"interrupted after {counts['pictures']} of {len(plan.todo)} pictures" + _how_to_continue(options))
            raise
    report.end(counts)
    note(_summary(counts, report.seconds))
    if options.fleet is not None and len(options.fleet.shares) > 1:
        note(", ".join(f"{count} by {address}" for address, count in options.fleet.shares))
    return counts["failed"]


def _opened(line: LiveLine, options: Run) -> "AbstractContextManager[Answers]":
    """Who answers: a cluster, servers, the background server, or this process."""
    if options.cluster is not None:
        from fastvlm_mlx.cli.clustering import clustered
        from fastvlm_mlx.cluster.identity import Model

        model = Model(options.model, options.revision, options.dtype.value if options.dtype else None)
        return clustered(options.cluster, model, options.identity, options.batch, line)
    if options.fleet is not None:
        return nullcontext(options.fleet)
    return _warm(options.server, options) if options.server else _loaded(line, options)


@contextmanager
def _warm(server: "Warm", options: Run) -> "Iterator[Answers]":
    """Answers from the background server."""
    from fastvlm_mlx.warm.engine import WarmEngine

    if server.slow:
        note(slow_note(server.slow))
    with WarmEngine(server, max_batch=options.batch, schema=options.schema) as engine:
        yield engine


@contextmanager
def _loaded(line: LiveLine, options: Run) -> "Iterator[Engine]":
    """Answers from this process, which loads the model.

    Raises:
        CheckpointError: If it is not the one that the background server has held.
    """
    from fastvlm_mlx.engine.prefix_cache import PrefixCache
    from fastvlm_mlx.generation.engine import Engine
    from fastvlm_mlx.resolve import load

    folder = options.folder
    if folder is None:
        folder = folder_of(options.model, options.revision)
        if identity(folder, options.dtype) != options.identity:
            raise CheckpointError(f"{printable(options.model)}: has changed during the run; run the command again")
    else:
        warn_of_slow_blas()
    line.wait_for(f"loading {options.model}")
    network, processor = load(folder, dtype=options.dtype.value if options.dtype else None)
    prefixes = PrefixCache(_PREFIX_BYTES)
    with Engine(network, processor, max_batch=options.batch or "auto", prefix_cache=prefixes) as engine:
        yield engine


def _answers(
    job: "CaptionJob", engine: "Answers", todo: "list[Picture]", exporter: "Exporter", line: LiveLine, options: Run
) -> "Generator[tuple[Picture, Record], None, None]":
    """Each picture with its record; this process goes on when the background server does not."""
    done = 0
    try:
        for answer in job.run(engine, todo, fresh=options.force, embed=exporter.embed):
            done += 1
            yield answer
    except CancelledError as error:
        line.clear()
        if options.cluster is not None:
            raise
        if options.fleet is not None:
            raise options.fleet.failure or ServerError("the servers do not answer any more") from error
        note("the background server does not answer any more; this process goes on")
        with _loaded(line, options) as engine:
            yield from job.run(engine, todo[done:], embed=exporter.embed)


def note_exports(exporter: "Exporter") -> None:
    """Says what was not written, and why."""
    for reason, count in exporter.left_out.items():
        note(f"{count} text{'s' * (count > 1)} not written: {reason}")
    for failure in exporter.failures[:NAMED]:
        note(f"not written: {failure}")
    if len(exporter.failures) > NAMED:
        note(f"not written: {len(exporter.failures) - NAMED} more for such reasons")


def _how_to_continue(options: Run) -> str:
    return "" if options.output is None else f"; the same command continues {options.output}"


def progress_text(done: int, total: int, seconds: float) -> str:
    """How far a run is, how fast, and how long it will take."""
    left = seconds / done * (total - done)
    time_left = f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min" if left < 5400 else f"{left / 3600:.1f} h"
    return f"{done} of {total} pictures, {done / seconds:.2g} a second, {time_left} left"


def _summary(counts: Mapping[str, int], seconds: float) -> str:
    parts = [f"{counts['pictures'] - counts['failed']} captioned in {seconds:.1f} s"]
    parts.append(f"{counts['pictures'] / seconds:.2g} pictures/s")
    if counts["duplicates"]:
        parts.append(f"{counts['duplicates']} with the content of another")
    if counts["failed"]:
        parts.append(f"{counts['failed']} failed")
    return ", ".join(parts)
