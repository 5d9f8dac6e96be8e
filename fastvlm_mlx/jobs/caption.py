"""Captions many pictures: a record for each, in a journal with which a later run continues."""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

from fastvlm_mlx.errors import ConfigError, FastVLMError, ImageError
from fastvlm_mlx.formatting import names, printable
from fastvlm_mlx.generation.request import Handle, Request
from fastvlm_mlx.generation.result import GenerationResult
from fastvlm_mlx.generation.words import first_words
from fastvlm_mlx.inputs.sources import Encoded, read
from fastvlm_mlx.jobs.captions import PromptTemplate, exif_values, opening_length, path_values, remove_opening
from fastvlm_mlx.jobs.files import SharedPixels, size_of, stat_of
from fastvlm_mlx.jobs.fingerprints import fingerprint
from fastvlm_mlx.jobs.journal import FINGERPRINT, Journal
from fastvlm_mlx.jobs.pictures import Picture
from fastvlm_mlx.jobs.sidecars import read_sidecars
from fastvlm_mlx.jobs.task import CAPTION, Task, essence
from fastvlm_mlx.structured.schemas import Schema

EMBEDDED = "embedded_sha256"
"""The field of a record with the hash of a file into which its caption was written after it was asked about."""
Record = dict[str, Any]
"""What is known of a picture: `file`, and either the answers with their statistics or an `error`."""


PARSED = "parsed"
"""The field of a record with the value of a caption that is JSON."""


