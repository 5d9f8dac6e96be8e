"""Kills workers, servers and drivers of a large job at random moments: nothing is lost, and nothing is doubled.

python -m tests.stress.workers --way servers --pictures 2000 --kills 20 --seed 0

One process captions demo scenes first; its records are what is expected. Then two shards, two servers and their driver,
or the workers of two nodes of Ray and their driver, do the same, while one of them is ended with SIGKILL, or stopped
for a while, again and again. Whatever was ended is started again with the same command, as a supervisor would; Ray
starts its workers again itself. The last line is JSON: how many records differ, and how many seconds it took until
records were added again. The exit code is 1 if anything is wrong.
"""

import argparse
import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from demo.scenes import render
from fastvlm_mlx.jobs.merging import merge
from tests.stress.monitor import say

ROOT = Path(__file__).parents[2]
TASK = ("-n", "12", "--prompt", "What is in the picture?")
MODEL = ("--model", "demo", "--dtype", "float32")


def make_scenes(folder: Path, count: int) -> None:
    """Writes scenes in folders of 100, some of them twice."""
    for number in range(count):
        path = folder / f"{number // 100}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            seed = number - 1 if number % 50 == 49 else number
            render(Random(f"17/{seed}"), 200 + seed % 150)[0].save(path)


@dataclass
class Worker:
    """A process that is started again whenever it has ended too early.

    Attributes:
        arguments: Of `fastvlm`.
        log: What it writes to stderr.
        is_job: Whether it ends by itself when its work is done.
        core: The one that it may use, with one thread; None for all.
        starts: How often it was started.
    """

    arguments: tuple[str, ...]
    log: Path
    is_job: bool = True
    core: int | None = None
    starts: int = 0
    process: "subprocess.Popen[bytes] | None" = None
    done: bool = False
    codes: list[int] = field(default_factory=list)

    def start(self) -> None:
        self.starts += 1
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "fastvlm_mlx", *self.arguments]
            environment = dict(os.environ)
            if self.core is not None:
                command = ["taskset", "-c", str(self.core), *command]
                environment |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)

    def look_after(self) -> None:
        """Starts it again if it was killed."""
        assert self.process is not None
        code = self.process.poll()
        if code is None or self.done:
            return
        self.codes.append(code)
        if code == 0 and self.is_job:
            self.done = True
        elif code != -signal.SIGKILL:
            raise RuntimeError(f"{self.arguments}: ended with {code}: {self.log.read_text()[-500:]}")
        else:
            self.start()

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def shards(scenes: Path, here: Path) -> tuple[list[Worker], list[Path]]:
    """Two shards, each with its journal."""
    journals = [here / f"shard-{number}.jsonl" for number in (1, 2)]
    workers = [
        Worker(
            ("caption", str(scenes), *TASK, *MODEL, "--no-warm", "--shard", f"{number}/2", "-o", str(journal)),
            here / f"shard-{number}.log",
        )
        for number, journal in enumerate(journals, 1)
    ]
    return workers, journals


def servers(scenes: Path, here: Path) -> tuple[list[Worker], list[Path]]:
    """Two servers and a driver."""
    ports = free_ports(2)
    workers = [
        Worker(
            ("serve", "demo", "--dtype", "float32", "--port", str(port)),
            here / f"server-{port}.log",
            is_job=False,
        )
        for port in ports
    ]
    urls = ",".join(f"http://127.0.0.1:{port}" for port in ports)
    journal = here / "driver.jsonl"
    driver = Worker(("caption", str(scenes), *TASK, "--server", urls, "-o", str(journal)), here / "driver.log")
    return [*workers, driver], [journal]


def ray(scenes: Path, here: Path) -> tuple[list[Worker], list[Path]]:
    """A driver, for a cluster of two nodes that ends with this process."""
    from tests.cluster.conftest import TwoNodes

    cluster = TwoNodes()
    atexit.register(cluster.close)
    journal = here / "ray.jsonl"
    command = ("caption", str(scenes), *TASK, *MODEL, "--ray", cluster.address, "-o", str(journal))
    return [Worker(command, here / "ray.log")], [journal]


WAYS: dict[str, Callable[[Path, Path], tuple[list[Worker], list[Path]]]] = {
    "shards": shards,
    "servers": servers,
    "ray": ray,
}


def size_of(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.exists())


