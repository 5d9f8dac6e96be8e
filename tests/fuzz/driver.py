"""Runs cases in processes of their own, so that a crash or a hang is found and named, and counts what came of them.

    python -m tests.fuzz.driver -n 5000 --seed 3
    python -m tests.fuzz.driver --case picture:1234567

A case is a class and a seed: nothing else decides what it does. Cases run one after another in the same process.
"""

import argparse
import faulthandler
import io
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]

SHARES = {
    **{"upstream": 28, "converted": 40, "cache": 3, "archive": 18},
    **{"picture": 360, "header": 150, "array": 40, "source": 80, "server": 12},
    **{"film": 40, "document": 40, "name": 30},
    **{"prompt": 110, "messages": 80, "ids": 20},
    **{"questions": 16, "journal": 4, "captions": 5, "embedding": 60, "album": 5},
    **{"python": 110, "command_line": 14, "schema": 60},
}
"""The classes, and how many of about a thousand cases each gets: few of those that take long."""

GOOD = ("answered", "refused")
SECONDS, MEBIBYTES = 8.0, 1500
"""What a case may take: processor time and additional memory."""
PATIENCE = 60.0
"""Seconds without an answer after which a case counts as a hang."""
_ADDRESS_SPACE = 6 << 30


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a case: one of `GOOD`, or the kind of fault and what tells it."""

    case: str
    kind: str
    detail: str = ""
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether it is as it should be."""
        return self.kind in GOOD


