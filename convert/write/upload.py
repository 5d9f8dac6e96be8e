"""Pushes a converted checkpoint to the Hugging Face Hub."""

import re
from pathlib import Path

from fastvlm_mlx.errors import ConversionError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_repository(repository: str) -> None:
    """Lets the name of a repository pass.

    Raises:
        ConversionError: If it is not one.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise ConversionError(f"{repository!r} cannot be uploaded to; write it as owner/name")


def upload(folder: Path, repository: str) -> str:
    """Uploads a folder, its model card included, to a repository that is made if it does not exist; returns its URL.

    Raises:
        ConversionError: If the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_repository(repository)
    try:
        api = HfApi()
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message=f"Upload {folder.name}")
    except (HfHubHTTPError, OSError) as err:
        raise ConversionError(f"{repository}: the upload failed ({err}); {folder} is complete") from err
    return str(url)
