"""Who holds the model that answers `fastvlm caption`: a cluster, servers, the background server, or this process."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastvlm_mlx.cli.options import DType
from fastvlm_mlx.cli.terminal import ByteProgress, LiveLine, note, slow_note, warn_of_slow_blas
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.formatting import printable

if TYPE_CHECKING:
    from fastvlm_mlx.cli.clustering import Cluster
    from fastvlm_mlx.generation.engine import Engine
    from fastvlm_mlx.jobs.asking import Answers
    from fastvlm_mlx.jobs.fleet import Fleet
    from fastvlm_mlx.warm.client import Warm

_PREFIX_BYTES = 32 << 20
"""For the questions about the pictures at work; a picture that is done is not asked about again."""


class Holder(NamedTuple):
    """Who holds the model and answers, and how.

    Attributes:
        model: The name of the model.
        revision: Branch, tag or commit of a Hub id.
        dtype: What the weights are loaded as; None for what the machine computes in.
        identity: What the answers depend on; None if the model is not on this machine yet.
        folder: Of the model; None if it was not looked for, since a server holds the model.
        server: The background server that holds the model; None if there is none.
        fleet: The servers that the user has named; None if this machine answers.
        cluster: Whose workers answer; None for this process, `server` or `fleet`.
        schema: What answers follow.
        batch: The most pictures at a time; None for what suits the machine.
    """

    model: str
    revision: str | None
    dtype: DType | None
    identity: Mapping[str, str] | None
    folder: Path | None = None
    server: "Warm | None" = None
    fleet: "Fleet | None" = None
    cluster: "Cluster | None" = None
    schema: Any = None
    batch: int | None = None


def find_holder(
    model: str,
    revision: str | None,
    dtype: DType | None,
    *,
    fleet: "Fleet | None",
    cluster: "Cluster | None",
    schema: Any,
    batch: int | None,
    warm: bool,
    fetch: bool,
) -> Holder:
    """The servers or the cluster that are named, else the background server, else this process.

    Args:
        model: The name of the model.
        revision: Branch, tag or commit of a Hub id.
        dtype: What to load the weights as.
        fleet: The servers that the user has named.
        cluster: The cluster that the user has named.
        schema: What answers follow.
        batch: The most pictures at a time.
        warm: Whether the background server may answer.
        fetch: Whether a model that is not on this machine is fetched or converted.
    """
    from fastvlm_mlx.warm.client import Holding, find_warm

    holder = Holder(model, revision, dtype, None, fleet=fleet, cluster=cluster, schema=schema, batch=batch)
    if fleet is not None:
        holds = fleet.holds
        return holder._replace(model=holds.name, identity={"weights": holds.weights, "dtype": holds.dtype})
    if warm and cluster is None:
        holding = Holding(model=model, revision=revision, dtype=dtype.value if dtype else None)
        if (server := find_warm(holding)) is not None:
            return holder._replace(server=server, identity={"weights": server.weights, "dtype": server.dtype})
    folder = folder_of(model, revision) if fetch else found_folder(model, revision)
    return holder._replace(folder=folder, identity=None if folder is None else identity(folder, dtype))


def found_folder(model: str, revision: str | None) -> Path | None:
    """The folder of the model if it is on this machine."""
    from fastvlm_mlx.resolve import check_names, find

    check_names([(model, revision)])
    return find(model, revision=revision)


def folder_of(model: str, revision: str | None) -> Path:
    """The folder of the model, which is fetched or converted if necessary."""
    from fastvlm_mlx.resolve import resolve

    with ByteProgress() as progress:
        return resolve(model, revision=revision, notify=note, progress=progress)


def identity(folder: Path, dtype: DType | None) -> dict[str, str]:
    """What a model's answers depend on: its files, and what it computes in."""
    from fastvlm_mlx.backend import compute_dtype
    from fastvlm_mlx.config import ModelConfig
    from fastvlm_mlx.jobs.fingerprints import checkpoint_fingerprint
    from fastvlm_mlx.machine import cache_folder

    with ByteProgress() as progress:
        weights = checkpoint_fingerprint(folder, cache_folder() / "digests.json", progress)
    computes = dtype.value if dtype else str(compute_dtype(ModelConfig.from_path(folder).dtype)).rpartition(".")[2]
    return {"weights": weights, "dtype": computes}


def opened(holder: Holder, line: LiveLine) -> "AbstractContextManager[Answers]":
    """The engine of whoever answers."""
    if holder.cluster is not None:
        from fastvlm_mlx.cli.clustering import clustered
        from fastvlm_mlx.cluster.identity import Model

        model = Model(holder.model, holder.revision, holder.dtype.value if holder.dtype else None)
        return clustered(holder.cluster, model, holder.identity or {}, holder.batch, line)
    if holder.fleet is not None:
        return nullcontext(holder.fleet)
    return _warm(holder.server, holder) if holder.server else loaded(holder, line)


@contextmanager
def _warm(server: "Warm", holder: Holder) -> "Iterator[Answers]":
    """Answers from the background server."""
    from fastvlm_mlx.warm.engine import WarmEngine

    if server.slow:
        note(slow_note(server.slow))
    with WarmEngine(server, max_batch=holder.batch, schema=holder.schema) as engine:
        yield engine


@contextmanager
def loaded(holder: Holder, line: LiveLine) -> "Iterator[Engine]":
    """Answers from this process, which loads the model.

    Raises:
        CheckpointError: If it is not the one that the background server has held.
    """
    from fastvlm_mlx.engine.prefix_cache import PrefixCache
    from fastvlm_mlx.generation.engine import Engine
    from fastvlm_mlx.resolve import load

    folder = holder.folder
    if folder is None:
        folder = folder_of(holder.model, holder.revision)
        if identity(folder, holder.dtype) != holder.identity:
            raise CheckpointError(f"{printable(holder.model)}: has changed during the run; run the command again")
    else:
        warn_of_slow_blas()
    line.wait_for(f"loading {holder.model}")
    network, processor = load(folder, dtype=holder.dtype.value if holder.dtype else None)
    prefixes = PrefixCache(_PREFIX_BYTES)
    with Engine(network, processor, max_batch=holder.batch or "auto", prefix_cache=prefixes) as engine:
        yield engine
