"""Captions many pictures: a record for each, in a journal with which a later run continues."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from fastvlm_mlx.errors import ConfigError, FastVLMError
from fastvlm_mlx.formatting import names, printable
from fastvlm_mlx.inputs.fragments import Part
from fastvlm_mlx.jobs.asking import PARSED, Answers, Asking, Record, Work
from fastvlm_mlx.jobs.files import stat_of
from fastvlm_mlx.jobs.fingerprints import fingerprint
from fastvlm_mlx.jobs.journal import FINGERPRINT, Journal
from fastvlm_mlx.jobs.parts import PartReader
from fastvlm_mlx.jobs.pictures import Picture
from fastvlm_mlx.jobs.shards import Names, Shard
from fastvlm_mlx.jobs.task import CAPTION, Task, essence

SHARD = "shard"
"""The field of the one record that says which part of the pictures a journal is for."""
EMBEDDED = "embedded_sha256"
"""The field of a record with the hash of a file into which its caption was written after it was asked about."""


class Plan(NamedTuple):
    """What is to do.

    Attributes:
        todo: The pictures without an answer.
        done: How many have one from an earlier run.
        failed: How many have an error from an earlier run, and are left out.
    """

    todo: list[Picture]
    done: int
    failed: int


class CaptionJob:
    """Asks the same about many pictures.

    Args:
        task: What is asked.
        journal: Where records are kept, and those of earlier runs are; None keeps none.
        parts: Reads the parts of films and PDFs.

    Raises:
        SchemaError: If captions cannot be made to follow the task's schema.
        ConfigError: If the journal holds only records with other settings, unless `mixed`. Once it holds some with
            these, the others are none of this job's business.
    """

    def __init__(
        self, task: Task, journal: Journal | None = None, *, mixed: bool = False, parts: PartReader | None = None
    ) -> None:
        self._asking = Asking(task)
        self._essence = self._asking.essence
        self._journal = journal
        self._parts = parts
        self._shares = not self._asking.fields
        self._known: dict[str, _Known] = {}
        self._seen: dict[str, str] = {}
        self._outcomes: dict[str, Record] = {}
        self._names = Names()
        self._fresh = False
        self._embed: Callable[[Picture, Record], str | None] | None = None
        other: Record | None = None
        for record in journal or ():
            if essence(record.get("settings")) != self._essence:
                other = record
            elif self._is_whole(record):
                self._remember(record)
        if journal is not None and other is not None and not self._known and not mixed:
            raise ConfigError(f"{printable(journal.path)}: {self._difference(other)}")

    def _difference(self, record: Record) -> str:
        """What sets a record of an earlier run apart."""
        settings = essence(record.get("settings"))
        keys = [key for key in {**settings, **self._essence} if settings.get(key) != self._essence.get(key)]
        return f"holds captions with other settings ({names(keys)}); name another file, or add to it with --force"

    def _is_whole(self, record: Record) -> bool:
        """Whether a record has all that is used of it; if somebody has changed it, its picture is asked about again."""
        error, answers = record.get("error"), record.get("answers", {})
        if not isinstance(record.get("file"), str) or not isinstance(answers, dict):
            return False
        if "error" in record:
            return isinstance(error, dict) and isinstance(error.get("message"), str)
        if self._asking.schema is not None and PARSED not in record:
            return False
        texts = {**answers, CAPTION: record.get(CAPTION)}
        return all(isinstance(texts.get(name), str) for name in self._asking.task.questions)

    def _remember(self, record: Record) -> None:
        version, failed = record.get("stat"), "error" in record
        stat = tuple(version) if isinstance(version, list) else ()
        self._known[str(record.get("file"))] = _Known(record[FINGERPRINT], stat, failed)
        if not failed and self._shares:
            for name in ("sha256", EMBEDDED):
                if isinstance(record.get(name), str):
                    self._seen[record[name]] = record[FINGERPRINT]

    def plan(
        self,
        pictures: Sequence[Picture],
        *,
        names: Names | None = None,
        retry_errors: bool = False,
        force: bool = False,
    ) -> Plan:
        """Finds the pictures that have no record yet, or one from before they were changed.

        Args:
            pictures: From `find_pictures`, all or those of a shard.
            names: What they are called in records; None if `pictures` are all there are.
            retry_errors: Whether to try those again that failed.
            force: Whether to ask about all of them again.
        """
        self._names = names or Names(pictures)
        if force or not self._known:
            return Plan(list(pictures), 0, 0)
        todo, done, failed = [], 0, 0
        for picture in pictures:
            known = self._known.get(self._names.of(picture))
            if known is None or (known.failed and retry_errors) or known.stat != stat_of(picture.path):
                todo.append(picture)
            elif known.failed:
                failed += 1
            else:
                done += 1
        return Plan(todo, done, failed)

    def record(self, picture: Picture) -> Record | None:
        """The record of a picture, of this run or an earlier one; None if there is none."""
        known = self._known.get(self._names.of(picture))
        return None if known is None else self._kept(known.fingerprint)

    def _kept(self, key: str) -> Record | None:
        return self._outcomes.get(key) if self._journal is None else self._journal.get(key)

    def keep_shard(self, shard: Shard, pictures: int, total: int) -> None:
        """Notes in the journal which part of the pictures it is for, so that missing parts can be named.

        Args:
            shard: The part.
            pictures: How many are in it.
            total: How many there are in all parts.
        """
        if self._journal is not None:
            key = fingerprint(self._essence, SHARD, str(shard))
            record = {SHARD: str(shard), "pictures": pictures, "of": total, "settings": self._asking.settings}
            if self._journal.get(key) != {FINGERPRINT: key, **record}:
                self._journal.add(key, record)

    def renew(self, picture: Picture, sha256: str) -> None:
        """Keeps the record of an earlier run for a picture into which its caption was written, which has changed it."""
        record = self.record(picture)
        if record is not None:
            changed = {**record, "stat": list(stat_of(picture.path)), EMBEDDED: sha256}
            self._keep(changed.pop(FINGERPRINT), changed)
            self._remember({FINGERPRINT: record[FINGERPRINT], **changed})

    def run(
        self,
        engine: Answers,
        pictures: Iterable[Picture],
        *,
        fresh: bool = False,
        embed: Callable[[Picture, Record], str | None] | None = None,
    ) -> Iterator[tuple[Picture, Record]]:
        """Asks about pictures, several at a time; yields each with its record, in order, after keeping that.

        Pictures with the same content are asked about once, those of earlier runs included unless `fresh`. What a
        picture fails for is its record's `error`, and the others go on. If this ends early, another call may ask about
        the pictures that were not yielded.

        Args:
            engine: Answers.
            pictures: From `plan`.
            fresh: Whether to ask about what is known, too.
            embed: Called with each record before it is kept; returns the SHA-256 of the picture's file if it has
                written the caption into that.
        """
        self._embed, self._fresh = embed, fresh
        if fresh:
            self._seen.clear()
        queue: deque[_Work] = deque()
        try:
            for picture in pictures:
                queue.append(self._begin(engine, picture))
                while queue and queue[0].is_ready:
                    yield self._finish(engine, queue)
            while queue:
                yield self._finish(engine, queue)
        finally:
            for work in queue:
                self._abandon(work)

    def _abandon(self, work: "_Work") -> None:
        """Cancels the questions about a picture, and forgets that its content was asked about."""
        looked = work.looked
        looked.cancel()
        if looked.sha256 is not None and work.same is None and self._seen.get(looked.sha256) == looked.key:
            del self._seen[looked.sha256]

    def _begin(self, engine: Answers, picture: Picture) -> "_Work":
        """Looks at a picture, and asks about it unless its content has an answer."""
        load = partial(self._parts.read, picture) if picture.kind and self._parts else None
        looked = self._asking.look(self._names.of(picture), picture.path, load)
        work = _Work(picture=picture, looked=looked)
        if looked.sha256 is None:
            return work
        work.same = self._seen.get(looked.sha256) or self._known_key(looked.key)
        if work.same is not None:
            return work
        if self._shares:
            self._seen[looked.sha256] = looked.key
        if looked.error is None:
            self._asking.ask(engine, looked)
        return work

    def _known_key(self, key: str) -> str | None:
        """The fingerprint, if an earlier run has an answer under it: perhaps of another machine, with other times."""
        known = None if self._fresh else self._kept(key)
        return None if known is None or "error" in known or not self._is_whole(known) else key

    def _finish(self, engine: Answers, queue: "deque[_Work]") -> tuple[Picture, Record]:
        """Waits for the answers about the first picture of a queue, keeps its record, and takes it out."""
        work = queue[0]
        looked = work.looked
        outcome = self._outcome(engine, work)
        record = self._asking.record(looked, {**_which(work.picture.part), **outcome})
        embedded = self._embed(work.picture, record) if self._embed is not None else None
        if embedded is not None:
            looked.stat = stat_of(work.picture.path)
            record |= {"stat": list(looked.stat), EMBEDDED: embedded}
            if self._shares:
                self._seen[embedded] = looked.key
        self._keep(looked.key, record)
        self._known[looked.name] = _Known(looked.key, looked.stat, "error" in outcome)
        queue.popleft()
        return work.picture, {FINGERPRINT: looked.key, **record}

    def _keep(self, key: str, record: Record) -> None:
        if self._journal is not None:
            self._journal.add(key, record)
        else:
            self._outcomes[key] = record

    def _outcome(self, engine: Answers, work: "_Work") -> Record:
        """The answers about a picture or its error, after waiting, or a copy of what is known about its content."""
        looked = work.looked
        if work.same is not None and looked.error is None:
            try:
                copied = self._copied(work.same, looked.name)
                if "error" not in copied:
                    return copied
                self._asking.ask(engine, looked)  # what failed for the other one fails for this one, with its own name
            except FastVLMError as err:
                looked.error = err
        return self._asking.outcome(looked)

    def _copied(self, key: str, name: str) -> Record:
        """What was found about the same content, for a picture called `name`."""
        known = self._kept(key)
        if known is None:
            raise ConfigError("a picture with the same content has no record; run the command again")
        own = (FINGERPRINT, "file", "time", "page", "sha256", EMBEDDED, "stat", "settings", "seconds", "duplicate_of")
        outcome = {field: value for field, value in known.items() if field not in own}
        first = known.get("duplicate_of", known["file"])
        return outcome if first == name else {**outcome, "duplicate_of": first}


def _which(part: Part | None) -> Record:
    """The fields that say which part of a film or PDF a record is about."""
    fields = {} if part is None else {"time": part.time, "page": part.page}
    return {name: value for name, value in fields.items() if value is not None}


class _Known(NamedTuple):
    """What an earlier run has found about a file."""

    fingerprint: str
    stat: tuple[int, ...]
    failed: bool


@dataclass(kw_only=True, eq=False)
class _Work:
    """A picture on its way.

    Attributes:
        picture: The picture.
        looked: What was found when it was looked at, and its questions.
        same: The fingerprint of an earlier record about this content; None if there is none.
    """

    picture: Picture
    looked: Work
    same: str | None = None

    @property
    def is_ready(self) -> bool:
        """Whether its record can be made without waiting."""
        return self.looked.is_ready
