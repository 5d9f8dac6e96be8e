"""Joins a Ray cluster, or starts one on this machine, and keeps Ray's own output from the terminal."""

import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable

LOCAL = "local"
"""The address that starts a cluster on this machine, for this run."""
_AUTO = "auto"
"""The address of the cluster that this machine is part of."""
_PLACE = re.compile(r"(?P<host>[\w.-]+|\[[0-9a-fA-F:.]+\]):(?P<port>\d{1,5})")
_PATIENCE = 5.0
"""Seconds within which a cluster has to accept a connection."""
_OBJECT_BYTES = 256 << 20
"""Memory of a local cluster for pictures on their way."""


def ray_library() -> Any:
    """The module `ray`, which sends nobody statistics.

    Raises:
        ConfigError: If it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # which prints a stack when a run is ended
    try:
        import ray
    except ImportError as err:
        raise ConfigError("clusters need Ray; install it with: pip install 'fastvlm-mlx[ray]'") from err
    return ray


@contextmanager
def connected(address: str, *, cores: int | None = None) -> Iterator[Any]:
    """The module `ray` as part of a cluster, which is left at the end.

    A cluster that is started here ends with this process, however that ends. What it listens on demands a secret that
    only this process knows.

    Args:
        address: `local`, `auto` or HOST:PORT.
        cores: That a local cluster has; None for those of this process.

    Raises:
        ConfigError: If Ray is not installed, or nothing answers at the address.
    """
    _check_address(address)
    folder = None
    if address == LOCAL:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        folder = tempfile.mkdtemp(prefix="fastvlm-", dir="/tmp")  # a socket's path may have 107 bytes
    ray = ray_library()
    options: dict[str, Any] = {}
    if folder is not None:
        options = {
            "num_cpus": cores or _own_cores(),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_BYTES,
            "_temp_dir": folder,
        }
    try:
        with _no_output(ray):
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **options)
            except (ConnectionError, RuntimeError, ValueError, OSError, SystemExit) as err:
                reason = " ".join(str(err).split())
                raise ConfigError(f"--ray {printable(address)}: no cluster can be used there ({reason})") from err
            try:
                yield ray
            finally:
                ray.shutdown()
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _check_address(address: str) -> None:
    """Finds out at once whether something listens there; Ray takes two minutes, and ends the process.

    Raises:
        ConfigError: If nothing does, or that is no address.
    """
    if address in (LOCAL, _AUTO):
        return
    match = _PLACE.fullmatch(address)
    if match is None:
        raise ConfigError(
            f"--ray {printable(address)}: is no address; expected local, auto, or HOST:PORT of a cluster's head"
        )
    try:
        socket.create_connection((match["host"].strip("[]"), int(match["port"])), _PATIENCE).close()
    except (OSError, OverflowError) as err:
        raise ConfigError(
            f"--ray {printable(address)}: nothing answers there ({getattr(err, 'strerror', None) or err}); "
            "start a cluster with: ray start --head"
        ) from err


@contextmanager
def _no_output(ray: Any) -> Iterator[None]:
    """Keeps what Ray has to say about workers from stdout; the engine says what matters."""
    worker, logger = ray._private.worker, logging.getLogger("ray")
    before, level = getattr(worker, "_worker_logs_enabled", True), logger.level
    worker._worker_logs_enabled = False
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        worker._worker_logs_enabled = before
        logger.setLevel(level)


def _own_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
