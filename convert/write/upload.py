"""Uploads a converted checkpoint to the Hugging Face Hub."""

from pathlib import Path

from fastvlm_mlx.checkpoint.released import is_repository
from fastvlm_mlx.convert.write.card import for_repository
from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.formatting import printable


def check_repository(repository: str) -> None:
    """Checks that a name is that of a repository.

    Raises:
        ConversionError: If it is not of the form `owner/name`.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
        if is_repository(repository):
            return
        reason = "write it as owner/name"
    except HFValidationError as err:
        reason = "write it as owner/name" if "/" not in repository else printable(err)
    raise ConversionError(f"{printable(repository)!r} cannot be uploaded to; {reason}")


def is_logged_in() -> bool:
    """Whether there is a token for the Hub, without which nothing can be uploaded."""
    from huggingface_hub import get_token

    return get_token() is not None


def upload(folder: Path, repository: str) -> str:
    """Uploads a folder to a repository, which is made if it does not exist and which its model card then names.

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
        if (readme := folder / "README.md").is_file():
            readme.write_text(for_repository(readme.read_text(encoding="utf-8"), repository), encoding="utf-8")
        api = HfApi()
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message=f"Upload {folder.name}")
    except (HfHubHTTPError, HTTPError, OSError, RuntimeError) as err:  # RuntimeError: of its client in Rust
        raise ConversionError(
            f"{repository}: the upload failed ({printable(err)}); the folder {folder} is complete: upload it with "
            f"`hf upload {repository} {folder}`"
        ) from err
    return str(url)