def run(workers: list[Worker], journals: list[Path], kills: int, rng: Random, seconds: float) -> list[dict[str, Any]]:
    """Runs workers to the end of their work, with faults meanwhile; returns what each fault was and did."""
    for worker in workers:
        if not worker.is_job:
            worker.start()
    wait_for_servers([worker for worker in workers if not worker.is_job])
    for worker in workers:
        if worker.is_job:
            worker.start()
    faults: list[dict[str, Any]] = []
    begun = time.monotonic()
    later = begun + rng.uniform(2, 3)
    pending: dict[str, Any] | None = None
    continues: list[tuple[float, int]] = []
    try:
        while not all(worker.done for worker in workers if worker.is_job):
            time.sleep(0.05)
            now = time.monotonic()
            if now - begun > seconds:
                raise RuntimeError(f"not done after {seconds} s")
            for worker in workers:
                worker.look_after()
            for moment, pid in list(continues):
                if now >= moment:
                    continues.remove((moment, pid))
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
            if pending is not None and size_of(pending["journals"]) > pending["size"]:
                faults.append({"what": pending["what"], "seconds": round(now - pending["at"], 2)})
                pending = None
            if now < later or pending is not None or len(faults) >= kills:
                continue
            victims = find_victims(workers, journals)
            if not victims:
                continue
            victim = rng.choice(victims)
            kind = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
            os.kill(victim.pid, kind)
            if kind is signal.SIGSTOP:
                continues.append((now + rng.uniform(0.5, 6), victim.pid))
            name = f"{kind.name} {victim.name}"
            pending = {"what": name, "at": now, "size": size_of(victim.journals), "journals": victim.journals}
            later = now + rng.uniform(0.3, 1.5)
    finally:
        for worker in workers:
            worker.end()
    return faults


class Victim(NamedTuple):
    """A process that may be killed, and the journals that show when its work goes on."""

    name: str
    pid: int
    journals: list[Path]


def find_victims(workers: list[Worker], journals: list[Path]) -> list[Victim]:
    """The processes that are at work: those of `workers`, and the ones that Ray has started."""
    victims = []
    for worker in workers:
        if not worker.done and worker.process is not None and worker.process.poll() is None:
            own = [path for path in journals if str(path) in worker.arguments] or journals
            victims.append(Victim(worker.arguments[0], worker.process.pid, own))
    if any("--ray" in worker.arguments for worker in workers):
        from tests.cluster.conftest import workers as workers_of_ray

        victims += [Victim("worker of Ray", pid, journals) for pid in workers_of_ray()]
    return victims


def wait_for_servers(workers: list[Worker]) -> None:
    for worker in workers:
        while b"ready" not in worker.log.read_bytes():
            time.sleep(0.1)


def captioned(workers: list[Worker]) -> list[str]:
    """What jobs have said at their end, such as `2000 captioned in 40.1 s, 50 pictures/s`."""
    lines = [line for worker in workers for line in worker.log.read_text().splitlines()]
    return [line for line in lines if " captioned in " in line]


def records(path: Path) -> dict[str, Any]:
    """The records of a merged journal by name, without what depends on the run."""
    found: dict[str, Any] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if "file" in record:
            assert record["file"] not in found, f"{record['file']} is there twice"
            own = ("fingerprint", "seconds", "duplicate_of")
            found[record["file"]] = {key: value for key, value in record.items() if key not in own}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--way", choices=("alone", *WAYS), default="shards")
    parser.add_argument("--pin", action="store_true", help="one core and one thread for each worker; needs taskset")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keeps the scenes and what is expected for another run")
    parser.add_argument("--seconds", type=float, default=3600)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        scenes, expected = folder / f"scenes-{arguments.pictures}", folder / f"expected-{arguments.pictures}.jsonl"
        make_scenes(scenes, arguments.pictures)
        here = Path(temporary) / "run"
        here.mkdir()
        command = ("caption", str(scenes), *TASK, *MODEL, "--no-warm", "-o", str(expected))
        alone = Worker(command, here / "alone.log", core=0 if arguments.pin else None)
        run([alone], [expected], 0, Random(), arguments.seconds)
        if arguments.way == "alone":
            say(json.dumps({"way": "alone", "captioned": captioned([alone])}))
            return
        workers, journals = WAYS[arguments.way](scenes, here)
        if arguments.pin:
            for core, worker in enumerate(workers[:2]):
                worker.core = core
        begun = time.monotonic()
        faults = run(workers, journals, arguments.kills, Random(arguments.seed), arguments.seconds)
        seconds = time.monotonic() - begun
        lines = sum(path.read_text().count('"file": ') for path in journals)
        merged = merge(journals, here / "all.jsonl")
        found, wanted = records(here / "all.jsonl"), records(expected)
        differing = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        for name in differing[:5]:
            say(f"{name}: {found.get(name)} instead of {wanted.get(name)}")
        took = sorted(fault["seconds"] for fault in faults)
        result = {
            "way": arguments.way,
            "pictures": len(wanted),
            "missing": merged.missing,
            "differing": len(differing),
            "doubled": lines - len(found),
            "starts": [worker.starts for worker in workers],
            "faults": faults,
            "recovery_median": took[len(took) // 2] if took else None,
            "recovery_most": took[-1] if took else None,
            "seconds": round(seconds, 1),
            "captioned": captioned([alone, *workers]),
        }
    say(json.dumps(result))
    sys.exit(bool(differing or merged.missing or result["doubled"] or len(faults) < arguments.kills))


if __name__ == "__main__":
    main()
