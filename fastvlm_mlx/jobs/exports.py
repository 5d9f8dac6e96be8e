"""Captions where other programs look for them: beside the pictures, and as data sets."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.jobs.caption import CAPTION, Record
from fastvlm_mlx.jobs.datasets import WebDataset, write_csv, write_metadata
from fastvlm_mlx.jobs.pictures import Picture
from fastvlm_mlx.jobs.sidecars import Habit, Outcome, shared_names, write_text, write_xmp

READ_ONLY = "in a Photos library or on the web"
SHARED = "of two pictures with one name"


@dataclass(frozen=True, kw_only=True)
class Exports:
    """Which outputs are wanted besides the journal.

    Attributes:
        txt: `photo.txt` beside each picture.
        xmp: An XMP sidecar beside each picture.
        xmp_name: How it is called; None for the name that is there already.
        csv: A table.
        hf: `metadata.jsonl` in each folder that was named.
        webdataset: The beginning of the paths of tar files.
        overwrite: Whether texts of people are replaced.
    """

    txt: bool = False
    xmp: bool = False
    xmp_name: Habit | None = None
    csv: Path | None = None
    hf: bool = False
    webdataset: Path | None = None
    overwrite: bool = False

    @property
    def need_a_caption(self) -> bool:
        """Whether one of them has a place for the caption alone."""
        return self.txt or self.xmp or self.hf or self.webdataset is not None


class Exporter:
    """Writes the outputs.

    Args:
        exports: Which.
        pictures: All pictures of the job.
        fields: The names of the questions, in the order of columns.
        generator: The program and the model, for sidecars.

    Attributes:
        pictures: All pictures of the job.
        left_out: How many texts were not written, by reason.
    """

    def __init__(self, exports: Exports, pictures: Sequence[Picture], *, fields: Sequence[str], generator: str) -> None:
        self.exports = exports
        self.pictures = pictures
        self._fields = fields
        self._generator = generator
        self._shared = shared_names(picture.path for picture in pictures) if exports.txt or exports.xmp else set()
        self.left_out: Counter[str] = Counter()

    def write_beside(self, picture: Picture, record: Record, earlier: Record | None = None) -> None:
        """Writes the sidecars of a picture; `earlier` is its record before this run.

        A sidecar that cannot be written is counted, and the job goes on.
        """
        if "error" in record or not (self.exports.txt or self.exports.xmp):
            return
        if picture.read_only:
            self.left_out[READ_ONLY] += 1
            return
        shared = picture.path in self._shared
        try:
            if self.exports.txt and shared:
                self.left_out[SHARED] += 1
            elif self.exports.txt:
                own = [text for text in ((earlier or {}).get(CAPTION),) if isinstance(text, str)]
                self._count(write_text(picture.path, record[CAPTION], own=own, overwrite=self.exports.overwrite))
            if self.exports.xmp:
                habit: Habit | None = "ext" if shared else self.exports.xmp_name
                self._count(
                    write_xmp(
                        picture.path,
                        record[CAPTION],
                        generator=self._generator,
                        habit=habit,
                        overwrite=self.exports.overwrite,
                    )
                )
        except FastVLMError as err:
            self.left_out[str(err)] += 1

    def _count(self, outcome: Outcome) -> None:
        if outcome is Outcome.KEPT:
            self.left_out["where somebody else's text is; --overwrite replaces it"] += 1

    def write_data_sets(self, record_of: Callable[[Picture], Record | None]) -> None:
        """Writes the tables and data sets of all pictures that have a record.

        Args:
            record_of: Returns the record of a picture, or None.

        Raises:
            ConfigError: If one cannot be written, or would take the place of somebody else's file.
        """
        if self.exports.csv is not None:
            columns = ["file", *self._fields, "width", "height", "finish_reason", "error"]
            write_csv(self.exports.csv, columns, (_row(record) for _, record in self._records(record_of)))
        if self.exports.hf:
            rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
            for picture, record in self._records(record_of):
                if "error" in record:
                    continue
                if picture.path.startswith(("http://", "https://")):
                    self.left_out[READ_ONLY] += 1
                else:
                    rows[picture.root].append({"file_name": picture.name, **_answers(record)})
            for root, lines in rows.items():
                left_out = write_metadata(Path(root or "."), lines)
                if left_out:
                    self.left_out["that metadata.jsonl has from somebody else, or whose name is not UTF-8"] += left_out
        if self.exports.webdataset is not None:
            with WebDataset(self.exports.webdataset) as dataset:
                for picture, record in self._records(record_of):
                    if "error" in record:
                        continue
                    try:
                        dataset.add(picture.path, {"file": picture.name, **_answers(record)})
                    except OSError as err:
                        self.left_out[f"that cannot be read ({err.strerror or err})"] += 1

    def _records(self, record_of: Callable[[Picture], Record | None]) -> Iterable[tuple[Picture, Record]]:
        for picture in self.pictures:
            record = record_of(picture)
            if record is not None:
                yield picture, record


def _answers(record: Record) -> dict[str, Any]:
    """The texts of a record by field."""
    answers: Mapping[str, str] = record.get("answers", {})
    return {**({CAPTION: record[CAPTION]} if CAPTION in record else {}), **answers}


def _row(record: Record) -> dict[str, Any]:
    """A record as a row of a table."""
    error = record.get("error")
    return {**record, **_answers(record), "error": error["message"] if error else ""}
