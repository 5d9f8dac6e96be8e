"""Files for other programs from a journal alone, without a model: after a merge, for instance."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastvlm_mlx import __version__
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.inputs.sources import read
from fastvlm_mlx.jobs.asking import Record
from fastvlm_mlx.jobs.caption import EMBEDDED, CaptionJob
from fastvlm_mlx.jobs.datasets import write_csv
from fastvlm_mlx.jobs.exports import Exporter, Exports, columns, row
from fastvlm_mlx.jobs.files import stat_of
from fastvlm_mlx.jobs.journal import Journal, read_records
from fastvlm_mlx.jobs.pictures import Picture
from fastvlm_mlx.jobs.shards import Names
from fastvlm_mlx.jobs.task import Task

NO_RECORD = "without a record"
CHANGED = "that have changed since they were asked about"


def write_table(path: Path, journal: Path, settings: Mapping[str, Any]) -> None:
    """Writes a CSV file of all records of a journal that has one for each picture, such as `merge` writes.

    Raises:
        ConfigError: If the file exists with other columns, or cannot be written.
    """
    rows = (row(record) for _, record in read_records(journal) if record is not None and "file" in record)
    write_csv(path, columns(Task.of_settings(settings).questions), rows)


def write_results(
    journal: Journal, settings: Mapping[str, Any], exports: Exports, pictures: Sequence[Picture]
) -> Exporter:
    """Writes what is wanted beside pictures, into them and as data sets, from the records of a journal.

    A record is used if the picture's file is as it was, by its times and size or else by its content: on another
    machine its times may differ.

    Args:
        journal: Has the records.
        settings: Theirs.
        exports: What is wanted.
        pictures: All pictures; those without a record are counted in `left_out` of the result.

    Raises:
        ConfigError: If a data set cannot be written, or would take the place of somebody else's file.
    """
    task = Task.of_settings(settings)
    job = CaptionJob(task, journal)
    job.plan([], names=Names(pictures))
    generator = f"fastvlm-mlx {__version__}, {task.model}"
    exporter = Exporter(exports, pictures, fields=list(task.questions), generator=generator)
    exporter.check()
    unusable = set()
    for picture in pictures:
        record = job.record(picture)
        if record is None or not _is_about(record, picture.path):
            exporter.left_out[NO_RECORD if record is None else CHANGED] += 1
            unusable.add(picture)
            continue
        exporter.write_beside(picture, record, record)
        if (embedded := exporter.embed(picture, record)) is not None:
            job.renew(picture, embedded)
    exporter.write_data_sets(lambda picture: None if picture in unusable else job.record(picture))
    return exporter


def _is_about(record: Record, path: str) -> bool:
    """Whether a record is about what a file holds now; one of an error always is."""
    if "error" in record or list(stat_of(path)) == record.get("stat"):
        return True
    with suppress(FastVLMError):
        return hashlib.sha256(read(path).data).hexdigest() in (record.get("sha256"), record.get(EMBEDDED))
    return False
