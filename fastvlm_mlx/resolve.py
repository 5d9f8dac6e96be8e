"""From a name to a converted folder, and to a model and its processor.

What is not in this project's format is converted once, into a cache folder. Of a branch on the Hub the cache keeps the
commit it was converted from, and asks the Hub once a day whether the branch still points there.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fastvlm_mlx.backend import device
from fastvlm_mlx.checkpoint.folder import is_complete, is_converted
from fastvlm_mlx.checkpoint.load import load_model, read_parameters
from fastvlm_mlx.checkpoint.released import DEMO, Location, parse_name
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import ConversionError, FastVLMError
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.machine import CACHE_VARIABLE as CACHE_VARIABLE
from fastvlm_mlx.machine import cache_folder as cache_folder
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.streams import turn

_COMMIT = re.compile(r"[0-9a-f]{40}")
_DAY, _HOUR = 86400.0, 3600.0
_HUB_TIMEOUT = 2.0
"""Seconds that the Hub has to say which commit a branch points to."""

Notify = Callable[[str], None]
"""Called with a one-line message before a slow step."""
Progress = Callable[[int, int, str], None]
"""Called with the bytes done, the bytes in all, and a label."""


def resolve(
    name: str | Path, *, revision: str | None = None, notify: Notify | None = None, progress: Progress | None = None
) -> Path:
    """The folder of the converted checkpoint `name`; converts it into the cache if necessary.

    Several processes and threads may do so at once: one converts, the others wait for it.

    Args:
        name: `demo`, which is part of the package, a Hub id, an alias (`0.5b`, `1.5b`, `7b`), a folder or a `.zip`; see
            `parse_name`.
        revision: Branch, tag or commit of a Hub id.
        notify: Called with a one-line message before a slow step, and before anything is written.
        progress: Called with the bytes done, the bytes in all, and a label.

    Raises:
        CheckpointError: If there is no such checkpoint, or it is no FastVLM checkpoint.
        ConversionError: If it cannot be converted.
    """
    location = parse_name(name)
    location.check_revision(revision)
    if location.path is not None and location.path.is_dir() and is_converted(location.path):
        return location.path
    entry = cache_folder() / _key(location, revision)
    usable = is_complete(entry)
    commit = _newer_commit(entry, location.name, revision or "main") if usable and location.path is None else None
    if usable and commit is None:
        return entry
    source = DEMO if location.bundled else location.path.resolve() if location.path else location.name

    from fastvlm_mlx.convert.scratch import is_locked, lock

    lock_file = entry.with_name(f".{entry.name}.lock")
    waiting = is_locked(lock_file)
    if notify:
        if waiting:
            notify(f"waiting for another process that is converting {source}")
        elif commit:
            notify(f"{source}: {revision or 'main'} has moved to {commit[:12]} on the Hub; converting it again")
        elif entry.exists():
            notify(f"{entry}: damaged or from another version; converting {source} again")
        else:
            notify(f"converting {source} once, into {entry}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConversionError(
            f"{entry.parent}: cannot be made: {err.strerror or err}; set {CACHE_VARIABLE} to a folder for models"
        ) from err
    try:
        with lock(lock_file) as held:
            if not is_complete(entry) or (commit and _commit(entry) != commit):
                if notify and waiting:
                    reason = "gave up" if held else "shows no sign of life"
                    notify(f"the other process {reason}; converting {source} into {entry}")
                _convert(source, entry, revision, progress)
    except FastVLMError as err:
        if not is_complete(entry):  # otherwise another process has written it, or the branch has moved
            raise
        if notify and commit and _commit(entry) != commit:
            notify(f"{err}; using the conversion of {str(_commit(entry))[:12]}")
    return entry


def _key(location: Location, revision: str | None) -> str:
    """The name of a checkpoint's folder in the cache."""
    if location.path is None:
        return re.sub(r"[^\w.@-]", "_", f"{location.name}@{revision or 'main'}".replace("/", "--"))
    name = DEMO if location.bundled else location.path.resolve().name
    return f"{name}-{_fingerprint(location.path, bundled=location.bundled)}"


