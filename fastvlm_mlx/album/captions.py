"""What journals of `fastvlm caption` say about pictures, so that an album need not ask again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.jobs.asking import Record
from fastvlm_mlx.jobs.journal import Journal
from fastvlm_mlx.jobs.task import CAPTION

_SHA256 = re.compile(r"[0-9a-f]{64}")
JOURNAL = "journal"
"""The source of texts that are taken from a journal of `fastvlm caption`."""
Texts = Mapping[str, Mapping[str, str]]
"""By the SHA-256 of a picture's file: what was said about it, by field."""


def read_journals(paths: Sequence[Path]) -> dict[str, dict[str, str]]:
    """What journals of `fastvlm caption` say about pictures; where several do, the last counts.

    Raises:
        ConfigError: If one cannot be read, or is something else.
    """
    texts: dict[str, dict[str, str]] = {}
    for path in paths:
        try:
            with Journal(path, read_only=True) as journal:
                for record in journal:
                    _take(record, texts)
        except OSError as err:
            raise ConfigError(f"{printable(path)}: cannot be read as captions ({err.strerror or err})") from err
    return texts


def _take(record: Record, texts: dict[str, dict[str, str]]) -> None:
    answers = record.get("answers")
    given = {CAPTION: record.get(CAPTION), **(answers if isinstance(answers, dict) else {})}
    said = {_valid(name): _valid(text) for name, text in given.items() if isinstance(text, str) and text.strip()}
    for name in ("sha256", "embedded_sha256"):
        sha256 = record.get(name)
        if said and isinstance(sha256, str) and _SHA256.fullmatch(sha256):
            texts.setdefault(sha256, {}).update(said)


def _valid(text: str) -> str:
    """A text without half characters, which a journal may hold but an index cannot."""
    return text.encode("utf-8", "replace").decode()
