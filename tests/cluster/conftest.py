import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'fastvlm-mlx[ray]'"
)
ROOT = Path(__file__).parent.parent.parent
PATIENCE = 300
"""Seconds for a run on a busy machine."""
ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "FASTVLM_WARM": "0"}


def patiently(start: Callable[[], Any]) -> Any:
    """What a function starts; again where Ray has given up after 30 seconds, as on a busy machine."""
    for _ in range(4):
        try:
            return start()
        except Exception as error:  # Ray has no other kind for it
            if "timed out during startup" not in str(error):
                raise
    return start()


class TwoNodes:
    """A cluster of two raylets with a core each; `address` is what --ray takes."""

    def __init__(self) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
        self._cluster: Any = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        self.address: str = self._cluster.address
        self.second: Any = None
        self.add()

    def add(self, **options: Any) -> Any:
        options = {"num_cpus": 1, "object_store_memory": 100 << 20, **options}
        self.second = patiently(lambda: self._cluster.add_node(**options))
        return self.second

    def remove(self) -> None:
        """Ends the second node as a power cut would."""
        self._cluster.remove_node(self.second, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="session")
def two_nodes() -> Iterator[TwoNodes]:
    cluster = TwoNodes()
    yield cluster
    cluster.close()


def start(*arguments: str | Path, **options: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "fastvlm_mlx", "caption", *map(str, arguments), "--model", "demo"]
    return subprocess.Popen(
        command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def run(*arguments: str | Path, **options: Any) -> "subprocess.CompletedProcess[str]":
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def workers() -> list[int]:
    """The processes below this one that hold a model for a cluster; another test run may have some, too."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,command="], capture_output=True, text=True, check=True).stdout
    lines = [line.split(None, 2) for line in listed.splitlines()]
    parents = {int(pid): int(parent) for pid, parent, *_ in lines}
    found = [int(line[0]) for line in lines if line[-1].startswith("ray::Worker")]
    return [pid for pid in found if os.getpid() in _above(pid, parents)]


def _above(pid: int, parents: dict[int, int]) -> list[int]:
    """The parent of a process, its parent, and so on."""
    above: list[int] = []
    while pid in parents and pid not in above:
        above.append(pid)
        pid = parents[pid]
    return above


def wait_until(is_so: Callable[[], bool], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)
