"""Merges the journals of several workers into one, in the order of the pictures; of any size, in little memory."""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.jobs.asking import Record
from fastvlm_mlx.jobs.caption import EMBEDDED, SHARD
from fastvlm_mlx.jobs.fingerprints import fingerprint
from fastvlm_mlx.jobs.journal import Place, locked, read_records
from fastvlm_mlx.jobs.shards import Shard, shard_of
from fastvlm_mlx.jobs.sorting import Entry, Sorter, name_in, sort_key
from fastvlm_mlx.jobs.task import differences, essence
from fastvlm_mlx.outputs import writing
from fastvlm_mlx.schema import shown

_OPEN_JOURNALS = 64
"""Files that are open at the same time; systems allow 256 and more."""
_NAMED = 10
"""Shards that are named."""


@dataclass(kw_only=True)
class Merged:
    """What was merged.

    Attributes:
        settings: Of the records.
        records: How many there are now.
        failed: How many of those are errors.
        repeated: How many records were about a picture that had one already.
        differing: How many of those had another answer about the same content.
        missing: What is not there, a line each: shards without a journal, and shards that are not done.
        damaged: How many lines are no records, by journal.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    records: int = 0
    failed: int = 0
    repeated: int = 0
    differing: int = 0
    missing: list[str] = field(default_factory=list)
    damaged: Counter[str] = field(default_factory=Counter)


def merge(
    journals: Sequence[Path],
    output: Path,
    *,
    mixed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Writes one journal with the record of each picture in several, and says what is missing.

    The result is in the natural order of the pictures' names, as that of one run is, whatever the order of the
    journals. Of several records about one picture an answer counts more than an error about the same content, and
    otherwise a later one more than an earlier one, in the order of the journals. If the output exists, its records
    count as the first ones, so that none is lost.

    Memory does not grow with the records; time does in proportion, and so does a temporary file beside the output, by
    about 100 bytes each.

    Args:
        journals: The journals; runs may still be adding to them.
        output: The journal to write. It takes the place of an earlier one when it is whole.
        mixed: Whether records with different settings may be in one journal.
        progress: Called with the bytes that have been read, and with all.

    Raises:
        ConfigError: If a file is no journal of captions, records have different settings, another run is adding to the
            output, or it cannot be written.
        OSError: If a journal cannot be read.
    """
    sources = list(journals)
    with ExitStack() as stack:
        if output.exists():
            stack.enter_context(locked(output))
            sources = [output, *(each for each in sources if not os.path.samefile(each, output))]
        sorter = stack.enter_context(Sorter(output.absolute().parent))
        reading = _Reading(sources, sorter, mixed, progress)
        for number in range(len(sources)):
            reading.read(number)
        merged, shards = reading.merged, reading.shards
        if not merged.settings:
            others = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
            raise ConfigError(f"{printable(sources[0])}{others}: there are no captions to merge")
        files = stack.enter_context(_Files(sources))
        with writing(output) as file:
            for key, group in groupby(sorter.entries(), key=lambda entry: entry.key):
                first, *others_of_it = group
                line, failed = files.line(first), first.failed
                if others_of_it:
                    line, failed = _choose([line, *map(files.line, others_of_it)], merged)
                file.write(line)
                shards.count(name_in(key))
                merged.records += 1
                merged.failed += failed
        merged.missing = shards.missing(merged.records)
    return merged


class _Reading:
    """Reads journals one after another; checks that they belong together, and notes where their records are."""

    def __init__(
        self, sources: Sequence[Path], sorter: Sorter, mixed: bool, progress: Callable[[int, int], None] | None
    ) -> None:
        self.merged = Merged()
        self.shards = _Shards()
        self._sources, self._sorter, self._mixed = sources, sorter, mixed
        self._progress = progress
        self._sizes = [source.stat().st_size for source in sources]
        self._reference = ""
        self._latest: Any = None
        self._kind = ""

    def read(self, number: int) -> None:
        """Reads a journal."""
        source, before, total = self._sources[number], sum(self._sizes[:number]), sum(self._sizes)
        progress = self._progress

        def report(done: int) -> None:
            if progress is not None:
                progress(before + done, total)

        whole = 0
        for place, record in read_records(source, report):
            if record is None:
                self.merged.damaged[str(source)] += 1
                if not whole and self.merged.damaged[str(source)] > 1000:
                    raise ConfigError(f"{printable(source)}: holds no records but something else; leave it out")
                continue
            self._check(record, source, place)
            whole += 1
            if SHARD in record:
                self.shards.add(record, source)
                continue
            key = sort_key(record["file"], self._kind)
            self._sorter.add(Entry(key, number, place.start, place.size, "error" in record))
        if not whole and self.merged.damaged[str(source)]:
            raise ConfigError(f"{printable(source)}: holds no records but something else; leave it out")

    def _check(self, record: Record, source: Path, place: Place) -> None:
        """Raises if a record is none of captions, or has other settings than those before."""
        settings = record.get("settings")
        if not isinstance(settings, dict) or not (isinstance(record.get("file"), str) or SHARD in record):
            raise ConfigError(f"{printable(source)}: line {place.line} is no record of `fastvlm caption`; leave it out")
        if settings == self._latest:
            return
        if not self.merged.settings:
            self.merged.settings, self._reference = settings, printable(source)
        differing = differences(self.merged.settings, settings)
        if differing and not self._mixed:
            key = differing[0]
            mine, theirs = (_value(each.get(key)) for each in (settings, self.merged.settings))
            more = f" (and {', '.join(differing[1:])})" if differing[1:] else ""
            raise ConfigError(
                f"{printable(source)}: line {place.line} has {key} {mine}, but {self._reference} has {theirs}{more}; "
                "merge what belongs together, or all with --force"
            )
        self._latest = settings
        self._kind = fingerprint(essence(settings)) if self._mixed else ""


