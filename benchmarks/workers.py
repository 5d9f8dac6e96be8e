"""Measures what a second worker gains: as a shard, as a server, and as a worker of Ray, beside one process alone.

Each worker has one thread and a core of its own, and what drives servers or Ray uses both cores. A run of many pictures
pays for its start once, so a start and a rate are told apart: the rate is that of the pictures between the first and
the last tenth, and the start what the whole command takes besides. Processor time is that of all processes of a way, by
their part in it (Linux).

    python benchmarks/workers.py --pictures 2000                              # demo scenes; about 4 minutes
    python benchmarks/workers.py --model 0.5b --pictures 120 --rounds 1       # 256 px; about 6 minutes
    python benchmarks/workers.py --sleep 0.5 --pictures 120 --ways shards ray   # workers that only wait
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "demo"))

from scenes import render  # noqa: E402

from fastvlm_mlx.machine import describe  # noqa: E402

WAYS = ("alone", "shards", "servers", "ray")
TASK = ("-n", "12", "--prompt", "What is in the picture?")
MARK = "FASTVLM_BENCHMARK"
ROLES = {
    "raylet/raylet": "raylet",
    "gcs_server": "GCS",
    "agent": "agents",
    "monitor": "monitors",
    "ray::IDLE": "idle workers",
    "default_worker": "idle workers",
    "ray::": "workers",
    "serve": "workers",
    "--shard": "workers",
}
"""What a command line holds, and the part that its process has; the first that fits."""
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100

ASLEEP = """
import importlib.abc, importlib.util, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "fastvlm_mlx.generation.engine":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            import asleep
            asleep.put_to_sleep(module.Engine)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
"""Makes each Python of a run answer without a model, after a while."""


def make_scenes(folder: Path, count: int) -> Path:
    """A folder with so many demo scenes, those that exist kept."""
    for number in range(count):
        path = folder / f"{number // 100:03}" / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            render(Random(f"workers/{number}"), 200 + number % 150)[0].save(path)
    return folder


class Clock:
    """What the processes of a run have done: those with its mark in their environment."""

    def __init__(self, mark: str) -> None:
        self._mark = f"{MARK}={mark}".encode()
        self._seconds: dict[str, tuple[str, float]] = {}
        self._others: set[str] = set()
        self._cores: dict[str, int] = {}

    def look(self) -> None:
        """Notes the processor time of the processes that run now."""
        for entry in Path("/proc").glob("[0-9]*"):
            if entry.name in self._others:
                continue
            try:
                if entry.name not in self._seconds and self._mark not in (entry / "environ").read_bytes():
                    self._others.add(entry.name)
                    continue
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            role = next((role for part, role in ROLES.items() if part in command), "driver")
            known = self._seconds.get(entry.name, (role, 0.0))
            if command.startswith("ray::Worker"):
                self._pin(entry)
            seconds = sum(map(int, fields[11:13])) / TICKS
            self._seconds[entry.name] = (role if command else known[0], seconds)

    def _pin(self, process: Path) -> None:
        """Gives a worker of Ray a core of its own, as shards have; the system would move it about."""
        core = self._cores.setdefault(process.name, len(self._cores) % 2)
        for thread in (process / "task").iterdir():
            with suppress(OSError):
                os.sched_setaffinity(int(thread.name), {core})

    def seconds(self) -> dict[str, float]:
        """Of each role."""
        total: dict[str, float] = {}
        for role, seconds in self._seconds.values():
            total[role] = total.get(role, 0.0) + seconds
        return {role: round(seconds, 2) for role, seconds in sorted(total.items())}