def _fingerprint(path: Path, *, bundled: bool) -> str:
    """A short hash of the names, sizes and times of the files at `path`, by which a changed source is noticed.

    The time of the last change to the inode tells files apart whose other times were set alike, as in archives that are
    built reproducibly. Those of the package do not change, though installers may link them elsewhere.
    """
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    stats = []
    for file in files:
        status = file.stat()
        stats.append((file.name, status.st_size, status.st_mtime_ns, 0 if bundled else status.st_ctime_ns))
    return hashlib.sha256(repr((str(path.resolve()), stats)).encode(errors="surrogateescape")).hexdigest()[:12]


def _convert(source: str | Path, entry: Path, revision: str | None, progress: Progress | None) -> None:
    """Converts a checkpoint into the cache; what is there already is replaced when the conversion is complete."""
    from fastvlm_mlx.convert import convert_checkpoint
    from fastvlm_mlx.convert.scratch import scratch_folder

    if not entry.exists():
        convert_checkpoint(source, entry, revision=revision, progress=progress)
        return
    with scratch_folder(entry.parent, entry.name) as scratch:
        convert_checkpoint(source, scratch / entry.name, revision=revision, progress=progress)
        try:
            entry.rename(scratch / "replaced")
            (scratch / entry.name).rename(entry)
        except OSError as err:
            raise ConversionError(f"{entry}: cannot be replaced: {err.strerror or err}") from err


def _newer_commit(entry: Path, repository: str, revision: str) -> str | None:
    """The commit that a branch points to on the Hub, if it is another one than a conversion was made from.

    None where that is not known. The Hub is asked at most once a day for each model, again after an hour if it did not
    answer, and never when it is switched off or the cache cannot be written to.
    """
    if _COMMIT.fullmatch(revision) or _is_offline() or not os.access(entry.parent, os.W_OK):
        return None
    stamp = entry.with_name(f".{entry.name}.asked")
    asked = max(file.stat().st_mtime for file in (entry / "config.json", stamp) if file.exists())
    if 0 <= time.time() - asked < _DAY:
        return None

    from fastvlm_mlx.convert.source.hub import newest_commit

    commit = newest_commit(repository, revision, timeout=_HUB_TIMEOUT)
    with suppress(OSError):
        stamp.touch()
        if commit is None:
            os.utime(stamp, times=(time.time(), time.time() - _DAY + _HOUR))
    return commit if commit != _commit(entry) else None


def _commit(entry: Path) -> str | None:
    """The commit on the Hub that a folder was converted from."""
    commit: str | None = ModelConfig.from_path(entry).source.get("revision")
    return commit


def _is_offline() -> bool:
    """Whether the Hub is switched off, by the variables of huggingface_hub."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def load(
    name: str | Path,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    notify: Notify | None = None,
    progress: Progress | None = None,
    lazy: bool = False,
) -> tuple[FastVLM, FastVLMProcessor]:
    """The model and the processor of a checkpoint.

    >>> from fastvlm_mlx import generate, load
    >>> model, processor = load("apple/FastVLM-0.5B")
    >>> generate(model, processor, image="photo.jpg", prompt="Describe the image.").text

    Args:
        name: A Hub id, an alias, a source folder, a `.zip` or a converted folder; see `resolve`.
        dtype: The type to compute in: `float16`, `bfloat16` or `float32`; by default the stored one on a GPU, float32
            on a CPU.
        revision: Branch, tag or commit of a Hub id.
        notify: Called with a one-line message before a slow step.
        progress: Called during a conversion with the bytes done, the bytes in all, and a label.
        lazy: On a CPU, read the weights when they are first used; a GPU always does.

    Raises:
        CheckpointError: If there is no such checkpoint, or it is damaged.
        ConversionError: If it cannot be converted.
    """
    folder = resolve(name, revision=revision, notify=notify, progress=progress)
    model = load_model(folder, dtype=dtype, lazy=True)
    processor = FastVLMProcessor.from_folder(folder)
    if device() == "cpu" and not lazy:
        processor.tokenizer.start()
        with turn():
            read_parameters(model, folder)
    return model, processor