def _value(value: Any) -> str:
    return "its default" if value is None else shown(value)


class _Shards:
    """Counts how many pictures of each shard have a record."""

    def __init__(self) -> None:
        self._planned: dict[int, dict[int, int]] = {}
        self._seen: dict[int, str] = {}
        self._found: dict[int, Counter[int]] = {}
        self._all = 0
        self._warnings: list[str] = []

    def add(self, record: Record, source: Path) -> None:
        """Notes what a journal is for."""
        try:
            shard, pictures, total = Shard.parse(str(record[SHARD])), int(record["pictures"]), int(record["of"])
        except (KeyError, TypeError, ValueError, ConfigError) as err:
            raise ConfigError(f"{printable(source)}: names no shard in its first line; run its shard again") from err
        planned = self._planned.setdefault(shard.total, {})
        planned[shard.number] = max(pictures, planned.get(shard.number, 0))
        self._found.setdefault(shard.total, Counter())
        if self._all not in (0, total):
            self._warnings = [f"shards were made of {self._all} and of {total} pictures: do all machines see the same?"]
        self._all = max(self._all, total)

    def count(self, name: str) -> None:
        """Counts a record."""
        for total, found in self._found.items():
            found[shard_of(name, total)] += 1

    def missing(self, records: int) -> list[str]:
        """What is not there."""
        lines = list(self._warnings)
        if records >= self._all:
            return lines
        for total, planned in self._planned.items():
            found = self._found[total]
            absent = [number for number in range(1, total + 1) if number not in planned and not found[number]]
            if absent:
                named = ", ".join(f"{number}/{total}" for number in absent[:_NAMED])
                more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
                lines.append(f"no journal of shard {named}{more}")
            short = [number for number, pictures in planned.items() if found[number] < pictures]
            lines += [
                f"shard {number}/{total} is not done: {found[number]} of {planned[number]} pictures"
                for number in sorted(short)[:_NAMED]
            ]
            if len(short) > _NAMED:
                lines.append(f"{len(short) - _NAMED} more shards are not done")
        return lines


class _Files:
    """Reads lines of many journals, of which few are open at the same time."""

    def __init__(self, sources: Sequence[Path]) -> None:
        self._sources = sources
        self._open: dict[int, BinaryIO] = {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def line(self, entry: Entry) -> bytes:
        """The line of a record."""
        file = self._open.pop(entry.journal, None)
        if file is None:
            if len(self._open) >= _OPEN_JOURNALS:
                self._open.pop(next(iter(self._open))).close()
            file = self._sources[entry.journal].open("rb")
        self._open[entry.journal] = file
        file.seek(entry.start)
        line = file.read(entry.size)
        if len(line) != entry.size:
            raise ConfigError(f"{printable(self._sources[entry.journal])}: was changed meanwhile; merge again")
        return line.removeprefix(b"\xef\xbb\xbf").rstrip() + b"\n"


def _choose(lines: Sequence[bytes], merged: Merged) -> tuple[bytes, bool]:
    """Of several records about one picture, the one that counts, and whether it is an error."""
    records: list[Record] = [json.loads(line) for line in lines]
    best = len(records) - 1
    if "error" in records[best]:
        unread = records[best].get("sha256")
        answers = [number for number, record in enumerate(records) if "error" not in record]
        best = max((each for each in answers if unread in (None, records[each].get("sha256"))), default=best)
    chosen = records[best]
    merged.repeated += len(records) - 1
    same = [record for record in records if "error" not in record and record.get("sha256") == chosen.get("sha256")]
    merged.differing += any(_texts(record) != _texts(chosen) for record in same)
    for number, record in enumerate(records):
        if EMBEDDED in record and record in same and _texts(record) == _texts(chosen):
            best = number  # of the two it knows more: what the file holds now
    return lines[best], "error" in chosen


def _texts(record: Record) -> tuple[Any, Any]:
    return record.get("text"), record.get("answers")
