"""Asks what a task says about pictures, and makes records of the answers; keeps none of them."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from fastvlm_mlx.errors import ConfigError, FastVLMError, ImageError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.generation.request import Handle, Request
from fastvlm_mlx.generation.result import GenerationResult
from fastvlm_mlx.generation.words import first_words
from fastvlm_mlx.inputs.sources import Encoded, read
from fastvlm_mlx.jobs.captions import PromptTemplate, exif_values, opening_length, path_values, remove_opening
from fastvlm_mlx.jobs.files import SharedPixels, size_of, stat_of
from fastvlm_mlx.jobs.fingerprints import fingerprint
from fastvlm_mlx.jobs.journal import FINGERPRINT
from fastvlm_mlx.jobs.sidecars import read_sidecars
from fastvlm_mlx.jobs.task import CAPTION, Task, essence
from fastvlm_mlx.structured.schemas import Schema

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


@dataclass(kw_only=True, eq=False)
class Work:
    """A picture on its way.

    Attributes:
        name: What its record calls it.
        source: Its path or http(s) URL, or its bytes.
        stat: Of its file, when it was looked at; empty if it is no file here.
        sha256: Of its bytes.
        key: The fingerprint of its record.
        size: Width and height in pixels, as stored.
        values: What the placeholders of the prompts stand for.
        error: Why it cannot be asked about.
        handles: The questions that were asked, by name.
    """

    name: str
    source: str | Encoded
    stat: tuple[int, ...] = ()
    sha256: str | None = None
    key: str = ""
    size: tuple[int, int] | None = None
    values: Mapping[str, str] = field(default_factory=dict)
    error: FastVLMError | None = None
    handles: dict[str, Handle] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where it is, or what its bytes are called."""
        return self.source.name if isinstance(self.source, Encoded) else self.source

    @property
    def is_ready(self) -> bool:
        """Whether its record can be made without waiting."""
        return all(handle.done for handle in self.handles.values())

    def cancel(self) -> None:
        """Cancels what was asked."""
        for handle in self.handles.values():
            handle.cancel()