def cases(count: int, seed: int, classes: Sequence[str] = tuple(SHARES)) -> list[str]:
    """The names of `count` cases, shared out among classes; the first of a class are the same for every count."""
    total = sum(SHARES[name] for name in classes)
    return [f"{name}:{seed * 10**6 + i}" for name in classes for i in range(-(-count * SHARES[name] // total))]


class _Worker:
    """A process that runs cases; a new one takes its place when it crashes or hangs.

    Args:
        program: The arguments of its interpreter; the name of an empty folder follows them.
        patience: See `PATIENCE`.
    """

    def __init__(self, program: Sequence[str], patience: float) -> None:
        self._program, self._patience = program, patience
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, case: str) -> Outcome:
        """The outcome of one case."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        start = time.monotonic()
        process.stdin.write(f"{case}\n".encode())
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], self._patience)
        line = process.stdout.readline() if ready else b""
        if line:
            return Outcome(**json.loads(line))
        if ready:
            kind, detail = "crash", f"exit code {process.wait()}"
        else:
            process.send_signal(_SHOW_STACK)
            time.sleep(0.5)
            kind, detail = "hang", f"no answer after {time.monotonic() - start:.0f} s"
        tail = self._stack()
        self.stop()
        return Outcome(case=case, kind=kind, detail=f"{detail}: {tail}", seconds=time.monotonic() - start)

    def _start(self) -> "subprocess.Popen[bytes]":
        self._folder = tempfile.TemporaryDirectory(prefix="fastvlm-fuzz.")
        self._process = subprocess.Popen(
            [sys.executable, *self._program, self._folder.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        return self._process

    def _stack(self) -> str:
        """The innermost lines of this project in what a crashed or hanging process has written."""
        assert self._folder is not None
        log = Path(self._folder.name, "stderr")
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        ours = [line.strip() for line in lines if "/fastvlm_mlx/" in line or "/convert/" in line]
        return " < ".join(ours[:3]) or " ".join(lines[-2:])

    def stop(self) -> None:
        """Ends the process and removes its folder."""
        if self._process is not None and self._folder is not None:
            self._process.kill()
            self._process.communicate()
            self._folder.cleanup()
        self._process = None


def run(
    names: Iterable[str],
    workers: int = 1,
    show: Callable[[Outcome], None] = lambda _: None,
    *,
    program: Sequence[str] = ("-m", "tests.fuzz.driver", "--work"),
    patience: float = PATIENCE,
) -> list[Outcome]:
    """The outcomes of cases, in their order, from `workers` processes; `show` is called with each."""
    waiting = list(enumerate(names))
    outcomes: dict[int, Outcome] = {}

    def work() -> None:
        worker = _Worker(program, patience)
        try:
            while waiting:
                number, name = waiting.pop(0)
                outcomes[number] = worker.run(name)
                show(outcomes[number])
        finally:
            worker.stop()

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work) for _ in range(workers)]:
            done.result()
    return [outcomes[number] for number in sorted(outcomes)]


def table(outcomes: Iterable[Outcome]) -> str:
    """The number of outcomes of each kind by class, and the faults by what tells them, with one case of each."""
    counts: dict[str, Counter[str]] = {}
    faults: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        name = outcome.case.partition(":")[0]
        counts.setdefault(name, Counter())[outcome.kind] += 1
        if not outcome.good:
            faults.setdefault((outcome.kind, outcome.detail.partition(" |")[0][:100]), []).append(outcome)
    kinds = [*GOOD, *sorted({kind for counter in counts.values() for kind in counter} - set(GOOD))]
    rows = [("class", "tried", *kinds)]
    rows += [(name, str(sum(count.values())), *(str(count[kind]) for kind in kinds)) for name, count in counts.items()]
    rows.append(
        (
            "all",
            str(sum(sum(c.values()) for c in counts.values())),
            *(str(sum(c[k] for c in counts.values())) for k in kinds),
        )
    )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for (kind, _), same in sorted(faults.items(), key=lambda item: -len(item[1])):
        lines.append(f"{len(same):>5} × {kind}: {same[0].detail[:400]}  ({same[0].case})")
    return "\n".join(lines)


def judge(case: str, room: Any, log: io.FileIO) -> Outcome:
    """Runs a case in this process."""
    from tests.fuzz import classes
    from tests.fuzz.subject import FastVLMError, Refused, Wrong, check_error

    name, _, seed = case.partition(":")
    room.clear()
    log.truncate(0)
    log.seek(0)
    before = _memory(reset=True)
    start = time.process_time()
    kind, detail = "answered", ""
    try:
        try:
            classes.CLASSES[name](Random(f"{name}:{seed}"), room)
        except Refused as error:
            kind, detail = "refused", str(error)
        except FastVLMError as error:
            kind, detail = "refused", f"{type(error).__name__}: {error}"
            check_error(error)
        seconds = time.process_time() - start
        room.check()
        if written := Path(log.name).read_text(errors="replace"):  # type: ignore[arg-type]
            raise Wrong(f"noise: {written[:300]!r}")
    except Wrong as error:
        kind, _, detail = str(error).partition(": ")
        return Outcome(case=case, kind=kind, detail=detail)
    except BaseException as error:  # (a panic of a library in Rust is no Exception)
        if isinstance(error, KeyboardInterrupt):
            raise
        return Outcome(case=case, kind="exception", detail=_describe(error))
    if seconds > SECONDS:
        return Outcome(case=case, kind="slow", detail=f"{seconds:.1f} s", seconds=seconds)
    if (grown := _memory() - before) > MEBIBYTES:
        return Outcome(case=case, kind="memory", detail=f"{grown} MiB", seconds=seconds)
    return Outcome(case=case, kind=kind, detail=detail, seconds=seconds)


def _describe(error: BaseException) -> str:
    """The kind of an exception, the innermost place in this project where it came from, and what it says."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/fuzz/" not in frame.filename and "site-packages" not in frame.filename]
    ours = [frame for frame in ours if "/fastvlm_mlx/" in frame.filename or "/convert/" in frame.filename]
    place = (
        f"{'/'.join(Path(ours[-1].filename).parts[-2:])}:{ours[-1].lineno}"
        if ours
        else f"{frames[-1].filename}:{frames[-1].lineno}"
    )
    return f"{type(error).__name__} at {place} | {str(error)[:200]!r}"


def _memory(*, reset: bool = False) -> int:
    """The most memory that this process has had since the last reset, in MiB."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) >> 10
    except (OSError, IndexError):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


_SHOW_STACK = 10 if sys.platform.startswith("linux") else 30  # SIGUSR1


def _work(root: Path) -> None:
    """Runs the cases that standard input names, one a line; each outcome becomes a line on standard output."""
    answers = os.fdopen(os.dup(1), "w")
    log = (root / "stderr").open("wb", buffering=0)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.enable()
    faulthandler.register(_SHOW_STACK)
    if sys.platform.startswith("linux"):
        resource.setrlimit(resource.RLIMIT_DATA, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    warnings.simplefilter("always")
    from tests.fuzz.room import Room

    room = Room(root)
    for line in sys.stdin:
        print(json.dumps(vars(judge(line.strip(), room, log))), file=answers, flush=True)


def _all_outcomes(options: argparse.Namespace) -> Iterator[Outcome]:
    names = [options.case] if options.case else cases(options.number, options.seed, options.classes or tuple(SHARES))

    def show(outcome: Outcome) -> None:
        if not outcome.good or options.case:
            print(f"{outcome.case}: {outcome.kind}: {outcome.detail}", flush=True)  # noqa: T201

    yield from run(names, options.workers, show)


def main() -> None:
    """Runs the cases that the command line names and prints the table; exit code 3 if one of them is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--number", type=int, default=3000, help="how many cases")
    parser.add_argument("--seed", type=int, default=0, help="where their seeds begin, in millions")
    parser.add_argument("--case", help="one case: a class and a seed, such as picture:1234567")
    parser.add_argument("--classes", nargs="*", choices=tuple(SHARES), help="some classes only")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        _work(options.work)
        return
    outcomes = list(_all_outcomes(options))
    print(table(outcomes))  # noqa: T201
    sys.exit(0 if all(outcome.good for outcome in outcomes) else 3)


if __name__ == "__main__":
    main()
