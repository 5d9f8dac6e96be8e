"""From a name to a converted folder, and to a model and its processor.

What is not in this project's format is converted once, into a cache folder. Of a branch on the Hub the cache keeps the
commit it was converted from, and asks the Hub once a day whether the branch still points there.
"""

import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from fastvlm_mlx.arguments import StrPath, check_callable, check_kind, flag
from fastvlm_mlx.backend import device, mx
from fastvlm_mlx.cache import entry, kept, origin, use
from fastvlm_mlx.checkpoint.folder import all_finite, is_complete, is_converted
from fastvlm_mlx.checkpoint.load import dtype_name, load_model, read_parameters
from fastvlm_mlx.checkpoint.released import Location, parse_name
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    FastVLMError,
    ImageError,
    PromptError,
    RangeError,
)
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.inputs.token_tables import TABLES_FILE
from fastvlm_mlx.machine import CACHE_VARIABLE, cache_folder
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.sharding import check_divisible
from fastvlm_mlx.streams import check_process, turn

_COMMIT = re.compile(r"[0-9a-f]{40}")
_DAY, _HOUR = 86400.0, 3600.0
_HUB_TIMEOUT = 2.0
"""Seconds that the Hub has to say which commit a branch points to."""

Notify = Callable[[str], None]
"""Called with a one-line message before a slow step."""
Progress = Callable[[int, int, str], None]
"""Called with the bytes done, the bytes in all, and a label."""


def find(name: StrPath, *, revision: str | None = None) -> Path | None:
    """The folder of the converted checkpoint `name` if there is one already; None if `resolve` has something to do."""
    try:
        location = parse_name(name)
        location.check_revision(revision)
    except CheckpointError:
        return None
    if location.path is not None and location.path.is_dir() and is_converted(location.path):
        return location.path
    folder = kept(location, revision)
    return folder if is_complete(folder) else None


def settled(name: StrPath, *, revision: str | None = None) -> Path | None:
    """The folder that `resolve` would return at once; None if it would ask the Hub or convert something first."""
    folder = find(name, revision=revision)
    if folder is None or (parse_name(name).path is None and _has_to_ask(folder, revision or "main")):
        return None
    return folder


def check_names(names: Sequence[tuple[str | Path, str | None]]) -> None:
    """Checks the names and revisions of several checkpoints, before the first one costs a download.

    Raises:
        CheckpointError: If one is neither on disk nor on the Hub.
    """
    locations = [(parse_name(name), revision) for name, revision in names]
    for location, revision in locations:
        location.check_revision(revision)
    for (name, revision), (location, _) in zip(names, locations, strict=True):
        if location.path is None and len(names) > 1 and find(name, revision=revision) is None:
            from fastvlm_mlx.convert.source.hub import check

            check(location.name, revision)


def resolve(
    name: StrPath, *, revision: str | None = None, notify: Notify | None = None, progress: Progress | None = None
) -> Path:
    """The folder of the converted checkpoint `name`; downloads it and converts it into the cache if necessary.

    Several processes and threads may do so at once: one works, the others wait for it.

    Args:
        name: `demo`, which is part of the package, a Hub id, an alias (`0.5b`, `1.5b`, `7b`), a folder or a `.zip`; see
            `parse_name`.
        revision: Branch, tag or commit of a Hub id.
        notify: Called with a one-line message before a slow step, and before anything is written.
        progress: Called with the bytes done, the bytes in all, and a label, during a download by another thread.

    Raises:
        CheckpointError: If there is no such checkpoint, or it is no FastVLM checkpoint.
        ConversionError: If it cannot be converted.
    """
    if revision is not None:
        check_kind(revision, "revision", str, "a text or None")
    check_callable(notify, "notify")
    check_callable(progress, "progress")
    location = parse_name(name)
    location.check_revision(revision)
    if location.path is not None and location.path.is_dir() and is_converted(location.path):
        use(location.path)
        return location.path
    folder, tell = kept(location, revision), notify or (lambda _: None)
    complete = is_complete(folder)
    if complete:
        use(folder, origin(location, revision))
        complete = folder.is_dir()  # unless it has been removed in between
    if not complete:
        damage = f"{folder}: damaged or from another version; converting {location.name} again"
        reason = damage if folder.exists() else ""
        _convert_once(location, revision, folder, tell, progress, reason=reason, is_done=is_complete)
    elif location.path is None and (commit := _newer_commit(folder, location.name, revision or "main")):

        def is_done(folder: Path) -> bool:
            return is_complete(folder) and _commit(folder) == commit

        fresh = entry(location, revision)
        moved = f"{location.name}: {revision or 'main'} has moved to {commit[:12]} on the Hub; converting it again"
        try:
            _convert_once(location, revision, fresh, tell, progress, reason=moved, is_done=is_done)
            folder = fresh
        except FastVLMError as err:
            tell(f"{err}; using the conversion of {str(_commit(folder))[:12]}")
    return folder


