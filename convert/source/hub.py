"""Downloads checkpoints from the Hugging Face Hub, and explains its errors."""

import threading
from contextlib import suppress
from pathlib import Path

from fastvlm_mlx.errors import CheckpointError


def download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder of a repository in the Hub's cache; downloads the files that are missing there.

    If the Hub cannot be reached, files may still be missing, such as a licence that another program did not download.

    Args:
        repository: `owner/name`.
        revision: A branch, tag or commit; `main` by default.
        patterns: Of the files to download.

    Raises:
        CheckpointError: If there is no such repository or revision, access is refused, or the Hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of its HTTP client, whichever
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except GatedRepoError as err:
        raise CheckpointError(
            f"{repository}: accept its licence on huggingface.co, then log in with `hf auth login`"
        ) from err
    except RepositoryNotFoundError as err:
        raise CheckpointError(
            f"{repository}: no such folder, and no such repository on the Hub (or a private one: `hf auth login`)"
        ) from err
    except RevisionNotFoundError as err:
        raise CheckpointError(f"{repository}: has no revision {revision!r}") from err
    except LocalEntryNotFoundError as err:
        if incomplete := getattr(err, "snapshot_path", None):
            return Path(incomplete)
        raise CheckpointError(
            f"{repository}: no such folder, not in the Hub's cache, and the Hub cannot be reached "
            "(HF_HUB_OFFLINE set, or no network?)"
        ) from err
    except (HTTPError, HFValidationError, OSError) as err:
        raise CheckpointError(f"{repository}: cannot be downloaded: {err}") from err


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