class Asking:
    """Asks what a task says about one picture after another.

        with Engine(*load("demo")) as engine:
            for record in Asking(task).records(engine, [("1.jpg", Encoded(data, "1.jpg")), ("2.jpg", "photos/2.jpg")]):
                print(record["file"], record.get("text") or record["error"]["message"])

    Args:
        task: What is asked.

    Attributes:
        task: What is asked.
        schema: That captions have to follow; None for none.
        settings: In every record, see `Task.settings`.
        essence: What of them tells its records from those of other tasks.
        fields: The placeholders that its prompts have.

    Raises:
        SchemaError: If captions cannot be made to follow the task's schema.
        PromptError: If a prompt has an unknown placeholder.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.schema = Schema.of(task.schema)
        self.settings = task.settings
        self.essence = essence(self.settings)
        self._templates = {name: PromptTemplate(text) for name, text in task.questions.items()}
        self.fields = frozenset(field for template in self._templates.values() for field in template.fields)

    def records(self, engine: Answers, pictures: Iterable[tuple[str, str | Encoded]]) -> Iterator[Record]:
        """Yields the record of each picture with its fingerprint, in order; several are asked about at a time.

        Args:
            engine: Answers.
            pictures: Of each its name in the record, and its path or bytes.
        """
        queue: deque[Work] = deque()
        try:
            for name, source in pictures:
                work = self.look(name, source)
                if work.error is None:
                    self.ask(engine, work)
                queue.append(work)
                while queue and queue[0].is_ready:
                    yield self._next(queue)
            while queue:
                yield self._next(queue)
        finally:
            for work in queue:
                work.cancel()

    def _next(self, queue: "deque[Work]") -> Record:
        work = queue[0]
        record = self.record(work, self.outcome(work))
        queue.popleft()
        return {FINGERPRINT: work.key, **record}

    def look(self, name: str, source: str | Encoded, load: Callable[[], Encoded] | None = None) -> Work:
        """Reads a picture, without asking about it; what is wrong with it is the `error` of the result.

        Args:
            name: In its record.
            source: Its path or http(s) URL, or its bytes.
            load: Reads it from the file at `source`, if that holds more than this picture.
        """
        work = Work(name=name, source=source, stat=() if isinstance(source, Encoded) else stat_of(source))
        try:
            encoded = read(source) if load is None else load()
            if load is not None:
                work.source = encoded
            work.sha256 = hashlib.sha256(encoded.data).hexdigest()
            work.size = size_of(encoded)
            work.values = self._values(work, encoded)
        except FastVLMError as err:
            work.error = err
        work.key = fingerprint(self.essence, name, *(() if work.sha256 is None else (work.sha256,)))
        return work

    def ask(self, engine: Answers, work: Work) -> None:
        """Submits the questions about a picture, which is read once for all of them."""
        task, source = self.task, work.source
        image: Any = [source] if isinstance(source, Encoded) else source
        if len(self._templates) > 1 and (processor := engine.processor) is not None:
            image = SharedPixels(
                partial(processor.prepare_images, [source], task.resolution, background=task.background)
            )
        for name, template in self._templates.items():
            request = Request(
                image=image,
                prompt=template.render(work.values),
                system=task.system,
                resolution=task.resolution,
                background=task.background,
                config=task.config,
                sentence=task.sentence,
                max_words=task.max_words,
                prefix=task.prefix if name == CAPTION else "",
                schema=self.schema if name == CAPTION else None,
                opening=opening_length if name == CAPTION and task.removes_openings else None,
            )
            work.handles[name] = engine.submit(request)

    def _values(self, work: Work, encoded: Encoded) -> dict[str, str]:
        """What the placeholders of the prompts stand for."""
        values = path_values(work.place)
        if self.fields & {"date", "camera", "gps"}:
            values |= exif_values(encoded.data)
        if self.fields & {"existing", "tags"} and not isinstance(work.source, Encoded):
            beside = read_sidecars(work.source)
            values |= {"existing": "" if beside.is_own else beside.description, "tags": ", ".join(beside.tags)}
        return values

    def outcome(self, work: Work) -> Record:
        """The answers about a picture with their statistics, after waiting for them, or the `error`."""
        try:
            return self.answers(work)
        except FastVLMError as err:
            return {"error": {"type": type(err).__name__, "message": str(err)}}
        except MemoryError:
            message = f"{printable(work.place)}: there is not enough memory for this picture; reduce it"
            return {"error": {"type": ImageError.__name__, "message": message}}

    def answers(self, work: Work) -> Record:
        """The answers about a picture with their statistics, after waiting for them.

        Raises:
            FastVLMError: If there are none.
        """
        if work.error is not None:
            raise work.error
        results = {name: handle.result() for name, handle in work.handles.items()}
        if isinstance(work.source, str) and stat_of(work.source) != work.stat:
            raise ImageError(f"{printable(work.source)}: changed while it was read; run the command again")
        parsed = self._parsed(work, results)
        texts = {name: result.text.strip() for name, result in results.items()}
        if self.task.removes_openings and CAPTION in texts:
            texts[CAPTION] = remove_opening(texts[CAPTION])
            if self.task.max_words is not None:
                texts[CAPTION] = first_words(texts[CAPTION], self.task.max_words)
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

    def _parsed(self, work: Work, results: Mapping[str, GenerationResult]) -> Record:
        """The value of a caption that is JSON, as a field of the record; no field if there is no schema.

        Raises:
            ConfigError: If the caption was cut.
        """
        caption = results.get(CAPTION)
        if self.schema is None or caption is None:
            return {}
        if caption.finish_reason != "stop" or caption.stop_string is not None:
            cut = f"the answer was cut after {caption.generated_tokens} tokens, so it is no JSON"
            raise ConfigError(f"{printable(work.place)}: {cut}; allow more, or bound the schema")
        return {PARSED: json.loads(caption.text)}

    def record(self, work: Work, outcome: Record) -> Record:
        """The record of a picture, without its fingerprint."""
        return {
            "file": work.name,
            **outcome,
            "sha256": work.sha256,
            "stat": list(work.stat),
            "settings": self.settings,
        }
