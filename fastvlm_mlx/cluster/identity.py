"""What a machine answers with: all of it has to be equal on every machine of a job."""

import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import NamedTuple

from fastvlm_mlx import __version__
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable

Identity = Mapping[str, str]
"""Versions, the fingerprint of the weights, and the type that is computed in."""

_WHAT = {
    "version": ("runs fastvlm-mlx {found}, not {expected}", "install the same there"),
    "mlx": ("runs MLX {found}, not {expected}", "install the same there"),
    "weights": ("has other files under the name of the model", "copy the model, or give a Hub id with --revision"),
    "dtype": ("computes in {found}, not in {expected}", "set one for all with --dtype"),
}


class Model(NamedTuple):
    """The model that each machine loads.

    Attributes:
        name: A Hub id, an alias, or a folder that all machines see.
        revision: Branch, tag or commit of a Hub id.
        dtype: What to compute in; None for what suits the machine.
    """

    name: str
    revision: str | None = None
    dtype: str | None = None

    def everywhere(self) -> "Model":
        """The same with the whole path of a folder, as each machine has a working directory of its own."""
        from fastvlm_mlx.checkpoint.released import parse_name

        location = parse_name(self.name)
        is_here = location.path is not None and not location.bundled
        return self._replace(name=os.path.abspath(location.path or "")) if is_here else self


def identity(model: Model) -> dict[str, str]:
    """What this machine answers with; fetches and converts the model if it is not here.

    Raises:
        CheckpointError: If there is no such model.
    """
    from fastvlm_mlx.backend import compute_dtype
    from fastvlm_mlx.config import ModelConfig
    from fastvlm_mlx.jobs.fingerprints import checkpoint_fingerprint
    from fastvlm_mlx.machine import cache_folder
    from fastvlm_mlx.resolve import resolve

    folder = resolve(model.name, revision=model.revision)
    computes = model.dtype or str(compute_dtype(ModelConfig.from_path(folder).dtype)).rpartition(".")[2]
    weights = checkpoint_fingerprint(folder, cache_folder() / "digests.json")
    return with_versions({"weights": weights, "dtype": computes})


def with_versions(known: Mapping[str, str]) -> dict[str, str]:
    """An identity of this machine, whose weights and type are known."""
    return {"version": __version__, "mlx": version("mlx"), **known}


def check(expected: Identity, found: Identity, where: str) -> None:
    """Refuses a machine that would answer in another way.

    Args:
        expected: The identity of the machine that gives the work.
        found: That of the machine `where`.
        where: Its name in the message.

    Raises:
        ConfigError: If they differ.
    """
    for key, (problem, remedy) in _WHAT.items():
        if expected.get(key) != found.get(key):
            shown = {"expected": printable(expected.get(key), 40), "found": printable(found.get(key), 40)}
            raise ConfigError(f"{printable(where)}: {problem.format(**shown)}; {remedy}")
