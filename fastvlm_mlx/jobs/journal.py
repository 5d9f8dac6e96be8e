"""A journal of predictions on disk, with which an interrupted job continues where it stopped."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.jobs.questions import Question


class Predictions:
    """Predictions in a JSON Lines file, each written as soon as it is known.

    The first line holds what the predictions depend on. An incomplete last line is dropped.

    Args:
        path: The file; created if it does not exist.
        settings: What the predictions depend on, as a JSON object.

    Raises:
        ConfigError: If the file holds something else, or predictions with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._texts: dict[str, str] = {}
        header = json.dumps({"fastvlm_predictions": 1, **settings}, sort_keys=True)
        if path.exists():
            lines = path.read_text(encoding="utf-8").split("\n")
            if lines[0] != header:
                raise ConfigError(
                    f"{path}: holds no predictions of this model with these settings; delete it or name another file\n"
                    f"  expected {header}\n  found    {lines[0][:200]}"
                )
            complete = lines[1:-1]
            self._texts = {row["key"]: row["prediction"] for row in map(json.loads, complete)}
            path.write_text("".join(f"{line}\n" for line in [header, *complete]), encoding="utf-8")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{header}\n", encoding="utf-8")
        self._file: TextIO = path.open("a", encoding="utf-8")

    def __enter__(self) -> "Predictions":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, question: Question) -> str | None:
        """Returns the stored prediction for a question; None if there is none."""
        return self._texts.get(question.key)

    def add(self, question: Question, prediction: str) -> None:
        """Stores a prediction; it is on disk before this returns."""
        self._texts[question.key] = prediction
        self._file.write(json.dumps({"key": question.key, "prediction": prediction}, ensure_ascii=False) + "\n")
        self._file.flush()