def remake(
    name: StrPath,
    error: FastVLMError,
    *,
    revision: str | None = None,
    notify: Notify | None = None,
    progress: Progress | None = None,
) -> Path:
    """Converts a checkpoint again whose conversion in the cache has turned out to be unusable; returns its folder.

    Raises:
        FastVLMError: `error`, if it is about a folder of the user's own, which is never written to.
    """
    location = parse_name(name)
    folder = kept(location, revision)
    if (location.path is not None and is_converted(location.path)) or not folder.exists():
        raise error
    unusable = folder.stat().st_ino
    _convert_once(
        location,
        revision,
        folder,
        notify or (lambda _: None),
        progress,
        reason=f"{error}; converting {location.name} again",
        is_done=lambda folder: is_complete(folder) and folder.stat().st_ino != unusable,
    )
    return folder


def is_damaged(name: str | Path, error: FastVLMError, *, revision: str | None = None) -> bool:
    """Whether a question failed because a file of the checkpoint is unreadable or has weights that are no numbers."""
    if isinstance(error, (ConfigError, ConversionError, ImageError, PromptError)):
        return False
    folder = find(name, revision=revision)
    return isinstance(error, CheckpointError) or (folder is not None and not all_finite(folder))


def _convert_once(
    location: Location,
    revision: str | None,
    folder: Path,
    tell: Notify,
    progress: Progress | None,
    *,
    reason: str,
    is_done: Callable[[Path], bool],
) -> None:
    """Converts a checkpoint into the cache, unless `is_done` says of its folder that another process has done so.

    Args:
        location: The source.
        revision: Branch, tag or commit of a Hub id.
        folder: The folder in the cache.
        tell: Called with a one-line message before a slow step.
        progress: Called with the bytes done, the bytes in all, and a label.
        reason: What is said where a conversion exists already.
        is_done: Whether the folder holds what is needed.
    """
    from fastvlm_mlx.convert.scratch import is_locked, lock

    source = location.path.resolve() if location.path and not location.bundled else location.name
    lock_file = folder.with_name(f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConversionError(
            f"{folder.parent}: cannot be made: {err.strerror or err}; set {CACHE_VARIABLE} to a folder for models"
        ) from err
    if not os.access(folder.parent, os.W_OK):
        raise ConversionError(f"{folder.parent}: cannot be written to; set {CACHE_VARIABLE} to a folder for models")
    waiting = is_locked(lock_file)
    if waiting or reason:
        tell(f"waiting for another process that is converting {source}" if waiting else reason)
    try:
        with lock(lock_file) as held:
            if not is_done(folder):
                if waiting:
                    state = "gave up" if held else "shows no sign of life"
                    tell(f"the other process {state}; converting {source} into {folder}")
                commit = None
                if location.path is None:
                    from fastvlm_mlx.convert.source.hub import download

                    commit = download(location.name, revision, notify=tell, progress=progress).name
                if not (waiting or reason):
                    tell(f"converting {source} once, into {folder}")
                try:
                    _convert(source, folder, "float16", commit, progress)
                except RangeError as err:
                    tell(f"{err.args[0].partition(';')[0]}; converting to float32 instead")
                    _convert(source, folder, "float32", commit, progress)
            use(folder, origin(location, revision))
    except FastVLMError:
        if not is_done(folder):  # otherwise another process has made it, without a lock
            raise
    finally:
        if not folder.exists():  # an error or an interrupt
            lock_file.unlink(missing_ok=True)


def _convert(source: str | Path, folder: Path, dtype: str, revision: str | None, progress: Progress | None) -> None:
    """Converts a checkpoint into the cache; what is there already is replaced when the conversion is complete."""
    from fastvlm_mlx.convert import convert_checkpoint
    from fastvlm_mlx.convert.scratch import scratch_folder

    if not folder.exists():
        convert_checkpoint(source, folder, dtype=dtype, revision=revision, progress=progress)
        return
    with scratch_folder(folder.parent, folder.name) as scratch:
        convert_checkpoint(source, scratch / folder.name, dtype=dtype, revision=revision, progress=progress)
        try:
            folder.rename(scratch / "replaced")
            (scratch / folder.name).rename(folder)
        except OSError as err:
            raise ConversionError(f"{folder}: cannot be replaced: {err.strerror or err}") from err


def _newer_commit(folder: Path, repository: str, revision: str) -> str | None:
    """The commit that a branch points to on the Hub, if it is another one than a conversion was made from.

    None where that is not known. The Hub is asked at most once a day for each model, again after an hour if it did not
    answer, and never when it is switched off or the cache cannot be written to.
    """
    if not _has_to_ask(folder, revision):
        return None

    from fastvlm_mlx.convert.source.hub import newest_commit

    commit = newest_commit(repository, revision, timeout=_HUB_TIMEOUT)
    stamp = _stamp(folder)
    with suppress(OSError):
        stamp.touch()
        if commit is None:
            os.utime(stamp, times=(time.time(), time.time() - _DAY + _HOUR))
    return commit if commit != _commit(folder) else None


def _has_to_ask(folder: Path, revision: str) -> bool:
    """Whether the Hub has to be asked where a branch points to."""
    if _COMMIT.fullmatch(revision) or _is_offline() or not os.access(folder.parent, os.W_OK):
        return False
    files = (folder / "config.json", _stamp(folder))
    asked = max(file.stat().st_mtime for file in files if file.exists())
    return not 0 <= time.time() - asked < _DAY


def _stamp(folder: Path) -> Path:
    """The file whose time says when the Hub was asked about a conversion."""
    return folder.with_name(f".{folder.name}.asked")


def _commit(folder: Path) -> str | None:
    """The commit on the Hub that a folder was converted from."""
    commit: str | None = ModelConfig.from_path(folder).source.get("revision")
    return commit


def _is_offline() -> bool:
    """Whether the Hub is switched off, by the variables of huggingface_hub."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def load(
    name: StrPath,
    *,
    dtype: str | mx.Dtype | None = None,
    revision: str | None = None,
    notify: Notify | None = None,
    progress: Progress | None = None,
    lazy: bool = False,
    group: mx.distributed.Group | None = None,
) -> tuple[FastVLM, FastVLMProcessor]:
    """The model and the processor of a checkpoint.

    >>> from fastvlm_mlx import generate, load
    >>> model, processor = load("apple/FastVLM-0.5B")
    >>> generate(model, processor, image="photo.jpg", prompt="Describe the image.").text

    Args:
        name: A Hub id, an alias, a source folder, a `.zip` or a converted folder; see `resolve`.
        dtype: The type to compute in: `float16`, `bfloat16` or `float32`, by its name or as MLX's; by default the
            stored one on a GPU, float32 on a CPU.
        revision: Branch, tag or commit of a Hub id.
        notify: Called with a one-line message before a slow step.
        progress: Called during a conversion with the bytes done, the bytes in all, and a label.
        lazy: On a CPU, read the weights when they are first used; a GPU always does.
        group: From `mlx.core.distributed.init()`: the decoder is divided among these processes, which then all have to
            ask the same; see `fastvlm_mlx.model.sharding`. None, or a group of one, loads all of it.

    Raises:
        CheckpointError: If there is no such checkpoint, or it is damaged.
        ConversionError: If it cannot be converted.
        ConfigError: If an argument is of the wrong kind.
    """
    check_process()
    dtype, lazy = dtype_name(dtype), flag(lazy, "lazy")
    folder = resolve(name, revision=revision, notify=notify, progress=progress)
    if group is not None and group.size() == 1:
        group = None
    elif group is not None:
        check_divisible(ModelConfig.from_path(folder), group.size())
    try:
        return _load(folder, dtype, lazy, notify, group)
    except (CheckpointError, ConfigError) as err:
        folder = remake(name, err, revision=revision, notify=notify, progress=progress)
        return _load(folder, dtype, lazy, notify, group)


def _mend_tables(processor: FastVLMProcessor, folder: Path, damage: str, tell: Notify) -> None:
    """Makes damaged tables again in the cache; in a user's folder nothing is written."""
    if folder.parent != cache_folder():
        tell(f"{damage}; reading tokenizer.json instead, which takes longer; convert the checkpoint again")
        return
    tell(f"{damage}; making it again from tokenizer.json")
    with suppress(ConfigError):  # the cache cannot be written to
        processor.tokenizer.save_tables()


def _load(
    folder: Path, dtype: str | None, lazy: bool, notify: Notify | None, group: mx.distributed.Group | None
) -> tuple[FastVLM, FastVLMProcessor]:
    model = load_model(folder, dtype=dtype, lazy=True, group=group)
    processor = FastVLMProcessor.from_folder(folder)
    if damage := processor.tokenizer.damage:
        _mend_tables(processor, folder, f"{printable(folder / TABLES_FILE)}: {damage}", notify or (lambda _: None))
    if device() == "cpu" and not lazy:
        processor.tokenizer.start()
        with turn():
            read_parameters(model, folder)
    return model, processor
