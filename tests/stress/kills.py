"""Kills every job that writes at random moments: the next run is right, and nothing is left behind.

python -m tests.stress.kills -n 10 --seed 0
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.checkpoints import APPLE, SOURCES
from tests.fuzz.room import unfinished

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
_QUESTIONS = "".join(
    json.dumps({"image": str(APPLE / "images" / "square.png"), "question": f"What is {number}?", "answers": ["x"]})
    + "\n"
    for number in range(12)
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A program that writes.

    Attributes:
        arguments: Of `fastvlm`, with `{here}` for the folder that the job works in.
        code: What Python runs in the place of `fastvlm`; it does not clean up when it is terminated.
        prepare: Puts what it reads into that folder.
        result: The name of what it writes in there; None if it writes to standard output.
    """

    arguments: tuple[str, ...]
    code: str | None = None
    prepare: Callable[[Path], object] = lambda _: None
    result: str | None = "out"


def _archive(here: Path) -> None:
    shutil.make_archive(str(here / "source"), "zip", SOURCES["apple"])


def _converted(here: Path) -> None:
    _run(Job(arguments=("convert", str(SOURCES["apple"]), "{here}/converted")), here)


def _pictures(here: Path) -> None:
    shutil.copytree(APPLE / "images", here / "pictures")


def _questions(here: Path) -> None:
    (here / "questions.jsonl").write_text(_QUESTIONS)


_QUANTIZED = ("--q-bits", "8", "--q-group-size", "32")
JOBS = {
    "convert": Job(arguments=("convert", str(SOURCES["apple-train"]), "{here}/out")),
    "convert and quantize": Job(arguments=("convert", str(SOURCES["apple"]), "{here}/out", *_QUANTIZED)),
    "quantize": Job(arguments=("quantize", "{here}/converted", "{here}/out", *_QUANTIZED), prepare=_converted),
    "mlx-vlm": Job(
        arguments=("{here}/converted", "{here}/out"),
        code="import sys; from fastvlm_mlx.convert.export.mlx_vlm import export_mlx_vlm; export_mlx_vlm(*sys.argv[1:])",
        prepare=_converted,
    ),
    "archive": Job(arguments=("convert", "{here}/source.zip", "{here}/out"), prepare=_archive),
    "first use": Job(
        arguments=("generate", "-m", str(SOURCES["apple"]), "-n", "2", str(APPLE / "images" / "square.png")),
        result=None,
    ),
    "search": Job(
        arguments=(
            *("search", "pictures", "a cat", "-m", str(SOURCES["apple"]), "-r", "64"),
            *("--no-captions", "--threshold", "0"),
        ),
        prepare=_pictures,
        result=None,
    ),
    "eval": Job(
        arguments=(
            "eval",
            "-m",
            str(SOURCES["apple"]),
            "--data",
            "questions.jsonl",
            "-n",
            "2",
            "--output",
            "answers.jsonl",
        ),
        prepare=_questions,
        result="answers.jsonl",
    ),
}


def _start(job: Job, here: Path) -> "subprocess.Popen[bytes]":
    temporary = here / "temporary"
    temporary.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        **{
            "FASTVLM_CACHE": str(here / "cache"),
            "TMPDIR": str(temporary),
            "HOME": str(here),
            "MLX_DISABLE_COMPILE": "1",
        },
    }
    return subprocess.Popen(
        [
            sys.executable,
            *(("-c", job.code) if job.code else ("-m", "fastvlm_mlx")),
            *(argument.format(here=here) for argument in job.arguments),
        ],
        cwd=here,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _run(job: Job, here: Path) -> str:
    process = _start(job, here)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, f"{job.arguments}: exit code {process.returncode}: {errors.decode()[-500:]}"
    return output.decode()


def _digests(folder: Path) -> dict[str, str]:
    """What tells whether a written checkpoint is the same; the model card and the report have times in them."""
    files = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".txt", ".jinja")]
    files += [folder / name for name in ("config.json", "tokenizer.json")]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _outcome(job: Job, here: Path, output: str) -> object:
    """What a job has written: a checkpoint, answers, or a text."""
    if job.result is None:
        return output
    written = here / job.result
    return _digests(written) if written.is_dir() else [json.loads(line)["prediction"] for line in written.open()]


def reference(name: str, here: Path) -> tuple[object, float]:
    """What a job gives when nobody disturbs it, and how many seconds it takes."""
    here.mkdir()
    JOBS[name].prepare(here)
    start = time.monotonic()
    output = _run(JOBS[name], here)
    return _outcome(JOBS[name], here, output), time.monotonic() - start


def kill(name: str, number: signal.Signals, moment: float, expected: object, here: Path) -> str:
    """Kills a job after `moment` seconds and runs it again.

    Returns:
        `ended` if it had ended by itself before, else `killed`.

    Raises:
        AssertionError: If the second run is not right, or something is left.
    """
    job = JOBS[name]
    here.mkdir()
    job.prepare(here)
    before = {path.name for path in here.iterdir()}
    process = _start(job, here)
    with suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    ended = process.returncode == 0
    if job.result is not None and (here / job.result).exists():
        assert _outcome(job, here, "") == expected, f"{name}: a half result looks like a whole one"
    elif number is signal.SIGTERM and not ended and job.code is None:
        _check_left(here, before, f"{name}, SIGTERM after {moment:.2f} s")
    if job.result is None or not (here / job.result).exists():
        output = _run(job, here).encode()
    assert _outcome(job, here, output.decode()) == expected, f"{name}: the second run gives something else"
    _check_left(here, before | {str(job.result)}, f"{name}, {number.name} after {moment:.2f} s, after the second run")
    return "ended" if ended else "killed"


def _check_left(here: Path, known: set[str], where: str) -> None:
    """Raises an AssertionError for a file that is neither a result nor one of MLX's compiled kernels."""
    left = [path.name for path in here.iterdir() if path.name not in known | {"temporary", "cache"}]
    left += [f"temporary/{path.name}" for path in (here / "temporary").iterdir() if path.name != "mlx"]
    left += [f"cache/{name}" for name in unfinished(here / "cache")]
    assert not left, f"{where}: left {left}"


def main() -> None:
    """Kills every job several times with each signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--number", type=int, default=10, help="kills of each job with each signal")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments")
    parser.add_argument("--jobs", nargs="*", choices=tuple(JOBS), default=tuple(JOBS), help="some jobs only")
    options = parser.parse_args()
    random = Random(options.seed)
    faults = 0
    for name in options.jobs:
        counts = {"killed": 0, "ended": 0, "fault": 0}
        with tempfile.TemporaryDirectory() as folder:
            expected, seconds = reference(name, Path(folder, "alone"))
            for number in SIGNALS:
                for attempt in range(options.number):
                    here = Path(folder, f"{number.name}-{attempt}")
                    try:
                        counts[kill(name, number, random.uniform(0.15, 1.05) * seconds, expected, here)] += 1
                    except AssertionError as error:
                        counts["fault"] += 1
                        print(error, flush=True)  # noqa: T201
                    shutil.rmtree(here, ignore_errors=True)
        faults += counts["fault"]
        print(f"{name}: {', '.join(f'{count} {kind}' for kind, count in counts.items())}", flush=True)  # noqa: T201
    sys.exit(3 if faults else 0)


if __name__ == "__main__":
    main()
