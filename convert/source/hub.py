"""Checkpoints on the Hugging Face Hub: what a repository holds, its download, its copy in the Hub's cache, its errors.

A branch is resolved to a commit once, and every file is read at that commit.
"""

import re
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.checkpoint.index import INDEX_FILE
from fastvlm_mlx.convert.progress import Notify, Progress
from fastvlm_mlx.convert.source.snapshot import (
    complete_snapshot,
    file_size,
    missing_files,
    missing_of,
    shards_of,
    snapshots,
)
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.formatting import names, printable, readable_bytes

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SMALL_FILES = ("*.json", "*.txt", "*.jinja", "LICEN[CS]E*", "NOTICE*", "ACKNOWLEDG*")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 10.0
"""Seconds that the Hub has to answer a question about a repository."""
_TICK = 0.2
"""Seconds between two reports of a download's progress."""


class NoAnswerError(CheckpointError):
    """The Hub cannot be reached; a copy in its cache serves as well."""


class RefusedError(NoAnswerError):
    """The Hub does not show a repository, perhaps not to this user; a copy in its cache serves as well."""


@dataclass(frozen=True, kw_only=True)
class Repository:
    """What a repository holds at one commit.

    Attributes:
        name: `owner/name`.
        commit: The commit.
        sizes: The bytes of each file, without those in folders.
        licence: The licence that its model card names, in a reader's words.
    """

    name: str
    commit: str
    sizes: Mapping[str, int]
    licence: str

    @property
    def small_files(self) -> list[str]:
        """The files of a checkpoint beside its weights, config.json first."""
        small = [name for name in self.sizes if any(Path(name).match(pattern) for pattern in SMALL_FILES)]
        return sorted(small, key=lambda name: (name != "config.json", name))

    @property
    def weights(self) -> list[str]:
        """The safetensors files."""
        return sorted(name for name in self.sizes if name.endswith(".safetensors"))


def look_up(repository: str, revision: str | None) -> Repository:
    """What a repository holds at a branch, tag or commit (`main` by default); two requests.

    Raises:
        CheckpointError: If there is no such repository or revision, access is refused, the Hub cannot be reached, or
            the repository holds no checkpoint.
    """
    with explained(repository, revision):
        from huggingface_hub.hf_api import HfApi, RepoFile

        api = HfApi()
        info = api.model_info(repository, revision=revision or "main", timeout=_TIMEOUT)
        commit = str(info.sha)
        tree = api.list_repo_tree(repository, recursive=True, revision=commit)
        sizes = {file.path: file.size for file in tree if isinstance(file, RepoFile) and "/" not in file.path}
        card: Mapping[str, Any] = info.card_data.to_dict() if info.card_data else {}
    found = Repository(name=repository, commit=commit, sizes=sizes, licence=_licence(repository, card, sizes))
    if missing := missing_of(sizes, []):
        pickles = sorted(name for name in sizes if name.endswith(PICKLES))
        hint = f"; pickled weights ({names(pickles, 3)}) are not opened, as they can run any code" if pickles else ""
        raise CheckpointError(f"{repository}: on the Hub it lacks {names(missing)}{hint}")
    return found


def check(repository: str, revision: str | None) -> None:
    """Checks that a repository is a checkpoint, on the Hub or, if that cannot be reached, in its cache.

    Raises:
        CheckpointError: If it is not, or is nowhere to be found.
    """
    try:
        look_up(repository, revision)
    except NoAnswerError as err:
        without_hub(repository, revision, err)


def download(
    repository: str, revision: str | None, *, notify: Notify | None = None, progress: Progress | None = None
) -> Path:
    """The folder of a repository in the Hub's cache, at one commit; downloads the needed files that are missing there.

    Runs in the calling thread, so that an interrupt ends it at once. Where the Hub cannot be reached, its cache serves
    if it has everything that a conversion needs.

    Args:
        repository: `owner/name`.
        revision: A branch, tag or commit; `main` by default.
        notify: Called with the size and the licence before the download.
        progress: Called by another thread with the bytes downloaded, the bytes in all and a label.

    Raises:
        CheckpointError: If there is no such repository or revision, access is refused, or the Hub cannot be reached.
    """
    cached: Path | None = complete_snapshot(repository, revision) if _COMMIT.fullmatch(revision or "") else None
    if cached:
        return cached
    try:
        found = look_up(repository, revision)
    except NoAnswerError as err:
        return without_hub(repository, revision, err, notify)
    return _download(found, revision or "main", notify, progress)


def _download(found: Repository, revision: str, notify: Notify | None, progress: Progress | None) -> Path:
    """The folder of a commit in the Hub's cache, with everything that a conversion needs."""
    # By its branch, so that the Hub's cache knows its commit, for programs that are offline later.
    folder = _fetch(found, "config.json", revision).parent
    if folder.name != found.commit:  # the branch has moved since
        folder = _fetch(found, "config.json", found.commit).parent
    if INDEX_FILE in found.sizes:
        _fetch(found, INDEX_FILE, found.commit)
    needed = [*found.small_files, *(shards_of(folder) or found.weights)]
    if lost := [name for name in needed if name not in found.sizes]:
        raise CheckpointError(f"{found.name}: on the Hub it lacks {names(lost)}, which {INDEX_FILE} names")
    if missing := [name for name in needed if file_size(folder / name) != found.sizes[name]]:
        total = sum(found.sizes[name] for name in missing)
        if (free := shutil.disk_usage(folder).free) < total:
            raise CheckpointError(
                f"{found.name}: the download takes {readable_bytes(total)}, but only {readable_bytes(free)} are free "
                f"in {folder.parents[2]}; HF_HOME chooses another folder"
            )
        if notify:
            notify(f"downloading {found.name} from the Hub: {readable_bytes(total)}; {found.licence}")
        with _reporting(folder.parents[1] / "blobs", total, progress):
            for name in missing:
                _fetch(found, name, found.commit, again=(folder / name).exists())
    return folder


