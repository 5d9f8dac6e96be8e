"""Predictions that are kept: found again by what they depend on, not by names."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.generation.result import GenerationResult
from fastvlm_mlx.jobs.fingerprints import fingerprint
from fastvlm_mlx.jobs.journal import Journal

Notify = Callable[[str], None]
"""Called with a one-line message."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A model's answer to a question about an image.

    Attributes:
        text: The answer.
        prompt_tokens: Positions of the prompt; the image counts as its visual tokens.
        generated_tokens: Tokens of the answer, the end token included.
        finish_reason: `stop` or `length`.
    """

    text: str
    prompt_tokens: int
    generated_tokens: int
    finish_reason: str

    @classmethod
    def of(cls, result: GenerationResult) -> "Prediction":
        """Returns what is kept of an answer."""
        return cls(
            text=result.text,
            prompt_tokens=result.prompt_tokens,
            generated_tokens=result.generated_tokens,
            finish_reason=str(result.finish_reason),
        )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Prediction | None":
        """Returns the prediction in a record of a journal; None if it holds none."""
        kinds = {"text": str, "prompt_tokens": int, "generated_tokens": int, "finish_reason": str}
        if not all(isinstance(record.get(name), kind) for name, kind in kinds.items()):
            return None
        return cls(**{name: record[name] for name in kinds})


class Predictions:
    """The predictions of one model with one set of settings, kept in a journal of their own.

    If they cannot be kept, because another run writes the same journal or the disk is full, a note says so and the
    work goes on without.

    Args:
        folder: Where such journals are; made if it does not exist.
        settings: What every prediction depends on, as a JSON object.
        fresh: Whether to find none of earlier runs; new ones then take their place.
        notify: Called with a one-line message about damaged entries, and about predictions that cannot be kept.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], *, fresh: bool = False, notify: Notify | None = None
    ) -> None:
        self._settings = fingerprint(settings)
        self._fresh = fresh
        self._notify = notify
        self._journal: Journal | None = None
        self._new: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(folder / f"{self._settings}.jsonl", own=True, notify=notify)
        except (OSError, ConfigError) as err:
            self._give_up(err)

    def __enter__(self) -> "Predictions":
        return self

    def __exit__(self, *_: object) -> None:
        if self._journal is not None:
            try:
                self._journal.close()
            except OSError as err:
                self._give_up(err)

    def get(self, question: str, image: bytes) -> Prediction | None:
        """Returns the prediction of an earlier run for a question about an encoded image; None if there is none."""
        key = self._key(question, image)
        if self._journal is None or self._fresh or key in self._new:
            return None
        try:
            record = self._journal.get(key)
        except ConfigError as err:
            self._give_up(err)
            return None
        return Prediction.from_record(record) if record else None

    def add(self, question: str, image: bytes, prediction: Prediction) -> None:
        """Keeps a prediction; from then on it outlives the process."""
        if self._journal is None:
            return
        key = self._key(question, image)
        try:
            self._journal.add(key, asdict(prediction))
        except (OSError, ConfigError) as err:
            self._give_up(err)
        self._new.add(key)

    def _key(self, question: str, image: bytes) -> str:
        return fingerprint(self._settings, question, hashlib.sha256(image).hexdigest())

    def _give_up(self, err: OSError | ConfigError) -> None:
        self._journal = None
        if self._notify:
            reason = f"{err.strerror}: {err.filename}" if isinstance(err, OSError) and err.strerror else err
            self._notify(f"answers are not kept ({reason})")
