"""What an index was made with, so that a later run makes it with the same."""

from __future__ import annotations

import json
from dataclasses import dataclass

from fastvlm_mlx.album.index import Index
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.inputs.resolution import check_resolution
from fastvlm_mlx.jobs.task import Task
from fastvlm_mlx.schema import parse_object

_FACT = "settings"


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """What an index was made with; None for what is not known.

    Attributes:
        model: The model's name.
        resolution: Side in pixels.
        background: Colour under transparent pixels.
        questions: What was asked about every picture, by field.
    """

    model: str | None = None
    resolution: int | None = None
    background: str | None = None
    questions: dict[str, str] | None = None


def known_settings(index: Index) -> IndexSettings:
    """What an index was made with; a new one knows nothing."""
    try:
        values = parse_object((index.fact(_FACT) or "{}").encode(), "the settings of the index")
        model, resolution, background, questions = map(values.get, ("model", "resolution", "background", "questions"))
        is_asked = isinstance(questions, dict) and all(isinstance(text, str) for text in questions.values())
        return IndexSettings(
            model=model if isinstance(model, str) else None,
            resolution=check_resolution(resolution) if isinstance(resolution, int) else None,
            background=background if isinstance(background, str) else None,
            questions=questions if is_asked else None,
        )
    except FastVLMError:
        return IndexSettings()


def note_settings(index: Index, task: Task) -> None:
    """Keeps what an index is made with."""
    values = {
        "resolution": task.resolution,
        "background": task.background,
        "questions": dict(task.questions),
        "model": task.model,
    }
    index.note(_FACT, json.dumps(values))
