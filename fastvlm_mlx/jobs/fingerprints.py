"""Fingerprints: what an answer depends on, by content and never by name."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.outputs import write_output

Progress = Callable[[int, int, str], None]
"""Called with the bytes done, the bytes in all, and a label."""

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json")
_BLOCK = 16 << 20
_SETTLED = 2 * 10**9
"""Nanoseconds after a change within which another change may leave a file's times as they are."""


def fingerprint(*parts: Any) -> str:
    """Returns 32 hexadecimal digits that stand for JSON values; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def checkpoint_fingerprint(folder: Path, store: Path | None = None, progress: Progress | None = None) -> str:
    """Returns a fingerprint of all that a converted checkpoint answers from: weights, tokenizer, configuration.

    Where the checkpoint came from and what it is called do not matter.

    Args:
        folder: The converted checkpoint.
        store: See `file_digests`.
        progress: See `file_digests`.

    Raises:
        CheckpointError: If files are missing.
        ConfigError: If it is not a converted checkpoint.
    """
    config = ModelConfig.from_path(folder).to_dict()
    del config["source"]
    return fingerprint(config, file_digests(checkpoint_files(folder), store, progress))


def checkpoint_files(folder: Path) -> list[Path]:
    """Returns the weight files of a converted checkpoint and then those of its tokenizer."""
    from fastvlm_mlx.checkpoint.folder import weight_files  # imports MLX, which a fingerprint alone does not need

    return [*weight_files(folder), *(folder / name for name in _TOKENIZER_FILES if (folder / name).is_file())]


def versions(files: Iterable[Path]) -> list[list[int]]:
    """Returns for each file numbers of which at least one changes when the file is changed or exchanged."""
    return [_version(file.stat()) for file in files]


def _version(status: os.stat_result) -> list[int]:
    # The time of the last change to the inode cannot be set, unlike that of the content.
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def file_digests(files: Sequence[Path], store: Path | None = None, progress: Progress | None = None) -> list[str]:
    """Returns the SHA-256 of each file.

    Args:
        files: The files.
        store: A file that keeps the digests, so that a file is read again only after a change. It is made again if it
            is damaged, and not used where it cannot be written.
        progress: Called while files are read.
    """
    known = _load(store) if store else {}
    total = sum(file.stat().st_size for file in files)
    digests, done, changed = [], 0, False
    for file in files:
        path, status = os.path.abspath(file), file.stat()
        if known.get(path, {}).get("version") != _version(status):
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    digest.update(block)
                    done += len(block)
                    if progress:
                        progress(done, total, f"reading {file.parent.name}")
            known[path] = {"version": _version(status), "sha256": digest.hexdigest()}
            changed = True
            if time.time_ns() - status.st_ctime_ns < _SETTLED or _version(file.stat()) != _version(status):
                known[path]["version"] = None
        else:
            done += status.st_size
        digests.append(known[path]["sha256"])
    if store and changed:
        _save(store, known)
    return digests


def _load(store: Path) -> dict[str, dict[str, Any]]:
    try:
        known = json.loads(store.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {path: entry for path, entry in known.items() if isinstance(entry, dict) and "sha256" in entry}


def _save(store: Path, known: dict[str, dict[str, Any]]) -> None:
    """Replaces the store; leaves out what cannot be used again."""
    entries = {path: entry for path, entry in known.items() if entry["version"] and os.path.exists(path)}
    with suppress(OSError, ConfigError):
        store.parent.mkdir(parents=True, exist_ok=True)
        write_output(store, json.dumps(entries).encode())
