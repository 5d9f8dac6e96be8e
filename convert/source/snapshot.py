"""Checkpoints in the Hub's own cache, whichever program put them there: whole, in part, with or without a branch."""

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from fastvlm_mlx.checkpoint.index import INDEX_FILE, weight_map
from fastvlm_mlx.convert.progress import Notify
from fastvlm_mlx.errors import CheckpointError


def cache_of(repository: str) -> Path:
    """The folder of a repository in the Hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")


def complete_snapshot(repository: str, revision: str | None, notify: Notify | None = None) -> Path | None:
    """The folder of a revision in the Hub's cache, whichever program put it there; None if a needed file is missing.

    Without a revision, another commit serves if that of `main` is not complete; `notify` is called with its name.
    """
    folders = snapshots(repository, revision)
    folder = next((folder for folder in folders if not missing_files(folder)), None)
    if folder and folder != folders[0] and notify:
        notify(f"{repository}: using {folder.name[:12]}, the commit that the Hub's cache has completely")
    return folder


def snapshots(repository: str, revision: str | None) -> list[Path]:
    """The folders in the Hub's cache that can stand for a revision: first its own, then, without one, the newest."""
    root = cache_of(repository)
    commit = revision or "main"
    with suppress(OSError, ValueError):
        commit = (root / "refs" / commit).read_text(encoding="ascii").strip()
    own, others = root / "snapshots" / commit, list[Path]()
    with suppress(OSError):
        if revision is None:
            others = sorted((root / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    return [folder for folder in (own, *others) if folder.is_dir()]


def missing_files(folder: Path) -> list[str]:
    """The files that a conversion needs and a folder lacks, be it that a link leads nowhere."""
    present = {path.name for path in folder.iterdir() if path.is_file()}
    return missing_of(present, shards_of(folder) or [])


def missing_of(present: Collection[str], shards: Collection[str]) -> list[str]:
    """The files that a conversion needs beside those that are `present`; `shards` are those that an index names."""
    needed = {"config.json", *shards}
    if "tokenizer.json" not in present:
        needed |= {"vocab.json", "merges.txt"} if {"vocab.json", "merges.txt"} & set(present) else {"tokenizer.json"}
    if not any(name.endswith(".safetensors") for name in present):
        needed |= set() if shards else {"model.safetensors"}
    return sorted(needed - set(present))


def shards_of(folder: Path) -> list[str]:
    """The weights that the index in a folder names; none if it has no index."""
    with suppress(CheckpointError):  # a damaged index is reported when the folder is opened
        return sorted(set((weight_map(folder, INDEX_FILE) or {}).values()))
    return []


def file_size(path: Path) -> int:
    """The size of a file; -1 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
