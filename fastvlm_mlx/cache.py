"""The cache folder: what is in it, where that came from, which processes use it, and its removal.

Beside a model or an album `NAME` lies the hidden file `.NAME.used`. It holds the name of the source, its time is that
of the last use, and the processes that use it hold a lock on that. Nothing is removed that does not bear such a mark or
a name that only this program gives.
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from fastvlm_mlx.checkpoint.folder import format_version, is_complete, is_converted
from fastvlm_mlx.checkpoint.released import ALIASES, DEMO, Location, is_repository, parse_name
from fastvlm_mlx.config import FORMAT_VERSION, READABLE_FORMATS, ModelConfig
from fastvlm_mlx.errors import ConversionError, FastVLMError
from fastvlm_mlx.machine import cache_folder

_ANSWERS = "eval"
_ALBUMS = "albums"
_OWN_NAME = re.compile(r".+-[0-9a-f]{12}|[A-Za-z0-9][\w.-]*--[\w.-]+@[\w.@-]+", re.ASCII)
"""Names that only `entry` gives, and those that it gave before it marked what it made."""
_PATIENCE = 2.0
"""Seconds to wait for another process that is removing a model."""
_PIECES, _PIECE_BYTES = 64, 4096
"""Of a file of the bundled checkpoint: the pieces that are looked at, and the bytes of each."""

_used: dict[Path, int] = {}
"""Descriptors of the marks on which this process holds a lock, by the models that it uses."""


def kept(location: Location, revision: str | None) -> Path:
    """The folder in the cache with the conversion of a checkpoint, or `entry` if there is none.

    A conversion in an earlier version of the format is as good, and spares its owner another download.
    """
    folders = [entry(location, revision, version) for version in reversed(READABLE_FORMATS)]
    return next((folder for folder in folders if is_complete(folder)), folders[0])


def entry(location: Location, revision: str | None, version: int | None = None) -> Path:
    """The folder in the cache for the conversion of a checkpoint, in this version of the format or an earlier one.

    Its name ends with a hash of the version of the format and of what tells one source from another: of a repository
    its name and revision; of a folder or an archive its path and the names, sizes and times of its files; of the
    bundled checkpoint its contents, so that every environment with the same one shares a conversion.
    """
    if location.path is None:
        name, identity = f"{location.name}@{revision or 'main'}", ""
    elif location.bundled:
        name, identity = DEMO, _contents(location.path)
    else:
        path = location.path.resolve()
        name, identity = path.name, repr((str(path), _state(path)))
    key = repr((version or FORMAT_VERSION, name, identity))
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
    readable = re.sub(r"[^\w.@-]", "_", name.replace("/", "--"))[:55]  # with its mark within 255 bytes in any script
    return cache_folder() / f"{readable}-{digest[:12]}"


def origin(location: Location, revision: str | None) -> str:
    """Where a checkpoint is, as the mark of its conversion says it."""
    if location.bundled:
        return DEMO
    return str(location.path.resolve()) if location.path else f"{location.name}@{revision or 'main'}"


def _state(path: Path) -> list[tuple[str, int, int, int]]:
    """The names, sizes and times of the files of a source, by which a change is noticed.

    The time of the last change to the inode tells files apart whose other times were set alike, as in archives that are
    built reproducibly.
    """
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files]
    return [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]


def _contents(folder: Path) -> str:
    """A hash of the files that a conversion of the bundled checkpoint reads.

    Of each file it takes the size and pieces that are spread over it: training changes all weights, and reading all of
    them would take a tenth of the time to an answer.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".txt", ".safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb", buffering=0) as opened:
            for piece in range(_PIECES):
                opened.seek(piece * max(size - _PIECE_BYTES, 0) // (_PIECES - 1))
                digest.update(opened.read(_PIECE_BYTES))
    return digest.hexdigest()


def use(folder: Path, source: str | None = None) -> None:
    """Marks a model in the cache as used now, and by this process for as long as it lives.

    Does nothing where the cache cannot be written to or has no locks.

    Args:
        folder: The model.
        source: See `origin`; without it, a folder that has no mark gets none: it may be a user's own.
    """
    if source is None and not _mark(folder).exists():
        return
    with suppress(OSError):
        if folder not in _used:
            _used[folder] = _lock_shared(_mark(folder))
        mark = _used[folder]
        if source is not None:
            text = source.encode(errors="surrogateescape")
            if os.pread(mark, len(text) + 1, 0) != text:
                os.ftruncate(mark, 0)
                os.pwrite(mark, text, 0)
        os.utime(mark)


def _mark(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.used"


def _lock_shared(path: Path) -> int:
    """A descriptor of a mark with a shared lock; waits for a process that is removing the model, and marks it anew."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            mark = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:  # another user's: it can be locked, not written
            mark = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(mark, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(mark), os.stat(path)):
                return mark
        except OSError as err:
            if not isinstance(err, (BlockingIOError, FileNotFoundError)) or time.monotonic() > deadline:
                os.close(mark)
                raise
        os.close(mark)
        time.sleep(0.02)


@dataclass(frozen=True, kw_only=True)
class Item:
    """Something in the cache folder.

    Attributes:
        name: Its path in the cache folder.
        kind: `model`, `album` (the index of one), `answers` (of `fastvlm eval`) or `leftover` (of a process that was
            killed).
        path: Its path.
        size_bytes: The bytes of its files.
        last_used: The time of its last use, in seconds since 1970.
        source: What it was made from: `demo`, a path or `owner/name@revision`; of an album its folder.
        remark: What a user should know of it, such as `source is gone`; of a model from the Hub its commit.
        in_use: Whether a running process uses it.
    """

    name: str
    kind: str
    path: Path
    size_bytes: int
    last_used: float
    source: str
    remark: str
    in_use: bool


def items() -> list[Item]:
    """Everything in the cache folder that this program has put there."""
    folder = cache_folder()
    found: list[Item] = []
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            with suppress(OSError):  # removed since
                if path.name == _ANSWERS and not path.is_symlink():
                    found += [_item(file, folder, "answers") for file in sorted(path.glob("*.jsonl"))]
                elif path.name == _ALBUMS and not path.is_symlink():
                    found += [_item(file, folder, "album") for file in sorted(path.glob("*.sqlite"))]
                elif path.name.startswith(".") and ".partial-" in path.name and path.is_dir():
                    found.append(_item(path, folder, "leftover"))
                elif _is_own_model(path):
                    found.append(_item(path, folder, "model"))
    return found


def _is_own_model(path: Path) -> bool:
    """Whether the cache made a folder, also if it is damaged; a link is what somebody else put there."""
    if path.name.startswith(".") or path.is_symlink() or not path.is_dir():
        return False
    return _mark(path).exists() or (_OWN_NAME.fullmatch(path.name) is not None and is_converted(path))


def _item(path: Path, folder: Path, kind: str) -> Item:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file() or file.is_symlink()]
    source, remark = _provenance(path) if kind == "model" else _album(path) if kind == "album" else ("", "")
    mark = _mark(path)
    return Item(
        name=str(path.relative_to(folder)),
        kind=kind,
        path=path,
        size_bytes=sum(file.lstat().st_size for file in files),
        last_used=(mark if mark.exists() else path).stat().st_mtime,
        source=source,
        remark=remark,
        in_use=any(map(_is_locked, _locks(path, kind))),
    )


def _provenance(path: Path) -> tuple[str, str]:
    """What a model was made from, and what there is to say about that."""
    source, version = "", format_version(path)
    with suppress(OSError):
        source = os.fsdecode(_mark(path).read_bytes())
    if version not in READABLE_FORMATS:
        return source, "format of another version" if is_converted(path) else "damaged"
    try:
        made = ModelConfig.from_path(path).source
    except FastVLMError:
        return source, "damaged"
    if not source:
        return str(made.get("name", "")), "made by an earlier version"
    if source != DEMO and not os.path.isabs(source):
        return source, f"commit {str(made.get('revision'))[:12]}"
    if source != DEMO and not os.path.exists(source):
        return source, "source is gone"
    try:
        current = entry(parse_name(source if source == DEMO else Path(source)), None, version)
    except (FastVLMError, OSError):
        return source, "source cannot be read"
    if current != path:
        return source, "source has changed"
    return source, "" if version == FORMAT_VERSION else f"format {version}, which loads more slowly"


def _album(path: Path) -> tuple[str, str]:
    """The folder of an album, and what there is to say about that."""
    with suppress(OSError):
        source = os.fsdecode(_mark(path).read_bytes())
        return source, "" if os.path.isdir(source) else "folder is gone"
    return "", ""


def remove(item: Item) -> bool:
    """Removes an item, unless a running process uses it; returns whether it is gone.

    Raises:
        ConversionError: If the file system refuses.
    """
    from fastvlm_mlx.convert.scratch import scratch_folder

    path = item.path
    try:
        with ExitStack() as stack:
            for file in _locks(path, item.kind):
                opened = stack.enter_context(file.open("ab"))
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_file():
                path.unlink()
            else:
                with scratch_folder(path.parent, path.name.lstrip(".")) as scratch:
                    path.rename(scratch / "removed")
            beside = {
                "model": [*_locks(path, item.kind), path.with_name(f".{path.name}.asked")],
                "album": [*_locks(path, item.kind), path.with_name(f"{path.name}-journal")],
            }
            for file in beside.get(item.kind, []):
                file.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    except OSError as err:
        raise ConversionError(f"{path}: cannot be removed: {err.strerror or err}") from err
    return True


def _locks(path: Path, kind: str) -> list[Path]:
    """The files that the processes which use something in the cache hold locks on."""
    if kind == "model":
        return [_mark(path), path.with_name(f".{path.name}.lock")]
    if kind == "album":
        return [_mark(path), path.with_name(f".{path.name}.updating")]
    return [path] if kind == "answers" else [path / ".fastvlm-lock"]


def _is_locked(path: Path) -> bool:
    """Whether a process is known to hold a lock on a file, be it a shared one."""
    with suppress(OSError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def hub_copies(found: Iterable[Item]) -> dict[str, tuple[Path, int]]:
    """The folders of Apple's repositories, and of those that models were made from, in the Hub's cache; their bytes.

    That cache belongs to huggingface_hub and is shared by many programs. Nothing in it is removed here.
    """
    from fastvlm_mlx.convert.source.snapshot import cache_of

    sources = {item.source.partition("@")[0] for item in found if item.kind == "model"}
    repositories = {*ALIASES.values(), *filter(is_repository, sources)}
    copies = {}
    for repository in sorted(repositories):
        folder = cache_of(repository)
        if size := sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()):
            copies[repository] = (folder, size)
    return copies
