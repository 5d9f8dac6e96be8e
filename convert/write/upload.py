"""Uploads a converted checkpoint to the Hugging Face Hub."""

from pathlib import Path

from fastvlm_mlx.checkpoint.released import is_repository
from fastvlm_mlx.errors import ConversionError


def check_repository(repository: str) -> None:
    """Checks that a name is that of a repository.

    Raises:
        ConversionError: If it is not of the form `owner/name`.
    """
    if not is_repository(repository):
        raise ConversionError(f"{repository!r} cannot be uploaded to; write it as owner/name")


def upload(folder: Path, repository: str) -> str:
    """Uploads a folder, its model card included, to a repository, which is made if it does not exist.

    Returns:
        The URL of the repository.

    Raises:
        ConversionError: If the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of its HTTP client, whichever
        HfHubHTTPError,
        HTTPError,
    )

    check_repository(repository)
    try:
        api = HfApi()
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message=f"Upload {folder.name}")
    except (HfHubHTTPError, HTTPError, OSError) as err:
        raise ConversionError(f"{repository}: the upload failed ({err}); {folder} is complete") from err
    return str(url)
