"""Names of checkpoints: Apple's released models and their sizes, the bundled demo, folders, archives and Hub ids."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fastvlm_mlx.arguments import StrPath, file_path
from fastvlm_mlx.config import ActivationScales, ModelConfig, TextConfig, VisionConfig
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.formatting import printable

ALIASES = {"0.5b": "apple/FastVLM-0.5B", "1.5b": "apple/FastVLM-1.5B", "7b": "apple/FastVLM-7B"}
"""Short names of Apple's released checkpoints."""
DEMO = "demo"
"""The name of the small checkpoint inside the package; it takes precedence over a folder of the same name."""

_DECODERS = {
    "0.5b": TextConfig(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
    ),
    "1.5b": TextConfig(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
    ),
    "7b": TextConfig(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
}
SIZES = tuple(_DECODERS)
"""The released sizes."""

_END_TOKENS = (151645, 151643)  # <|im_end|> and <|endoftext|> of Qwen2
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a checkpoint is: on disk or on the Hub.

    Attributes:
        name: The name as given; of a checkpoint on the Hub its id, `owner/name`.
        path: The folder or file on disk; None for a checkpoint on the Hub.
        bundled: Whether it is the checkpoint inside the package.
    """

    name: str
    path: Path | None
    bundled: bool = False

    def check_revision(self, revision: str | None) -> None:
        """Checks that a revision is not given for a checkpoint on disk.

        Raises:
            CheckpointError: If it is.
        """
        if self.path is not None and revision is not None:
            raise CheckpointError(
                f"{printable(self.name)}: is on this disk, where revision {printable(revision)!r} would change "
                "nothing; leave it out or give a Hub id"
            )


def parse_name(name: StrPath) -> Location:
    """Finds a checkpoint by its name, without asking the Hub.

    Args:
        name: `demo`, a folder, a file, an alias (`0.5b`, `1.5b`, `7b`) or a Hub id (`owner/name`). What exists on disk
            takes precedence, except over `demo`; a folder of that name is `./demo`. A `Path` is only looked up on disk.

    Raises:
        ConfigError: If `name` is neither a text nor a path.
        CheckpointError: If `name` is empty, or neither exists on disk nor can be a Hub id.
    """
    name = name if isinstance(name, str) else file_path(name, "the name of a checkpoint")
    text = str(name)
    if not text.strip():
        raise CheckpointError(f"the name of the checkpoint is empty; give a folder, a .zip, a Hub id or {_choices()}")
    if folder := bundled_checkpoint(name):
        return Location(name=text, path=folder, bundled=True)
    path = os.path.expanduser(text)  # unlike `Path.expanduser`, leaves `~` alone where there is no home folder
    if os.path.exists(path):
        return Location(name=text, path=Path(path))
    repository = ALIASES.get(text.lower(), text)
    if isinstance(name, str) and is_repository(repository) and not repository.endswith(".zip"):
        return Location(name=repository, path=None)
    raise CheckpointError(
        f"{printable(text)}: no such folder or .zip archive, and neither a Hub id (owner/name) nor {_choices()}"
    )


def is_repository(name: str) -> bool:
    """Whether `name` has the form of a Hub id, `owner/name`."""
    return _REPOSITORY.fullmatch(name) is not None


def _choices() -> str:
    return f"one of {', '.join((DEMO, *ALIASES))}"


def bundled_checkpoint(name: str | Path) -> Path | None:
    """The folder of the checkpoint inside the package, in its source's layout; None for every name but `demo`."""
    bundled = isinstance(name, str) and name.lower() == DEMO
    return Path(__file__).parent.parent / "demo_model" if bundled else None


def full_size(size: str, dtype: str = "float16") -> ModelConfig:
    """The architecture of the released model of `size`: `0.5b`, `1.5b` or `7b`."""
    return ModelConfig(
        vision_config=VisionConfig(scales=ActivationScales.ones(VisionConfig.depths)),
        text_config=_DECODERS[size],
        dtype=dtype,
        eos_token_id=_END_TOKENS,
    )
