"""What is seen of a server while it runs: what its clients get, and what it takes of the machine."""

import contextlib
import http.client
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

SAMPLE_SECONDS = 5.0
LATE_SECONDS = 10.0
"""A server that does not answer `/health` within that is not alive."""
GROWTH, SPARE = 0.05, {"memory": 30e6, "files": 40, "threads": 10}
"""The part, and the number, by which something may differ between the second quarter of a run and the last."""


def say(text: str) -> None:
    """Writes a line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Run:
    """What happens in a run, counted by all threads.

    Args:
        port: Of the server.
        seconds: How long.
    """

    def __init__(self, port: int, seconds: float) -> None:
        self.port = port
        self.end = time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._lock = threading.Lock()

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self.end

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def fault(self, what: str) -> None:
        with self._lock:
            self.faults.append(what)
            say(f"WRONG {what}")


def watch(run: Run, process: "subprocess.Popen[bytes]", samples: list[dict[str, float]]) -> None:
    """Samples memory, descriptors and threads of the server, and asks whether it lives."""
    start = time.monotonic()
    while run.goes_on:
        if process.poll() is not None:
            run.fault(f"the server ended with {process.returncode}")
            return
        asked = time.monotonic()
        try:
            connection = http.client.HTTPConnection("127.0.0.1", run.port, timeout=LATE_SECONDS)
            with contextlib.closing(connection):
                connection.request("GET", "/health")
                if (status := connection.getresponse().status) != 200:
                    run.fault(f"/health: {status}")
        except (OSError, http.client.HTTPException) as error:
            run.fault(f"/health: {error!r}")
        seconds = time.monotonic() - asked
        samples.append({"seconds": asked - start, "health_seconds": seconds, **resources(process.pid)})
        time.sleep(SAMPLE_SECONDS)


def resources(pid: int) -> dict[str, float]:
    """Bytes of memory, open files and threads of a process; memory alone where there is no /proc."""
    if not (place := Path(f"/proc/{pid}")).exists():
        kilobytes = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True).stdout
        return {"memory": float(kilobytes or 0) * 1024}
    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines() if ":" in line)
    memory, threads = float(status["VmRSS"].split()[0]) * 1024, float(status["Threads"])
    return {"memory": memory, "files": len(list((place / "fd").iterdir())), "threads": threads}


def check_growth(run: Run, samples: list[dict[str, float]]) -> None:
    """Compares the second quarter of the run with the last."""
    quarter = len(samples) // 4
    for name, spare in SPARE.items():
        values = [sample[name] for sample in samples if name in sample]
        if quarter < 3 or not values:
            continue
        before, after = statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])
        say(f"{name}: median {before:,.0f} in the second quarter, {after:,.0f} in the last, most {max(values):,.0f}")
        if after > before * (1 + GROWTH) + spare:
            run.fault(f"{name} grew from {before:,.0f} to {after:,.0f}")