class Answers(Protocol):
    """What answers requests: an `Engine`, or one that asks somebody else."""

    @property
    def processor(self) -> Any:
        """Prepares pictures once for several questions; None if whoever answers reads them."""

    def submit(self, request: Request) -> Handle:
        """Asks a question, after waiting for room."""


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

    Raises:
        SchemaError: If captions cannot be made to follow the task's schema.
        ConfigError: If the journal holds only records with other settings, unless `mixed`. Once it holds some with
            these, the others are none of this job's business.
    """

    def __init__(self, task: Task, journal: Journal | None = None, *, mixed: bool = False) -> None:
        self._task = task
        self._schema = Schema.of(task.schema)
        self._settings = task.settings
        self._essence = essence(self._settings)
        self._templates = {name: PromptTemplate(text) for name, text in task.questions.items()}
        self._journal = journal
        self._shares = not any(template.fields for template in self._templates.values())
        self._known: dict[str, _Known] = {}
        self._seen: dict[str, str] = {}
        self._outcomes: dict[str, Record] = {}
        self._ambiguous: set[str] = set()
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
        if self._schema is not None and PARSED not in record:
            return False
        texts = {**answers, CAPTION: record.get(CAPTION)}
        return all(isinstance(texts.get(name), str) for name in self._task.questions)

    def _remember(self, record: Record) -> None:
        version, failed = record.get("stat"), "error" in record
        stat = tuple(version) if isinstance(version, list) else ()
        self._known[str(record.get("file"))] = _Known(record[FINGERPRINT], stat, failed)
        if not failed and self._shares:
            for name in ("sha256", EMBEDDED):
                if isinstance(record.get(name), str):
                    self._seen[record[name]] = record[FINGERPRINT]

    def plan(self, pictures: Sequence[Picture], *, retry_errors: bool = False, force: bool = False) -> Plan:
        """Finds the pictures that have no record yet, or one from before they were changed.

        Args:
            pictures: From `find_pictures`.
            retry_errors: Whether to try those again that failed.
            force: Whether to ask about all of them again.
        """
        counts = Counter(picture.name for picture in pictures)
        self._ambiguous = {name for name, count in counts.items() if count > 1}
        if force or not self._known:
            return Plan(list(pictures), 0, 0)
        todo, done, failed = [], 0, 0
        for picture in pictures:
            known = self._known.get(self._name(picture))
            if known is None or (known.failed and retry_errors) or known.stat != stat_of(picture.path):
                todo.append(picture)
            elif known.failed:
                failed += 1
            else:
                done += 1
        return Plan(todo, done, failed)

    def record(self, picture: Picture) -> Record | None:
        """The record of a picture, of this run or an earlier one; None if there is none."""
        known = self._known.get(self._name(picture))
        return None if known is None else self._kept(known.fingerprint)

    def _name(self, picture: Picture) -> str:
        """What a picture is called in records: its path below the folder, or the whole one if folders share names."""
        return picture.path if picture.name in self._ambiguous else picture.name

    def _kept(self, key: str) -> Record | None:
        return self._outcomes.get(key) if self._journal is None else self._journal.get(key)

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
        self._embed = embed
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
        for handle in work.handles.values():
            handle.cancel()
        if work.sha256 is not None and work.same is None and self._seen.get(work.sha256) == work.key:
            del self._seen[work.sha256]

    def _begin(self, engine: Answers, picture: Picture) -> "_Work":
        """Looks at a picture, and asks about it unless its content has an answer."""
        work = _Work(picture=picture, stat=stat_of(picture.path))
        try:
            encoded = read(picture.path)
            work.sha256 = hashlib.sha256(encoded.data).hexdigest()
            work.key = fingerprint(self._essence, self._name(picture), work.sha256)
            work.same = self._seen.get(work.sha256)
            if work.same is not None:
                return work
            if self._shares:
                self._seen[work.sha256] = work.key
            work.size = size_of(encoded)
            values = self._values(picture, encoded)
        except FastVLMError as err:
            work.error = err
        else:
            self._ask(engine, work, values)
        return work

    def _ask(self, engine: Answers, work: "_Work", values: Mapping[str, str]) -> None:
        """Submits the questions about a picture, which is read once for all of them."""
        task, path = self._task, work.picture.path
        source: Any = path
        if len(self._templates) > 1 and (processor := engine.processor) is not None:
            source = SharedPixels(
                partial(processor.prepare_images, [path], task.resolution, background=task.background)
            )
        for name, template in self._templates.items():
            request = Request(
                image=source,
                prompt=template.render(values),
                system=task.system,
                resolution=task.resolution,
                background=task.background,
                config=task.config,
                sentence=task.sentence,
                max_words=task.max_words,
                prefix=task.prefix if name == CAPTION else "",
                schema=self._schema if name == CAPTION else None,
                opening=opening_length if name == CAPTION and task.removes_openings else None,
            )
            work.handles[name] = engine.submit(request)

    def _values(self, picture: Picture, encoded: Encoded) -> dict[str, str]:
        """What the placeholders of the prompts stand for."""
        fields = {field for template in self._templates.values() for field in template.fields}
        values = path_values(picture.path)
        if fields & {"date", "camera", "gps"}:
            values |= exif_values(encoded.data)
        if fields & {"existing", "tags"}:
            beside = read_sidecars(picture.path)
            values |= {"existing": "" if beside.is_own else beside.description, "tags": ", ".join(beside.tags)}
        return values

    def _finish(self, engine: Answers, queue: "deque[_Work]") -> tuple[Picture, Record]:
        """Waits for the answers about the first picture of a queue, keeps its record, and takes it out."""
        work = queue[0]
        try:
            outcome = self._outcome(engine, work)
        except FastVLMError as err:
            outcome = {"error": {"type": type(err).__name__, "message": str(err)}}
        except MemoryError:
            message = f"{printable(work.picture.path)}: there is not enough memory for this picture; reduce it"
            outcome = {"error": {"type": ImageError.__name__, "message": message}}
        name = self._name(work.picture)
        work.key = work.key or fingerprint(self._essence, name)
        record = {
            "file": name,
            **outcome,
            "sha256": work.sha256,
            "stat": list(work.stat),
            "settings": self._settings,
        }
        embedded = self._embed(work.picture, record) if self._embed is not None else None
        if embedded is not None:
            work.stat = stat_of(work.picture.path)
            record |= {"stat": list(work.stat), EMBEDDED: embedded}
            if self._shares:
                self._seen[embedded] = work.key
        self._keep(work.key, record)
        self._known[name] = _Known(work.key, work.stat, "error" in outcome)
        queue.popleft()
        return work.picture, {FINGERPRINT: work.key, **record}

    def _keep(self, key: str, record: Record) -> None:
        if self._journal is not None:
            self._journal.add(key, record)
        else:
            self._outcomes[key] = record

    def _outcome(self, engine: Answers, work: "_Work") -> Record:
        """The answers about a picture, with their statistics.

        Raises:
            FastVLMError: If there are none.
        """
        if work.error is not None:
            raise work.error
        if work.same is not None:
            copied = self._copied(work.same, self._name(work.picture))
            if "error" not in copied:
                return copied
            self._ask(engine, work, {})  # what failed for the other one fails for this one, with its own name
        results = {name: handle.result() for name, handle in work.handles.items()}
        if stat_of(work.picture.path) != work.stat:
            raise ImageError(f"{printable(work.picture.path)}: changed while it was read; run the command again")
        parsed = self._parsed(work, results)
        texts = {name: result.text.strip() for name, result in results.items()}
        if self._task.removes_openings and CAPTION in texts:
            texts[CAPTION] = remove_opening(texts[CAPTION])
            if self._task.max_words is not None:
                texts[CAPTION] = first_words(texts[CAPTION], self._task.max_words)
        answers = {name: text for name, text in texts.items() if name != CAPTION}
        size = dict(zip(("width", "height"), work.size or (), strict=False))
        return {
            **({CAPTION: texts[CAPTION]} if CAPTION in texts else {}),
            **parsed,
            **({"answers": answers} if answers else {}),
            **size,
            "prompt_tokens": sum(result.prompt_tokens for result in results.values()),
            "generated_tokens": sum(result.generated_tokens for result in results.values()),
            "finish_reason": max((str(result.finish_reason) for result in results.values()), key="stop length".index),
            "seconds": round(sum(result.timings.total - result.timings.queue for result in results.values()), 3),
        }

    def _parsed(self, work: "_Work", results: Mapping[str, GenerationResult]) -> Record:
        """The value of a caption that is JSON, as a field of the record; no field if there is no schema.

        Raises:
            ConfigError: If the caption was cut.
        """
        caption = results.get(CAPTION)
        if self._schema is None or caption is None:
            return {}
        if caption.finish_reason != "stop" or caption.stop_string is not None:
            cut = f"the answer was cut after {caption.generated_tokens} tokens, so it is no JSON"
            raise ConfigError(f"{printable(work.picture.path)}: {cut}; allow more, or bound the schema")
        return {PARSED: json.loads(caption.text)}

    def _copied(self, key: str, name: str) -> Record:
        """What was found about the same content, for a picture called `name`."""
        known = self._kept(key)
        if known is None:
            raise ConfigError("a picture with the same content has no record; run the command again")
        left_out = (FINGERPRINT, "file", "sha256", EMBEDDED, "stat", "settings", "seconds", "duplicate_of")
        outcome = {field: value for field, value in known.items() if field not in left_out}
        first = known.get("duplicate_of", known["file"])
        return outcome if first == name else {**outcome, "duplicate_of": first}


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
        stat: Of its file, when it was looked at.
        sha256: Of its file.
        key: The fingerprint of its record.
        same: The fingerprint of an earlier record about this content; None if there is none.
        size: Width and height in pixels, as stored.
        error: Why it cannot be asked about.
        handles: The questions that were asked, by name.
    """

    picture: Picture
    stat: tuple[int, ...]
    sha256: str | None = None
    key: str = ""
    same: str | None = None
    size: tuple[int, int] | None = None
    error: FastVLMError | None = None
    handles: dict[str, Handle] = field(default_factory=dict)

    @property
    def is_ready(self) -> bool:
        """Whether its record can be made without waiting."""
        return all(handle.done for handle in self.handles.values())
