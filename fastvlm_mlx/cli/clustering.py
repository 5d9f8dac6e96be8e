"""The run of `fastvlm caption --ray`: its cluster, and the workers there."""

from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from fastvlm_mlx.cli.terminal import LiveLine, note
from fastvlm_mlx.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastvlm_mlx.cluster.engine import ClusterEngine
    from fastvlm_mlx.cluster.identity import Model


class Cluster(NamedTuple):
    """The options that say which cluster.

    Attributes:
        address: `local`, `auto` or HOST:PORT.
        cores: Of each worker on a CPU; None for up to four.
    """

    address: str
    cores: int | None = None


@contextmanager
def clustered(
    cluster: Cluster, model: "Model", known: "Mapping[str, str]", batch: int | None, line: LiveLine
) -> "Iterator[ClusterEngine]":
    """Answers from the workers of a cluster, each of which would answer as this machine does.

    Args:
        cluster: Which.
        model: What each worker loads.
        known: The weights and the dtype of this machine.
        batch: The most pictures at a time in each worker.
        line: Where waiting shows.

    Raises:
        ConfigError: If there is no such cluster, or a machine would answer in another way.
    """
    from fastvlm_mlx.cluster.connection import connected
    from fastvlm_mlx.cluster.engine import ClusterEngine
    from fastvlm_mlx.cluster.identity import with_versions
    from fastvlm_mlx.cluster.nodes import find_nodes, resources_of, share_out, start_workers

    line.wait_for("starting Ray" if cluster.address == "local" else f"joining {cluster.address}")
    with connected(cluster.address) as ray:
        line.wait_for("comparing the machines")
        model, expected = model.everywhere(), with_versions(known)
        found = find_nodes(ray, model, expected)
        shares = share_out(found, resources_of(ray, found), cluster.cores)
        count = sum(share.workers for share in shares)
        workers = ", ".join(f"{share.workers} on {share.found.host}" for share in shares)
        note(f"Ray: {count} worker{'s' * (count != 1)} ({workers})")
        line.wait_for(f"loading {model.name}")
        with ClusterEngine(ray, start_workers(ray, shares, model, expected, batch), note) as engine:
            try:
                yield engine
            except CancelledError as err:
                raise engine.failure or ConfigError("the cluster does not answer any more") from err
