"""The run of `fastvlm caption`: its progress, what it writes, and its summary."""

import json
import time
from collections import Counter
from collections.abc import Generator, Mapping
from concurrent.futures import CancelledError
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastvlm_mlx.cli.holders import Holder, loaded, opened
from fastvlm_mlx.cli.terminal import LiveLine, is_terminal, note, show_json
from fastvlm_mlx.errors import ServerError
from fastvlm_mlx.formatting import per_second, printable

if TYPE_CHECKING:
    from fastvlm_mlx.jobs.asking import Answers, Record
    from fastvlm_mlx.jobs.caption import CaptionJob, Plan
    from fastvlm_mlx.jobs.exports import Exporter
    from fastvlm_mlx.jobs.pictures import Picture

_BOOKKEEPING = frozenset(("fingerprint", "stat", "settings"))
"""Fields of a record that only a later run needs."""
NAMED = 5
"""The most failures that are named on stderr; the output has all."""
_REPORT_SECONDS = 60.0
"""How often progress is noted where it cannot be shown in place, as in a log."""
_JSON_SECONDS = 1.0
"""How often progress is written for programs."""


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


class Run(NamedTuple):
    """The options of the run itself.

    Attributes:
        force: Whether to ask again about pictures that have a line.
        output: The journal; None for stdout.
        json_progress: Whether progress is for programs.
    """

    force: bool
    output: Path | None
    json_progress: bool


def run(job: "CaptionJob", plan: "Plan", exporter: "Exporter", holder: Holder, options: Run) -> int:
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
        engine = stack.enter_context(opened(holder, line))
        report = _Report(line, len(plan.todo), as_json=options.json_progress)
        told = _answers(job, engine, plan.todo, exporter, line, holder, options.force)
        answers = stack.enter_context(closing(told))
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
    if holder.fleet is not None and len(holder.fleet.shares) > 1:
        note(", ".join(f"{count} by {address}" for address, count in holder.fleet.shares))
    return counts["failed"]


def _answers(
    job: "CaptionJob",
    engine: "Answers",
    todo: "list[Picture]",
    exporter: "Exporter",
    line: LiveLine,
    holder: Holder,
    force: bool,
) -> "Generator[tuple[Picture, Record], None, None]":
    """Each picture with its record; this process goes on when the background server does not."""
    done = 0
    try:
        for answer in job.run(engine, todo, fresh=force, embed=exporter.embed):
            done += 1
            yield answer
    except CancelledError as error:
        line.clear()
        if holder.cluster is not None:
            raise
        if holder.fleet is not None:
            raise holder.fleet.failure or ServerError("the servers do not answer any more") from error
        note("the background server does not answer any more; this process goes on")
        with loaded(holder, line) as engine:
            yield from job.run(engine, todo[done:], embed=exporter.embed)


def _how_to_continue(options: Run) -> str:
    return "" if options.output is None else f"; the same command continues {options.output}"


def progress_text(done: int, total: int, seconds: float) -> str:
    """How far a run is, how fast, and how long it will take."""
    left = seconds / done * (total - done)
    time_left = f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min" if left < 5400 else f"{left / 3600:.1f} h"
    return f"{done} of {total} pictures, {per_second(done / seconds)} a second, {time_left} left"


def _summary(counts: Mapping[str, int], seconds: float) -> str:
    parts = [f"{counts['pictures'] - counts['failed']} captioned in {seconds:.1f} s"]
    parts.append(f"{per_second(counts['pictures'] / seconds)} pictures/s")
    if counts["duplicates"]:
        parts.append(f"{counts['duplicates']} with the content of another")
    if counts["failed"]:
        parts.append(f"{counts['failed']} failed")
    return ", ".join(parts)