def _fetch(repository: Repository, file: str, revision: str, *, again: bool = False) -> Path:
    """The path of a file in the Hub's cache; downloads it if it is not there, or `again`."""
    from huggingface_hub import hf_hub_download

    try:
        with explained(repository.name, revision):
            return Path(hf_hub_download(repository.name, file, revision=revision, force_download=again))
    except RefusedError:
        raise
    except NoAnswerError as err:
        raise CheckpointError(
            f"{repository.name}: {file} cannot be downloaded: {printable(err.__cause__)}; try again"
        ) from err


@contextmanager
def _reporting(blobs: Path, total: int, progress: Progress | None) -> Iterator[None]:
    """Reports how far the downloads within a `with` block are, by the size of the folder that they go to.

    Without `progress`, the Hub's client shows its own bars.
    """
    if progress is None:
        yield
        return

    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before, ended = _bytes_on_disk(blobs), threading.Event()

    def report() -> None:
        while not ended.wait(_TICK):
            progress(min(max(_bytes_on_disk(blobs) - before, 0), total), total, "downloading")

    bars = not are_progress_bars_disabled()
    disable_progress_bars()
    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if bars:
            enable_progress_bars()


def _bytes_on_disk(folder: Path) -> int:
    """The bytes that the files in a folder take up, those that are being written too."""
    used = 0
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(OSError):
                used += path.lstat().st_blocks * 512
    return used


def newest_commit(repository: str, revision: str, *, timeout: float) -> str | None:
    """The commit that a branch or tag points to on the Hub; None if the Hub does not say so within `timeout` seconds.

    The request runs in a thread of its own, because looking up the Hub's address knows no time limit.
    """
    answers: list[str | None] = []

    def ask() -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its HTTP client, whichever

        with suppress(HTTPError, OSError, ValueError, KeyError, TypeError):  # the last three: a page that is no answer
            answers.append(HfApi().model_info(repository, revision=revision, timeout=timeout, expand=["sha"]).sha)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return answers[0] if answers else None


def without_hub(repository: str, revision: str | None, error: NoAnswerError, notify: Notify | None = None) -> Path:
    """The complete folder of a revision in the Hub's cache, where the Hub has answered with `error`.

    Raises:
        CheckpointError: If there is none; it names the files that are missing.
    """
    folder: Path | None = complete_snapshot(repository, revision, notify)
    if folder:
        return folder
    if isinstance(error, RefusedError):
        raise error
    partial = snapshots(repository, revision)
    state = f"in the Hub's cache without {names(missing_files(partial[0]))}" if partial else "not in the Hub's cache"
    raise CheckpointError(f"{repository}: no such folder, {state}, and {error}") from error


@contextmanager
def explained(repository: str, revision: str | None) -> Iterator[None]:
    """Turns the errors of the Hub's client within a `with` block into a `CheckpointError` that says what to do."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of its HTTP client, whichever
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as err:
        raise RefusedError(
            f"{repository}: accept its licence on huggingface.co, then log in with `hf auth login`"
        ) from err
    except RepositoryNotFoundError as err:
        raise RefusedError(
            f"{repository}: no such folder, and no such repository on the Hub (or a private one: `hf auth login`)"
        ) from err
    except RevisionNotFoundError as err:
        raise CheckpointError(f"{repository}: has no revision {printable(revision)}") from err
    except OfflineModeIsEnabled as err:
        raise NoAnswerError("the Hub is switched off (HF_HUB_OFFLINE)") from err
    except HFValidationError as err:
        raise CheckpointError(f"{repository}: cannot be a repository: {printable(err)}") from err
    except EntryNotFoundError as err:
        if not isinstance(err, LocalEntryNotFoundError):
            raise CheckpointError(f"{repository}: cannot be downloaded: {printable(err)}") from err
        raise NoAnswerError(f"the Hub cannot be reached ({printable(err.__cause__ or err)})") from err
    except (HTTPError, OSError, ValueError, KeyError, TypeError) as err:  # the last three: a page that is no answer
        raise NoAnswerError(f"the Hub cannot be reached ({printable(err)})") from err


def _licence(repository: str, card: Mapping[str, Any], files: Collection[str]) -> str:
    """The terms of use, from the model card or the names of files."""
    named = " ".join(str(card[key]) for key in ("license", "license_name") if card.get(key))
    if repository.startswith("apple/") or "apple-a" in named:
        return "Apple's research licence: for research only"
    if named:
        return f"licence: {printable(named)}"
    file = next((name for name in files if name.lower().startswith(("licen", "notice"))), None)
    return f"licence: see {file}" if file else "no licence is named"
