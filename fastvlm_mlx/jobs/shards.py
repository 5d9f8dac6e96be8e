"""Shards: parts of the pictures, each for one process, that together are all pictures and never overlap."""

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.jobs.pictures import Picture

MOST_SHARDS = 1_000_000

_TEXT = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")
_RANK_SOURCES = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
"""What MPI's launchers call rank and size."""
_LISTS = ("MLX_HOSTFILE", "MLX_IBV_DEVICES")
"""Files of `mlx.launch` with a list of one item for each rank."""


class Names:
    """What pictures are called in records: the path below their folder, or the whole one if folders share names.

    Args:
        pictures: All pictures of a job, those of other shards included.
    """

    def __init__(self, pictures: Sequence[Picture] = ()) -> None:
        counts = Counter(picture.name for picture in pictures)
        self._shared = {name for name, count in counts.items() if count > 1}

    def of(self, picture: Picture) -> str:
        """The name of a picture."""
        return picture.place if picture.name in self._shared else picture.name


class Shard(NamedTuple):
    """One of several parts of the pictures.

    A picture's part follows from the name that its record has, and from nothing else: not from the other pictures,
    their order, or where their folder is on this machine.

    Attributes:
        number: Of the part, from 1.
        total: How many parts there are.
    """

    number: int
    total: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """The shard that a text such as `2/8` means.

        Raises:
            ConfigError: If it means none.
        """
        match = _TEXT.fullmatch(text.strip())
        number, total = (int(part) for part in match.groups()) if match else (0, 0)
        if not 1 <= number <= total <= MOST_SHARDS:
            raise ConfigError(f"{printable(text, 40)!r} is not like 2/8, the second of eight, with numbers from 1")
        return cls(number, total)

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    def holds(self, name: str) -> bool:
        """Whether a picture belongs to this part.

        Args:
            name: In its record.
        """
        return shard_of(name, self.total) == self.number


def shard_of(name: str, total: int) -> int:
    """The number, from 1, of the part that a picture belongs to.

    Some file systems give accents back as characters of their own; both forms of a name belong to the same part.
    """
    try:
        data = unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half characters that are no bytes of a file name
        data = name.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") % total + 1


def launched_shard(environment: Mapping[str, str] = os.environ) -> Shard | None:
    """The shard of this process by its rank among those that `mlx.launch` or MPI has started; None if it is alone.

    It reads the variables that `mlx.core.distributed` reads, but opens no connection, so no rank waits for another.

    Raises:
        ConfigError: If there is a rank, but not how many there are.
    """
    for rank, size in _RANK_SOURCES:
        if rank in environment and size in environment:
            return _of_rank(environment[rank], environment[size])
    if "MLX_RANK" not in environment:
        return None
    if "MLX_WORLD_SIZE" in environment:
        return _of_rank(environment["MLX_RANK"], environment["MLX_WORLD_SIZE"])
    for name in _LISTS:
        if name in environment:
            return _of_rank(environment["MLX_RANK"], str(_length(name, environment[name])))
    raise ConfigError(
        f"MLX_RANK is {printable(environment['MLX_RANK'], 20)}, but neither MLX_HOSTFILE nor MLX_WORLD_SIZE says of how"
        " many; give --shard, or unset MLX_RANK"
    )


def _of_rank(rank: str, size: str) -> Shard | None:
    if not (rank.isascii() and rank.isdecimal() and size.isascii() and size.isdecimal()):
        raise ConfigError(f"rank {printable(rank, 20)} of {printable(size, 20)} are no numbers; give --shard")
    if int(size) <= 1:
        return None
    if int(rank) >= int(size):
        raise ConfigError(
            f"rank {printable(rank, 20)} of {printable(size, 20)}: ranks are counted from 0; give --shard"
        )
    return Shard(int(rank) + 1, int(size))


def _length(variable: str, file: str) -> int:
    """How many items the list in a file has; an empty file stands for one."""
    try:
        text = Path(file).read_text()
        values = json.loads(text) if text.strip() else [None]
    except (OSError, ValueError, RecursionError) as err:
        reason = getattr(err, "strerror", None) or "is no JSON"
        raise ConfigError(f"{variable} names {printable(file)}, which cannot be read ({reason}); give --shard") from err
    if not isinstance(values, list):
        raise ConfigError(f"{variable} names {printable(file)}, which has no list of hosts; give --shard")
    return len(values)


def journal_of(output: Path, shard: Shard) -> Path:
    """The journal of one rank, when all ranks have the same command line: `out.jsonl` -> `out.2-of-8.jsonl`."""
    width = len(str(shard.total))
    return output.with_name(f"{output.stem}.{shard.number:0{width}}-of-{shard.total}{output.suffix}")
