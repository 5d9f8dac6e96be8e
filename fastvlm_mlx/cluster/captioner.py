"""Captions in Ray Data: a class for `map_batches`, and a data set with captions."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.cluster.identity import Identity, Model, identity
from fastvlm_mlx.cluster.worker import limit_threads, load_engine
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import names, printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fastvlm_mlx.inputs.sources import Encoded
    from fastvlm_mlx.jobs.task import Task

    Batch = Mapping[str, NDArray[Any]]

IMAGES = ("bytes", "image", "jpg", "jpeg", "png", "webp")
"""The columns in which pictures are looked for: of binary files, of images and Parquet, of WebDataset."""
NAMES = ("path", "__key__", "file_name", "file", "id")
"""The columns in which their names are looked for."""
ADDED = ("file", "text", "error", "finish_reason", "generated_tokens", "record")
"""The columns that a batch gets, besides one for each further question."""


class Captioner:
    """Captions batches of pictures; the class for `ray.data.Dataset.map_batches`.

        dataset = ray.data.read_binary_files("s3://bucket/photos", include_paths=True)
        captioned = dataset.map_batches(
            Captioner,
            fn_constructor_kwargs=Captioner.arguments("apple/FastVLM-0.5B", prompt="Describe the image."),
            batch_size=32,
            concurrency=2,
            num_gpus=1,
        )
        captioned.write_parquet("captions")

    `caption_dataset` chooses the last three by what the machines of the cluster have. A batch loses the column with the
    pictures, and gets `file` (its name, or the SHA-256 of its bytes without one), `text`, a column for each further
    question, `error` (empty if there is none), `finish_reason`, `generated_tokens` and `record`: the line of JSON that
    `fastvlm caption` would write. Answers do not depend on the other pictures of a batch.

    Args:
        task: What is asked.
        model: What is loaded.
        expected: The identity that the machine has to have, from `Captioner.arguments`.
        cores: Of this actor, on a CPU.
        max_batch: The most pictures at a time; None for what suits the machine.
        column: The column with the pictures: encoded bytes, arrays, or Hugging Face's dict of bytes and path; None for
            the first of `IMAGES`.
        name: The column with their names; None for the first of `NAMES`.
        known: The beginnings of the fingerprints of records that exist, in order; their rows are left out.

    Raises:
        ConfigError: If this machine would answer in another way than the one that gives the work.
    """

    def __init__(
        self,
        task: Task,
        model: Model,
        expected: Identity,
        *,
        cores: int | None = None,
        max_batch: int | None = None,
        column: str | None = None,
        name: str | None = None,
        known: NDArray[np.uint64] | None = None,
    ) -> None:
        if cores is not None:
            limit_threads(cores)
        from fastvlm_mlx.jobs.asking import Asking

        self._asking = Asking(task)
        self._column, self._name, self._known = column, name, known
        self._engine = load_engine(model, expected, max_batch)

    @staticmethod
    def arguments(
        model: str,
        *,
        prompt: str | None = None,
        ask: Mapping[str, str] | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        max_tokens: int = 128,
        column: str | None = None,
        name: str | None = None,
        max_batch: int | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """The arguments of a `Captioner` whose machines all have to answer as this one would.

        Args:
            model: A Hub id, an alias, or a folder that all machines see.
            prompt: What to ask; None for a description, unless there is only `ask`.
            ask: Further questions, by the name of their column.
            revision: Branch, tag or commit of a Hub id.
            dtype: What to compute in; None for what suits this machine.
            max_tokens: Longest answer, in tokens.
            column: See the class.
            name: See the class.
            max_batch: See the class.
            settings: More of `fastvlm_mlx.jobs.task.Task`: `system`, `resolution`, `background`, `sentence`,
                `max_words`, `prefix`, `keep_openings`, `schema`.

        Raises:
            CheckpointError: If there is no such model.
        """
        from fastvlm_mlx.engine.options import GenerationConfig
        from fastvlm_mlx.inputs.prompts import DEFAULT_PROMPT
        from fastvlm_mlx.jobs.task import CAPTION, Task

        loaded = Model(model, revision, dtype).everywhere()
        expected = identity(loaded)
        questions = {} if ask and prompt is None else {CAPTION: DEFAULT_PROMPT if prompt is None else prompt}
        if taken := {*ADDED} & {*(ask or ())}:
            raise ConfigError(f"a question is called {names(sorted(taken))}, as a column that captions have already")
        task = Task(
            questions={**questions, **(ask or {})},
            model=model,
            weights=expected["weights"],
            dtype=expected["dtype"],
            config=GenerationConfig(max_tokens=max_tokens),
            **settings,
        )
        chosen = {"column": column, "name": name, "max_batch": max_batch}
        return {"task": task, "model": loaded, "expected": expected, **chosen}

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """A batch with captions in place of its pictures.

        Raises:
            ConfigError: If there is no column with pictures, or one has the name of a column to come.
        """
        column = self._column or _first(IMAGES, batch, "pictures")
        label = self._name or next((each for each in NAMES if each in batch), None)
        kept = [each for each in batch if each not in (column, "file")]
        fields = [each for each in self._asking.task.questions if each != "text"]
        if taken := {*ADDED, *fields} & {*kept}:
            raise ConfigError(f"the data set has {names(sorted(taken))} already; rename or drop it before")
        rows, works = [], []
        for row in range(len(batch[column])):
            given = None if label is None else batch[label][row]
            file, source = _source(batch[column][row], given)
            work = self._asking.look(file, source)
            if self._knows(work.key):
                continue
            if work.error is None:
                self._asking.ask(self._engine, work)
            rows.append(row)
            works.append(work)
        records = [self._asking.record(work, self._asking.outcome(work)) for work in works]
        added = [{"fingerprint": work.key, **record} for work, record in zip(works, records, strict=True)]
        return {
            **{each: batch[each][rows] for each in kept},
            "file": _texts(record["file"] for record in added),
            "text": _texts(record.get("text", "") for record in added),
            **{each: _texts(record.get("answers", {}).get(each, "") for record in added) for each in fields},
            "error": _texts(record.get("error", {}).get("message", "") for record in added),
            "finish_reason": _texts(record.get("finish_reason", "") for record in added),
            "generated_tokens": [record.get("generated_tokens", 0) for record in added],
            "record": _texts(json.dumps(record, ensure_ascii=False) for record in added),
        }

    def _knows(self, key: str) -> bool:
        if self._known is None or not len(self._known):
            return False
        short = short_key(key)
        place = int(self._known.searchsorted(short))
        return place < len(self._known) and int(self._known[place]) == short


def short_key(fingerprint: str) -> int:
    """The first 64 bits of a fingerprint, of which two alike are not to be expected among 100 million."""
    return int(fingerprint[:16], 16)


def caption_dataset(dataset: Any, model: str, *, cores: int | None = None, batch_size: int = 32, **options: Any) -> Any:
    """A Ray data set with captions in place of its pictures, made by all machines of the cluster.

    Before that, each machine is compared with this one. Nothing is asked until the data set is read or written.

    Args:
        dataset: A `ray.data.Dataset`, such as `ray.data.read_parquet(…)`.
        model: A Hub id, an alias, or a folder that all machines see.
        cores: Of each actor on a CPU; None for up to four.
        batch_size: Pictures in a batch.
        options: Those of `Captioner.arguments`.

    Raises:
        ConfigError: If Ray is not installed, or a machine would answer in another way.
        CheckpointError: If there is no such model.
    """
    arguments = Captioner.arguments(model, **options)
    return mapped(dataset, arguments, cores=cores, batch_size=batch_size)


def mapped(dataset: Any, arguments: Mapping[str, Any], *, cores: int | None, batch_size: int) -> Any:
    """The data set that a `Captioner` with `arguments` makes, with as many actors as the machines have room for."""
    from fastvlm_mlx.cluster.connection import ray_library
    from fastvlm_mlx.cluster.nodes import find_nodes, resources_of, share_out

    ray = ray_library()
    if not ray.is_initialized():
        ray.init()
    found = find_nodes(ray, arguments["model"], arguments["expected"])
    shares = share_out(found, resources_of(ray, found), cores)
    gpus = min(share.gpus for share in shares)
    # Actors that took all cores would leave none to the tasks that read the pictures for them.
    return dataset.map_batches(
        Captioner,
        fn_constructor_kwargs={**arguments, "cores": min(share.cores for share in shares)},
        batch_size=batch_size,
        concurrency=sum(share.workers for share in shares),
        num_gpus=gpus,
        scheduling_strategy="SPREAD",
        **({} if gpus else {"num_cpus": 0}),
    )


def _first(candidates: Sequence[str], batch: Batch, what: str) -> str:
    for each in candidates:
        if each in batch:
            return each
    raise ConfigError(f"the data set has no column with {what}; it has {names(sorted(batch))}, so name one of them")


def _source(value: Any, given: Any) -> tuple[str, Encoded]:
    """The name and the bytes of a picture in a batch."""
    from fastvlm_mlx.inputs.sources import Encoded

    if isinstance(value, dict):
        given = given if given is not None else value.get("path")
        value = value.get("bytes")
    data = value if isinstance(value, bytes) else _as_png(value)
    name = str(given) if given is not None else hashlib.sha256(data).hexdigest()
    return name, Encoded(data, printable(name))


def _as_png(value: Any) -> bytes:
    """An array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) as a file; nothing if that is no picture."""
    import numpy as np
    from PIL import Image

    array = np.asarray(value)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        return b""
    buffer = io.BytesIO()
    try:
        Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array).save(buffer, "PNG", compress_level=0)
    except (TypeError, ValueError, SystemError):
        return b""
    return buffer.getvalue()


def _texts(values: Any) -> NDArray[Any]:
    import numpy as np

    return np.array(list(values), dtype=object)
