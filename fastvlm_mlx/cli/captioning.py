"""The run of `fastvlm caption`: its progress, what it writes, and its summary."""

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastvlm_mlx.cli.options import DType
from fastvlm_mlx.cli.terminal import LiveLine, is_terminal, note, show_json, warn_of_slow_blas
from fastvlm_mlx.formatting import printable

if TYPE_CHECKING:
    from fastvlm_mlx.jobs.caption import CaptionJob, Plan
    from fastvlm_mlx.jobs.exports import Exporter

_BOOKKEEPING = frozenset(("fingerprint", "stat", "settings"))
"""Fields of a record that only a later run needs."""
NAMED = 5
"""The most failures that are named on stderr; the output has all."""
_PREFIX_BYTES = 32 << 20
"""For the questions about the pictures at work; a picture that is done is not asked about again."""
_REPORT_SECONDS = 60.0
"""How often progress is noted where it cannot be shown in place, as in a log."""


class Run(NamedTuple):
    """The options that the run itself needs."""

    model: str
    folder: Path
    dtype: DType | None
    batch: int | None
    force: bool
    output: Path | None


def run(job: "CaptionJob", plan: "Plan", exporter: "Exporter", options: Run) -> int:
    """Asks about the pictures of a plan; returns how many failed."""
    from fastvlm_mlx.engine.prefix_cache import PrefixCache
    from fastvlm_mlx.generation.engine import Engine
    from fastvlm_mlx.resolve import load

    todo = set(plan.todo)
    earlier = {picture: job.record(picture) for picture in plan.todo if exporter.exports.txt}
    for picture in exporter.pictures:
        record = None if picture in todo else job.record(picture)
        if record is not None:
            exporter.write_beside(picture, record, record)
    if not plan.todo:
        return 0
    warn_of_slow_blas()
    with LiveLine() as line:
        line.wait_for(f"loading {options.model}")
        network, processor = load(options.folder, dtype=options.dtype.value if options.dtype else None)
        counts: Counter[str] = Counter()
        start = reported = time.monotonic()
        prefixes = PrefixCache(_PREFIX_BYTES)
        with Engine(network, processor, max_batch=options.batch or "auto", prefix_cache=prefixes) as engine:
            try:
                for picture, record in job.run(engine, plan.todo, fresh=options.force):
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
                    now = time.monotonic()
                    progress = _progress(counts["pictures"], len(plan.todo), now - start)
                    line.show(progress)
                    if now - reported >= _REPORT_SECONDS:
                        reported = now
                        if not is_terminal():
                            note(progress)
            except KeyboardInterrupt:
                line.clear()
                note(f"interrupted after {counts['pictures']} of {len(plan.todo)} pictures" + _how_to_continue(options))
                raise
    note(_summary(counts, time.monotonic() - start))
    return counts["failed"]


def _how_to_continue(options: Run) -> str:
    return "" if options.output is None else f"; the same command continues {options.output}"


def _progress(done: int, total: int, seconds: float) -> str:
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
