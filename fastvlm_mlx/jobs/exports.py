"""Captions where other programs look for them: beside the pictures, and as data sets."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.jobs.asking import Record
from fastvlm_mlx.jobs.datasets import WebDataset, check_csv, check_metadata, write_csv, write_metadata
from fastvlm_mlx.jobs.embedded import NotEmbeddedError, embed
from fastvlm_mlx.jobs.kinds import in_library
from fastvlm_mlx.jobs.pictures import Picture
from fastvlm_mlx.jobs.sidecars import Habit, Outcome, shared_names, write_text, write_xmp
from fastvlm_mlx.jobs.task import CAPTION

READ_ONLY = "in a Photos library or on the web"
PART = "of the parts of a film or PDF"
SHARED = "of two pictures with one name"
KEPT = "where somebody else's text is; --overwrite replaces it"


@dataclass(frozen=True, kw_only=True)
class Exports:
    """Which outputs are wanted besides the journal.

    Attributes:
        txt: `photo.txt` beside each picture.
        xmp: An XMP sidecar beside each picture.
        xmp_name: How it is called; None for the name that is there already.
        embed: In the pictures themselves.
        csv: A table.
        hf: `metadata.jsonl` in each folder that was named.
        webdataset: The beginning of the paths of tar files.
        overwrite: Whether texts of people are replaced.
    """

    txt: bool = False
    xmp: bool = False
    xmp_name: Habit | None = None
    embed: bool = False
    csv: Path | None = None
    hf: bool = False
    webdataset: Path | None = None
    overwrite: bool = False

    @property
    def need_a_caption(self) -> bool:
        """Whether one of them has a place for the caption alone."""
        return self.txt or self.xmp or self.embed or self.hf or self.webdataset is not None

    @property
    def for_all(self) -> list[str]:
        """The options of those that are files with all pictures in them."""
        given = {"--csv": self.csv is not None, "--hf": self.hf, "--webdataset": self.webdataset is not None}
        return [name for name, wanted in given.items() if wanted]


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
        failures: Why texts could not be written: a file, and what happened to it.
    """

    def __init__(self, exports: Exports, pictures: Sequence[Picture], *, fields: Sequence[str], generator: str) -> None:
        self.exports = exports
        self.pictures = pictures
        self._columns = columns(fields)
        self._generator = generator
        files = [picture.path for picture in pictures if picture.part is None]
        self._shared = shared_names(files) if exports.txt or exports.xmp else set()
        self.left_out: Counter[str] = Counter()
        self.failures: list[str] = []

    def check(self) -> None:
        """Finds out before the work whether the tables and data sets can be written, and changes nothing.

        Raises:
            ConfigError: If one cannot, or would take the place of somebody else's file.
        """
        if self.exports.csv is not None:
            check_csv(self.exports.csv, self._columns)
        if self.exports.hf:
            for root in {picture.root for picture in self.pictures if _has_place(picture)}:
                check_metadata(Path(root or "."))
        if self.exports.webdataset is not None:
            WebDataset(self.exports.webdataset)

    def write_beside(self, picture: Picture, record: Record, earlier: Record | None = None) -> None:
        """Writes the sidecars of a picture; `earlier` is its record before this run.

        The job goes on if one cannot be written.
        """
        if "error" in record or not (self.exports.txt or self.exports.xmp):
            return
        if picture.part is not None:
            self.left_out[PART] += 1
            return
        if picture.read_only:
            self.left_out[READ_ONLY] += 1
            return
        caption, overwrite = record[CAPTION], self.exports.overwrite
        shared = picture.path in self._shared
        if self.exports.txt and shared:
            self.left_out[SHARED] += 1
        elif self.exports.txt:
            own = [text for text in ((earlier or {}).get(CAPTION),) if isinstance(text, str)]
            self._write(lambda: write_text(picture.path, caption, own=own, overwrite=overwrite))
        if self.exports.xmp:
            habit: Habit | None = "ext" if shared else self.exports.xmp_name
            self._write(
                lambda: write_xmp(picture.path, caption, generator=self._generator, habit=habit, overwrite=overwrite)
            )

    def embed(self, picture: Picture, record: Record) -> str | None:
        """Writes the caption into a picture, if that is wanted; returns the SHA-256 of the file if it has changed.

        The job goes on if it cannot be written.
        """
        if "error" in record or not self.exports.embed:
            return None
        if picture.part is not None:
            self.left_out[PART] += 1
            return None
        if picture.read_only:
            self.left_out[READ_ONLY] += 1
            return None
        try:
            outcome, sha256 = embed(
                picture.path, record[CAPTION], generator=self._generator, overwrite=self.exports.overwrite
            )
        except NotEmbeddedError as err:
            self.left_out[f"into pictures {err}"] += 1
            return None
        except FastVLMError as err:
            self.failures.append(str(err))
            return None
        if outcome is Outcome.KEPT:
            self.left_out[KEPT] += 1
        return sha256

    def _write(self, write: Callable[[], Outcome]) -> None:
        try:
            if write() is Outcome.KEPT:
                self.left_out[KEPT] += 1
        except FastVLMError as err:
            self.failures.append(str(err))

    def write_data_sets(self, record_of: Callable[[Picture], Record | None]) -> None:
        """Writes the tables and data sets of all pictures that have a record.

        Args:
            record_of: Returns the record of a picture, or None.

        Raises:
            ConfigError: If one cannot be written, or would take the place of somebody else's file.
        """
        if self.exports.csv is not None:
            write_csv(self.exports.csv, self._columns, (row(record) for _, record in self._records(record_of)))
        if self.exports.hf:
            rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
            for picture, record in self._records(record_of):
                if "error" in record:
                    continue
                if picture.part is not None:
                    self.left_out[PART] += 1
                elif _has_place(picture):
                    rows[picture.root].append({"file_name": picture.name, **_answers(record)})
                else:
                    self.left_out[READ_ONLY] += 1
            for root, lines in rows.items():
                left_out = write_metadata(Path(root or "."), lines)
                if left_out:
                    self.left_out["that metadata.jsonl has from somebody else, or whose name is not UTF-8"] += left_out
        if self.exports.webdataset is not None:
            with WebDataset(self.exports.webdataset) as dataset:
                for picture, record in self._records(record_of):
                    if "error" in record:
                        continue
                    if picture.part is not None:
                        self.left_out[PART] += 1
                        continue
                    try:
                        dataset.add(picture.path, {"file": picture.name, **_answers(record)})
                    except OSError as err:
                        self.failures.append(f"{printable(picture.path)}: cannot be read ({err.strerror or err})")

    def _records(self, record_of: Callable[[Picture], Record | None]) -> Iterable[tuple[Picture, Record]]:
        for picture in self.pictures:
            record = record_of(picture)
            if record is not None:
                yield picture, record


def _has_place(picture: Picture) -> bool:
    """Whether there is a folder for the metadata of a picture."""
    return not (picture.read_only and (not picture.root or in_library(f"{picture.root}/metadata.jsonl")))


def _answers(record: Record) -> dict[str, Any]:
    """The texts of a record by field."""
    answers: Mapping[str, str] = record.get("answers", {})
    return {**({CAPTION: record[CAPTION]} if CAPTION in record else {}), **answers}


def columns(fields: Iterable[str]) -> list[str]:
    """The columns of a table of records whose questions are called `fields`."""
    return ["file", *fields, "width", "height", "finish_reason", "error"]


def row(record: Record) -> dict[str, Any]:
    """A record as a row of a table."""
    error = record.get("error")
    return {**record, **_answers(record), "error": error["message"] if error else ""}
