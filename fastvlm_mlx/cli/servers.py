"""The servers that `fastvlm caption --server` names."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fastvlm_mlx.cli.terminal import note
from fastvlm_mlx.cli.usage import usage_errors
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable

if TYPE_CHECKING:
    from fastvlm_mlx.jobs.exchange import Address
    from fastvlm_mlx.jobs.fleet import Fleet

KEY_VARIABLE = "FASTVLM_API_KEY"
_LONGEST_KEY = 1000


def read_addresses(texts: Sequence[str]) -> "list[Address]":
    """The addresses in texts such as `http://a:8000,http://b:8000`, each once."""
    from fastvlm_mlx.jobs.exchange import Address

    urls = [url for text in texts for url in text.split(",") if url.strip()]
    if texts and not urls:
        raise typer.BadParameter("is empty; give addresses like http://10.0.0.2:8000", param_hint="--server")
    with usage_errors("--server"):
        return list(dict.fromkeys(map(Address.parse, urls)))


def connect(
    addresses: "Sequence[Address]", key_file: Path | None, model: str, schema: Any, most: int | None
) -> "Fleet":
    """The servers, which all hold the same model: that one, if `model` names one.

    Raises:
        ServerError: If they do not, or none answers.
        ConfigError: If there is no key in the file.
    """
    from fastvlm_mlx.jobs.fleet import Fleet

    fleet = Fleet(addresses, key=_key(key_file), schema=schema, most=most, notify=note)
    if model:
        fleet.check_model(model)
    return fleet


def _key(file: Path | None) -> str:
    """The first key in a file, or else in the environment; empty if there is none. No message holds it.

    Raises:
        ConfigError: If the file has none, or a key could not be in a header.
    """
    where, text = KEY_VARIABLE, os.environ.get(KEY_VARIABLE, "").replace(",", "\n")
    if file is not None:
        where = printable(file)
        try:
            text = file.read_bytes()[: 100 * _LONGEST_KEY].decode("latin-1")
        except OSError as err:
            raise ConfigError(f"{where}: cannot be read ({err.strerror or err}); it should have the key") from err
    keys = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not keys and file is not None:
        raise ConfigError(f"{where}: has no key; expected one on the first line")
    if keys and not (keys[0].isascii() and keys[0].isprintable() and " " not in keys[0]):
        raise ConfigError(f"{where}: the key has other signs than printable ASCII without spaces")
    return keys[0] if keys else ""