class Bench:
    """Runs the ways.

    Args:
        command: Of each run, without how it is divided.
        pictures: How many there are.
        folder: For what the runs write.
        environment: Of the workers.
    """

    def __init__(self, command: Sequence[str], pictures: int, folder: Path, environment: dict[str, str]) -> None:
        self._command, self._pictures, self._folder = command, pictures, folder
        self._environment = environment
        self._runs = 0

    def _start(self, cores: str, *arguments: str, name: str) -> "subprocess.Popen[bytes]":
        pinned = ["taskset", "-c", cores] if sys.platform == "linux" else []
        with (self._folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [*pinned, sys.executable, "-m", "fastvlm_mlx", *arguments],
                env={**os.environ, **self._environment, MARK: str(self._runs)},
                stdout=log,
                stderr=log,
            )

    @contextmanager
    def _servers(self, model: Sequence[str]) -> Iterator[str]:
        """Two servers that are ready; yields what --server takes."""
        ports = (18461, 18462)
        logs = [self._folder / f"server-{port}.log" for port in ports]
        for log in logs:
            log.unlink(missing_ok=True)
        servers = [
            self._start(str(core), "serve", *model, "--port", str(port), name=f"server-{port}")
            for core, port in enumerate(ports)
        ]
        try:
            while not all(b"ready" in log.read_bytes() for log in logs if log.exists()):
                if any(server.poll() is not None for server in servers):
                    raise SystemExit(f"a server has ended: {logs}")
                time.sleep(0.1)
            yield ",".join(f"http://127.0.0.1:{port}" for port in ports)
        finally:
            for server in servers:
                server.terminate()
                server.wait()

    def run(self, way: str, model: Sequence[str], options: Sequence[str]) -> dict[str, Any]:
        """Runs one way, and says how long what took."""
        self._runs += 1
        named = (*options, "--no-warm", "--model", model[0], *model[1:])
        if way == "servers":
            with self._servers(model) as addresses:
                return self._measure([("0,1", (*options, "--server", addresses))])
        starts = {
            "alone": [("0", named)],
            "shards": [(str(core), (*named, "--shard", f"{core + 1}/2")) for core in (0, 1)],
            "ray": [("0,1", (*named, "--ray", "local", "--ray-cores", "1"))],
        }
        return self._measure(starts[way])

    def _measure(self, starts: Sequence[tuple[str, Sequence[str]]]) -> dict[str, Any]:
        journals = [self._folder / f"{self._runs}-{number}.jsonl" for number in range(len(starts))]
        clock, begun = Clock(str(self._runs)), time.monotonic()
        processes = [
            self._start(cores, *self._command, *arguments, "-o", str(journal), name=journal.stem)
            for (cores, arguments), journal in zip(starts, journals, strict=True)
        ]
        moments = [0.0] * self._pictures
        seen, looked = 0, 0.0
        open_files: dict[Path, Any] = {}
        counts: Counter[Path] = Counter()
        while True:
            done = all(process.poll() is not None for process in processes)
            now = time.monotonic() - begun
            for journal in journals:
                if journal not in open_files and journal.exists():
                    open_files[journal] = journal.open("rb")
                if journal in open_files:
                    counts[journal] += open_files[journal].read().count(b'"file": ')
            total = min(sum(counts.values()), self._pictures)
            moments[seen:total] = [now] * (total - seen)
            seen = total
            if done:
                break
            if now - looked > 0.5:
                looked = now
                clock.look()
            time.sleep(0.05)
        whole = time.monotonic() - begun
        for file in open_files.values():
            file.close()
        if any(process.returncode for process in processes) or seen < self._pictures:
            logs = [(self._folder / f"{journal.stem}.log").read_text()[-600:] for journal in journals]
            raise SystemExit("\n".join(logs))
        first, last = self._pictures // 10, self._pictures * 9 // 10
        rate = (last - first) / (moments[last] - moments[first])
        return {
            "seconds": round(whole, 2),
            "rate": round(rate, 3),
            "start": round(whole - self._pictures / rate, 2),
            "first": round(moments[0], 2),
            "cpu": clock.seconds(),
            "records": _records(journals),
        }


def _records(journals: Sequence[Path]) -> dict[str, Any]:
    """The records of a run by the picture's name, without what differs between runs."""
    own = ("fingerprint", "seconds", "sha256", "stat", "settings", "duplicate_of")
    lines = (json.loads(line) for journal in journals for line in journal.read_text().splitlines())
    records = [line for line in lines if "file" in line]
    found = {line["file"]: {key: value for key, value in line.items() if key not in own} for line in records}
    assert len(found) == len(records), "a picture is there twice"
    return found


def main() -> None:
    """Runs the ways in turn; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="demo", help="an alias or a folder")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="keeps the scenes for another run")
    parser.add_argument("--resolution", type=int, help="in pixels; the model's if it is left out")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=2, help="of all ways, one after another")
    parser.add_argument("--sleep", type=float, help="seconds for a picture, without a model")
    arguments = parser.parse_args()
    if arguments.sleep and "servers" in arguments.ways:
        parser.error("servers cannot sleep; give --ways alone shards ray")
    with tempfile.TemporaryDirectory() as temporary:
        scenes = make_scenes((arguments.folder or Path(temporary)) / f"scenes-{arguments.pictures}", arguments.pictures)
        environment = dict.fromkeys(("FASTVLM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
        environment["PYTHONPATH"] = str(HERE.parent)
        if arguments.sleep:
            (Path(temporary) / "sitecustomize.py").write_text(ASLEEP)
            environment |= {
                "PYTHONPATH": os.pathsep.join((temporary, str(HERE), str(HERE.parent))),
                "FASTVLM_SLEEP": str(arguments.sleep),
            }
        options = () if arguments.resolution is None else ("--resolution", str(arguments.resolution))
        bench = Bench(("caption", str(scenes), *TASK, *options), arguments.pictures, Path(temporary), environment)
        rounds: list[dict[str, dict[str, Any]]] = []
        for _ in range(arguments.rounds):
            rounds.append({way: bench.run(way, (arguments.model,), ()) for way in arguments.ways})
            expected = next(iter(rounds[0].values()))["records"]
            for way, values in rounds[-1].items():
                found = values.pop("records") if values is not rounds[0][arguments.ways[0]] else expected
                values["differing"] = sum(_texts(found[name]) != _texts(expected[name]) for name in expected)
                print(way, json.dumps({k: v for k, v in values.items() if k != "records"}), flush=True)
        rounds[0][arguments.ways[0]].pop("records")
    print(json.dumps({"machine": describe().chip, "model": arguments.model, **_summary(rounds, arguments.ways)}))


def _texts(record: dict[str, Any]) -> tuple[Any, ...]:
    """What every way's records have: servers give no ids and read pictures themselves."""
    return tuple(record.get(key) for key in ("text", "generated_tokens", "prompt_tokens", "finish_reason", "error"))


def _summary(rounds: Sequence[dict[str, dict[str, Any]]], ways: Sequence[str]) -> dict[str, Any]:
    """Medians of each way."""
    return {
        way: {
            key: round(median(each[way][key] for each in rounds), 2)
            for key in ("seconds", "rate", "start", "differing")
        }
        for way in ways
    }


if __name__ == "__main__":
    main()
