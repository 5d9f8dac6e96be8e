"""Captions as data sets: a CSV file, Hugging Face's `metadata.jsonl`, WebDataset's tar files.

Each is made whole from the records of a job, and takes the place of an earlier one only if that one is ours.
"""

import csv
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.outputs import check_output, json_line, writing

GENERATOR = "fastvlm-mlx"
"""What marks rows and files as ours."""

_SHARD_BYTES = 1 << 30


def check_csv(path: Path, columns: Sequence[str]) -> None:
    """Raises if `write_csv` could not write to `path`; changes nothing.

    Raises:
        ConfigError: If the file exists with other columns, or cannot be written.
    """
    check_output(path)
    header = ",".join(columns).encode() + b"\n"
    if path.is_file():
        with path.open("rb") as earlier:
            if earlier.readline(len(header) + 1) not in (header, b""):
                raise ConfigError(
                    f"{printable(path)}: exists, and is not a table with these columns; name another file"
                )


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a table in UTF-8 with the given columns; other keys of a row are left out.

    Raises:
        ConfigError: If the file exists with other columns, or cannot be written.
    """
    check_csv(path, columns)
    with writing(path) as file:
        text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="", write_through=True)
        table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        text.detach()


def check_metadata(folder: Path) -> None:
    """Raises if `write_metadata` could not write into `folder`; changes nothing.

    Raises:
        ConfigError: If the file exists and is something else, or cannot be written.
    """
    path = folder / "metadata.jsonl"
    check_output(path)
    _rows_of_others(path)


def write_metadata(folder: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes `metadata.jsonl`, with which Hugging Face's `imagefolder` finds the texts of pictures in `folder`.

    Rows of others stay as they are; they also win over a row of ours about the same file.

    Args:
        folder: Holds the pictures.
        rows: Each with `file_name`, relative to the folder, and `text`.

    Returns:
        How many of `rows` were left out, because others have described the file or its name is not UTF-8.

    Raises:
        ConfigError: If the file exists and is something else, or cannot be written.
    """
    path = folder / "metadata.jsonl"
    others, described = _rows_of_others(path)
    left_out = 0
    with writing(path) as file:
        file.writelines(others)
        for row in rows:
            name = row["file_name"]
            if name in described or not _is_unicode(name):
                left_out += 1
            else:
                file.write(json_line({**row, "generator": GENERATOR}))
    return left_out


def _rows_of_others(path: Path) -> tuple[list[bytes], set[str]]:
    """The lines of a metadata file that are not ours, and the files that they describe."""
    lines: list[bytes] = []
    described: set[str] = set()
    if path.exists():
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line.decode("utf-8-sig")) if line.strip() else {"generator": GENERATOR}
                except (ValueError, RecursionError) as err:
                    raise ConfigError(
                        f"{printable(path)}: line {number} is not valid JSON; it is left as it is"
                    ) from err
                if not isinstance(row, dict):
                    raise ConfigError(f"{printable(path)}: line {number} is no JSON object; it is left as it is")
                if row.get("generator") != GENERATOR:
                    lines.append(line if line.endswith(b"\n") else line + b"\n")
                    described.add(str(row.get("file_name")))
    return lines, described


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class WebDataset:
    """Tar files of samples, as WebDataset reads them: `000000000.jpg`, `000000000.txt` and `000000000.json` in a row.

    Equal samples give equal files. Each takes its name when it is complete.

        with WebDataset(Path("captions")) as dataset:  # captions-000000.tar and so on
            dataset.add("photo.jpg", {"text": "A dog."})

    Args:
        prefix: Of the files' paths.
        shard_bytes: A new file begins with the sample that would make the current one larger than this.

    Raises:
        ConfigError: If `prefix` has no name, there is such a file that is not ours, or one cannot be written.
    """

    def __init__(self, prefix: Path, *, shard_bytes: int = _SHARD_BYTES) -> None:
        if not prefix.name:
            raise ConfigError(
                f"{printable(prefix)}: has no name that files could begin with; add one, as in out/photos"
            )
        self._prefix = prefix
        self._shard_bytes = shard_bytes
        self._samples = self._shards = 0
        self._open = ExitStack()
        self._tar: tarfile.TarFile | None = None
        self._replaced = [path for path in self._existing() if _is_ours(path)]
        check_output(self._path(0))

    def __enter__(self) -> "WebDataset":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._open.__exit__(kind, error, trace)
            return
        self._finish()
        for path in self._replaced[self._shards :]:  # an earlier data set was longer
            path.unlink(missing_ok=True)

    def add(self, picture: str, record: Mapping[str, Any]) -> None:
        """Adds the file of a picture with its record, whose `text` also becomes a member of its own.

        Raises:
            OSError: If the picture cannot be read.
            ConfigError: If the tar file cannot be written.
        """
        extension = os.path.splitext(picture)[1][1:].lower() or "img"
        members = {
            extension: Path(picture).read_bytes(),
            "txt": str(record["text"]).encode("utf-8", "replace"),
            "json": json_line(record),
        }
        size = sum(map(len, members.values()))
        if self._tar is not None and self._tar.offset + size > self._shard_bytes:
            self._finish()
        if self._tar is None:
            path = self._path(self._shards)
            file = self._open.enter_context(writing(path))
            marked = {"comment": GENERATOR}
            self._tar = self._open.enter_context(tarfile.TarFile(fileobj=file, mode="w", pax_headers=marked))
            self._shards += 1
        for extension, content in members.items():
            member = tarfile.TarInfo(f"{self._samples:09}.{extension}")
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))
        self._samples += 1

    def _finish(self) -> None:
        self._open.close()
        self._tar = None

    def _path(self, number: int) -> Path:
        return self._prefix.with_name(f"{self._prefix.name}-{number:06}.tar")

    def _existing(self) -> Iterator[Path]:
        number = 0
        while (path := self._path(number)).exists():
            yield path
            number += 1


def _is_ours(path: Path) -> bool:
    """Whether a tar file has our mark.

    Raises:
        ConfigError: If not, since it is not replaced then.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            ours = tar.pax_headers.get("comment") == GENERATOR
    except (tarfile.TarError, OSError):
        ours = False
    if not ours:
        raise ConfigError(f"{printable(path)}: exists, and is not a data set of captions; choose another name")
    return True
