"""The machines of a cluster: what each has, whether it would answer as this one does, and its workers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastvlm_mlx.cluster.identity import Identity, Model, check, identity
from fastvlm_mlx.cluster.worker import Worker, host
from fastvlm_mlx.errors import CheckpointError, ConfigError, FastVLMError

_CORES = 4
"""Of a worker on a CPU; a model gains little from more."""
CALLS = 8
"""Calls with questions that a worker takes at the same time."""


class Found(NamedTuple):
    """What a machine says of itself.

    Attributes:
        node: Ray's name of it.
        host: Its own name.
        identity: What it would answer with.
        on_gpu: Whether MLX computes on a GPU there.
        weights: Bytes that the model takes, as it is computed with.
    """

    node: str
    host: str
    identity: Identity
    on_gpu: bool
    weights: int


class Share(NamedTuple):
    """The workers of a machine.

    Attributes:
        found: The machine.
        workers: How many.
        cores: Of each.
        gpus: Of each, as Ray counts them.
    """

    found: Found
    workers: int
    cores: int
    gpus: int


def _look(node: str, model: Model) -> Found | FastVLMError:
    """Runs on each machine."""
    try:
        return describe_node(node, model)
    except FastVLMError as err:
        return err


def describe_node(node: str, model: Model) -> Found:
    """What this machine says of itself.

    Raises:
        CheckpointError: If the model is not there, and cannot be made.
    """
    from fastvlm_mlx.backend import device
    from fastvlm_mlx.checkpoint.folder import weight_files
    from fastvlm_mlx.config import ModelConfig
    from fastvlm_mlx.resolve import resolve

    known = identity(model)
    folder = resolve(model.name, revision=model.revision)
    stored = sum(file.stat().st_size for file in weight_files(folder))
    grows = known["dtype"] == "float32" and ModelConfig.from_path(folder).dtype != "float32"
    return Found(node, host(), known, device() == "gpu", stored * (1 + grows))


def find_nodes(ray: Any, model: Model, expected: Identity) -> list[Found]:
    """All machines of the cluster, each of which would answer as this one does.

    Raises:
        ConfigError: If one would not, or cannot say.
    """
    alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    look = ray.remote(_look)
    answers = [
        look.options(num_cpus=0, max_retries=2, scheduling_strategy=_only_on(ray, node["NodeID"])).remote(
            node["NodeID"], model
        )
        for node in alive
    ]
    found = []
    for node, answer in zip(alive, answers, strict=True):
        name = node["NodeManagerHostname"]
        try:
            said = ray.get(answer)
        except ray.exceptions.RayError as err:
            if not _is_alive(ray, node["NodeID"]):
                continue
            reason = str(getattr(err, "cause", None) or err).strip().splitlines()[-1]
            raise ConfigError(f"{name}: cannot run fastvlm-mlx ({reason}); install the same there") from err
        if isinstance(said, FastVLMError):
            raise CheckpointError(f"{name}: {said}")
        check(expected, said.identity, name)
        found.append(said)
    if not found:
        raise ConfigError("the cluster has no machine with a free core")
    return found


def _is_alive(ray: Any, node: str) -> bool:
    return any(each["NodeID"] == node and each["Alive"] for each in ray.nodes())


def share_out(found: Sequence[Found], resources: Sequence[dict[str, Any]], cores: int | None) -> list[Share]:
    """The workers that each machine gets: one for each GPU, or as many as its cores and its memory allow.

    Args:
        found: The machines.
        resources: What Ray says that each has.
        cores: Of each worker on a CPU; None for up to four.
    """
    shares = []
    for machine, has in zip(found, resources, strict=True):
        cpus = max(1, int(has.get("CPU", 1)))
        if machine.on_gpu:
            gpus = int(has.get("GPU", 0))  # Ray counts those of NVIDIA; a Mac has one
            shares.append(Share(machine, max(1, gpus), max(1, cpus // max(1, gpus)), min(gpus, 1)))
            continue
        each = min(cores or _CORES, cpus)
        fitting = int(has.get("memory", 0)) // max(1, machine.weights) if has.get("memory") else cpus
        shares.append(Share(machine, max(1, min(cpus // each, fitting)), each, 0))
    return shares


def start_workers(
    ray: Any, shares: Sequence[Share], model: Model, expected: Identity, max_batch: int | None
) -> list[Any]:
    """The actors; Ray starts those again that end, on another machine if theirs has gone."""
    actor = ray.remote(Worker)
    return [
        actor.options(
            num_cpus=share.cores,
            num_gpus=share.gpus,
            max_restarts=-1,
            max_concurrency=CALLS + 1,  # and `ready`
            scheduling_strategy=_soon_on(ray, share.found.node),
        ).remote(model, expected, threads=share.cores, max_batch=max_batch)
        for share in shares
        for _ in range(share.workers)
    ]


def resources_of(ray: Any, found: Sequence[Found]) -> list[dict[str, Any]]:
    """What Ray says that machines have."""
    by_node = {node["NodeID"]: node["Resources"] for node in ray.nodes()}
    return [by_node.get(machine.node, {}) for machine in found]


def _only_on(ray: Any, node: str) -> Any:
    return ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)


def _soon_on(ray: Any, node: str) -> Any:
    return ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=True)
