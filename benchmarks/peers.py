"""Compares the time to first token of fastvlm-mlx, mlx-vlm and transformers (PyTorch) on the same random checkpoint.

Every sample comes from a fresh process. The peers take turns (A B C A B C …), all with the same image, prompt,
resolution, number of threads and arithmetic: float32 on a CPU, float16 on a GPU. On a CPU with instructions for
bfloat16, transformers also takes part in bfloat16, which is faster there. A process answers about several images. The
time from its start to the first token of the first answer is the **cold** TTFT; the time from the last image's file to
its first token is the **warm** TTFT. The first answer also gives the peak memory: of the process on a CPU, of the
allocator on a GPU. For fastvlm-mlx, cold TTFT and a CPU's memory are those of `fastvlm generate`. Files are in the
operating system's cache. At the end, all peers answer about an image that needs no resizing, and their greedy tokens
and log-probabilities are compared.

Each peer has a virtual environment of its own. What is missing under --work is made there: environments, random
checkpoints in Apple's and transformers' layout, and mlx-vlm's and our conversions of them. The results are written
into `build/` after every process; an interrupted run continues where it stopped. With `--record`, they take the place
of the tracked ones when they are complete, and README.md gets the tables.

    python benchmarks/peers.py --resolutions 256 512 1024 --runs 7
    python benchmarks/peers.py --peers transformers --here      # only this peer, installed in this environment
    python benchmarks/peers.py --record     # keep what was measured in benchmarks/results
    python benchmarks/peers.py --table      # only write the tables again
"""

import argparse
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from fastvlm_mlx.backend import device
from fastvlm_mlx.bench.conditions import Conditions, conditions
from fastvlm_mlx.bench.images import Images
from fastvlm_mlx.bench.records import record
from fastvlm_mlx.bench.report import Report as BenchReport
from fastvlm_mlx.bench.report import read_report as read_bench_report
from fastvlm_mlx.bench.statistics import Statistics
from fastvlm_mlx.bench.tables import table as bench_table
from fastvlm_mlx.checkpoint.released import SIZES
from fastvlm_mlx.formatting import as_markdown
from fastvlm_mlx.machine import Machine, describe

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
RESULTS = HERE / "results"
BUILD = HERE.parent / "build"
BEGIN, END = "<!-- bench-peers:begin -->", "<!-- bench-peers:end -->"
DEFAULT_WORK = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fastvlm-mlx-peers"
PROMPT = "Describe the image."
MAX_TOKENS = 8
CLI = "from fastvlm_mlx.cli import main; main()"
DTYPES = ("float32", "float16")
"""To compare in; one peer alone may compute in another."""

TOLERANCES = {"float32": 1e-2, "float16": 0.05, "bfloat16": 0.4}
"""Largest difference of log-probabilities from other arithmetic, in nats; measured: 5e-4, 0.032 and 0.29."""

BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
"""Of x86 processors, as Linux names them."""

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in the unit of `ru_maxrss`."""

_TORCH = "torch==2.13.0"
"""The version that the stored results are from."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A program to compare.

    Attributes:
        name: Its name in tables.
        script: The script that one of its processes runs.
        packages: The packages of its environment; empty if it runs in this one.
        checkpoint_dtype: The dtype of its checkpoint; None for the dtype that it computes in.
        dtype: The dtype that it computes in; None for the comparison's.
        program: The peer whose environment and checkpoint it shares; empty if they are its own.
        preload: Whether, on a CPU, OpenBLAS takes the place of the BLAS that it is linked to.
    """

    name: str
    script: str
    packages: tuple[str, ...] = ()
    checkpoint_dtype: str | None = None
    dtype: str | None = None
    program: str = ""
    preload: bool = False

    @property
    def title(self) -> str:
        """The head of its column."""
        return f"{self.program}, {self.dtype}" if self.program else self.name


OURS = Peer(name="fastvlm-mlx", script="peer_ours.py", checkpoint_dtype="float16")
PEERS = (
    OURS,
    Peer(
        name="mlx-vlm",
        script="peer_mlx_vlm.py",
        packages=("mlx-vlm", "mlx[cpu]" if sys.platform == "linux" else "mlx"),
        preload=True,
    ),
    Peer(
        name="transformers",
        script="peer_transformers.py",
        packages=(_TORCH, "transformers", "timm"),
        checkpoint_dtype="bfloat16",
    ),
    Peer(
        name="transformers-bfloat16",
        script="peer_transformers.py",
        packages=(_TORCH, "transformers", "timm"),
        checkpoint_dtype="bfloat16",
        dtype="bfloat16",
        program="transformers",
    ),
)


def bfloat16_instructions() -> tuple[str, ...]:
    """Returns the processor's instructions for bfloat16; none where Linux does not list them."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return tuple(name for name in BFLOAT16_INSTRUCTIONS if name in words)


def default_peers() -> list[Peer]:
    """Returns the peers that compare on this machine: those in bfloat16 only on a CPU that has instructions for it."""
    bfloat16 = device() == "cpu" and bool(bfloat16_instructions())
    return [peer for peer in PEERS if bfloat16 or peer.dtype != "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all samples of a report have in common.

    Attributes:
        size: Of the model.
        dtype: To compute in.
        threads: For every peer.
        images: The number that a process answers about; `pictures` in the file.
        prompt: The question.
        max_tokens: Length of each answer.
    """

    size: str
    dtype: str
    threads: int
    images: int
    prompt: str = PROMPT
    max_tokens: int = MAX_TOKENS

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON object."""
        values = asdict(self)
        return {"pictures" if name == "images" else name: value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Settings":
        """Reads what `to_dict` returns."""
        return record(cls, values, images=values["pictures"])


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The measurements of one process.

    Attributes:
        load_average: Of the machine, before the process.
        cold_ttft: Seconds.
        warm_ttft: Seconds.
        decode_rate: Tokens per second after the first one.
        peak_bytes: The most memory.
        tokens: The ids of the last answer.
    """

    load_average: float
    cold_ttft: float
    warm_ttft: float
    decode_rate: float
    peak_bytes: int
    tokens: tuple[int, ...]


METRICS = ("cold_ttft", "warm_ttft", "decode_rate", "peak_bytes")
"""The fields of a `Sample` that a report holds statistics of."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A greedy answer, and how it compares with ours.

    Attributes:
        tokens: Its ids.
        margins: The lead of each token's log-probability over that of the second choice.
        difference: The largest difference of the first token's log-probabilities from ours; None for our own answer.
        equal: Whether the tokens equal ours.
        explained: Whether they do, or a tie explains where they part.
    """

    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    difference: float | None = None
    equal: bool = True
    explained: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON object; our own answer has no comparison in it."""
        values: dict[str, Any] = {"tokens": list(self.tokens), "margins": list(self.margins)}
        if self.difference is not None:
            values |= {"difference": self.difference, "equal": self.equal, "explained": self.explained}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Answer":
        """Reads what `to_dict` returns, or what a peer's script writes."""
        comparison = {name: values[name] for name in ("difference", "equal", "explained") if name in values}
        return cls(tokens=tuple(values["tokens"]), margins=tuple(values["margins"]), **comparison)


@dataclass(kw_only=True)
class Report:
    """A comparison, which grows while it is measured.

    Attributes:
        conditions: When it began.
        settings: Of all samples.
        versions: Packages of each peer and their versions.
        samples: By resolution and peer.
        agreement: The answers about the same pixels, by resolution and peer.
        instructions: The CPU's for bfloat16, if a peer computes in it.
    """

    conditions: Conditions
    settings: Settings
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    samples: dict[int, dict[str, list[Sample]]] = field(default_factory=dict)
    agreement: dict[int, dict[str, Answer]] = field(default_factory=dict)
    instructions: tuple[str, ...] = ()

    def summary(self) -> dict[int, dict[str, dict[str, Statistics]]]:
        """Returns the statistics of the samples, by resolution, peer and metric."""
        return {
            side: {
                name: {metric: Statistics.of([getattr(sample, metric) for sample in samples]) for metric in METRICS}
                for name, samples in peers.items()
                if samples
            }
            for side, peers in self.samples.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object that is written to disk, with the statistics in it."""
        return {
            "conditions": self.conditions.to_dict(),
            **({"instructions": list(self.instructions)} if self.instructions else {}),
            "settings": self.settings.to_dict(),
            "versions": self.versions,
            "samples": {
                str(side): {name: [asdict(sample) for sample in samples] for name, samples in peers.items()}
                for side, peers in self.samples.items()
            },
            "agreement": {
                str(side): {name: answer.to_dict() for name, answer in answers.items()}
                for side, answers in self.agreement.items()
            },
            "summary": {
                str(side): {
                    name: {metric: asdict(statistics) for metric, statistics in metrics.items()}
                    for name, metrics in peers.items()
                }
                for side, peers in self.summary().items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        """Reads what `to_dict` returns; computes the statistics again."""
        return cls(
            conditions=Conditions.from_dict(values["conditions"]),
            settings=Settings.from_dict(values["settings"]),
            versions=dict(values["versions"]),
            samples={
                int(side): {
                    name: [record(Sample, sample, tokens=tuple(sample["tokens"])) for sample in samples]
                    for name, samples in peers.items()
                }
                for side, peers in values["samples"].items()
            },
            agreement={
                int(side): {name: Answer.from_dict(answer) for name, answer in answers.items()}
                for side, answers in values["agreement"].items()
            },
            instructions=tuple(values.get("instructions", ())),
        )


class Workplace:
    """Environments, checkpoints and images, made when they are first needed.

    Args:
        work: The folder for all of them.
        venvs: The folder of the environments `peers-<name>`; None: all peers run in this one.
        settings: Of the comparison.
    """

    def __init__(self, work: Path, venvs: Path | None, settings: Settings) -> None:
        self._work, self._venvs = work, venvs
        self.settings = settings
        work.mkdir(parents=True, exist_ok=True)

    def python(self, peer: Peer) -> Path:
        """Returns the interpreter of a peer's environment, which is made if it is missing."""
        if not peer.packages or self._venvs is None:
            return Path(sys.executable)
        folder = self._venvs / f"peers-{(peer.program or peer.name).replace('-', '')}"
        python = folder / "bin" / "python"
        if not (folder / ".installed").exists():
            say(f"installing {', '.join(peer.packages)} into {folder}")
            venv.create(folder, with_pip=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *peer.packages], check=True)
            (folder / ".installed").touch()
        return python

    def checkpoint(self, peer: Peer, dtype: str | None = None) -> Path:
        """Returns the folder that a peer loads, with its weights in `dtype` instead of the usual one."""
        dtype = dtype or peer.checkpoint_dtype or self.settings.dtype
        program = peer.program or peer.name
        folder = self._work / f"{program}-{self.settings.size}-{dtype}"
        if folder.exists():
            return folder
        say(f"making {folder}")
        if program == "transformers":
            return self._random(folder, "transformers")
        source = self._work / f"apple-{self.settings.size}"
        if not source.exists():
            self._random(source, "apple")
        partial = folder.with_name(folder.name + ".partial")
        convert = ["-m", "mlx_vlm", "convert"] if peer.packages else ["-c", CLI, "convert"]
        folders = (
            ["--hf-path", str(source), "--mlx-path", str(partial)] if peer.packages else [str(source), str(partial)]
        )
        command = [str(self.python(peer)), *convert, *folders, "--dtype", dtype]
        done = subprocess.run(command, env=self.environment(peer), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"error: converting for {peer.name} failed:\n{done.stderr[-2000:]}")
        partial.rename(folder)
        return folder

    def _random(self, folder: Path, layout: str) -> Path:
        script = HERE / "random_checkpoint.py"
        subprocess.run(
            [sys.executable, script, self.settings.size, folder, "--layout", layout], stdout=sys.stderr, check=True
        )
        return folder

    def images(self, run: int) -> list[str]:
        """Returns the files of the images of a run."""
        count = self.settings.images
        numbers = range(count * run, count * (run + 1))
        files = [self._work / f"image-{number}.jpg" for number in numbers]
        for number, file in zip(numbers, files, strict=True):
            file.write_bytes(Images()(number))
        return [str(file) for file in files]

    def plain_image(self, resolution: int) -> str:
        """Returns the file of an image that already has the resolution, so that all peers see the same pixels."""
        file = self._work / f"image-{resolution}.png"
        with Image.open(io.BytesIO(Images()(0))) as image:
            image.resize((resolution, resolution)).save(file)
        return str(file)

    def logits(self, peer: Peer) -> Path:
        """Returns the file for a peer's first log-probabilities."""
        return self._work / f"logits-{peer.name}.npy"

    def environment(self, peer: Peer) -> dict[str, str]:
        """Returns the environment variables of a peer's process: threads as for all, OpenBLAS, no network."""
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        preload = {"LD_PRELOAD": "libopenblas.so.0"} if peer.preload and device() == "cpu" else {}
        return {**os.environ, **dict.fromkeys(names, str(self.settings.threads)), **offline, **preload}


def say(text: str) -> None:
    """Writes progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def run_process(arguments: Sequence[str | Path], environment: dict[str, str]) -> tuple[float, str, int]:
    """Runs a process; returns the seconds to its first character, its output, and the most bytes that it held in RAM.

    Raises:
        SystemExit: If it fails.
    """
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        with process.stdout as stream:
            output = stream.read(1)
            seconds = time.perf_counter() - start
            output += stream.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"error: {arguments[1]} failed:\n{errors.read().decode(errors='replace')[-2000:]}")
    return seconds, output.decode(), usage.ru_maxrss * RSS_UNIT


def sample(place: Workplace, peer: Peer, resolution: int, run: int) -> tuple[Sample, dict[str, str]]:
    """Measures one process of a peer and returns its packages' versions, too.

    For ours it measures two: the command line gives the cold TTFT.
    """
    images, settings = place.images(run), place.settings
    model = str(place.checkpoint(peer))
    environment, python = place.environment(peer), place.python(peer)
    load = round(os.getloadavg()[0], 2)
    request = _request(settings, peer, model, images, resolution)
    cold, output, _ = run_process([python, HERE / peer.script, json.dumps(request)], environment)
    result: dict[str, Any] = {"load_average": load, "cold_ttft": cold, **json.loads(output.splitlines()[-1])}
    if peer is OURS:
        question = ["generate", images[0], "--model", model, "--prompt", settings.prompt]
        options = ["--resolution", str(resolution), "--max-tokens", str(settings.max_tokens)]
        command: list[str | Path] = [python, "-c", CLI, *question, *options, "--dtype", settings.dtype]
        result["cold_ttft"], _, peak = run_process(command, environment)
        if device() == "cpu":
            result["peak_bytes"] = peak
    return record(Sample, result, tokens=tuple(result["tokens"])), result["versions"]


def _request(settings: Settings, peer: Peer, model: str, images: list[str], resolution: int) -> dict[str, Any]:
    """What a peer's script reads."""
    return {
        "model": model,
        "images": images,
        "prompt": settings.prompt,
        "resolution": resolution,
        "max_tokens": settings.max_tokens,
        "dtype": peer.dtype or settings.dtype,
    }


def agree(place: Workplace, peers: Sequence[Peer], resolution: int) -> dict[str, Answer]:
    """Returns the greedy answers of all peers about the same pixels, compared with ours."""
    settings = place.settings
    answers: dict[str, Answer] = {}
    for peer in peers:
        model = str(place.checkpoint(peer, settings.dtype if peer is OURS else None))
        request = _request(settings, peer, model, [place.plain_image(resolution)], resolution)
        request["logits"] = str(place.logits(peer))
        command: list[str | Path] = [
            place.python(peer),
            HERE / peer.script,
            json.dumps(request),
        ]
        _, output, _ = run_process(command, place.environment(peer))
        answers[peer.name] = Answer.from_dict(json.loads(output.splitlines()[-1]))
    ours = np.load(place.logits(OURS))
    for peer in peers:
        if peer is not OURS:
            theirs = np.load(place.logits(peer))
            answers[peer.name] = compare(
                answers[OURS.name],
                answers[peer.name],
                difference=float(np.abs(ours - theirs[: len(ours)]).max()),
                tolerance=TOLERANCES[peer.dtype or settings.dtype],
            )
    return answers


def compare(ours: Answer, theirs: Answer, *, difference: float, tolerance: float) -> Answer:
    """Returns `theirs` with its comparison filled in; a tie within `tolerance` explains where the answers part."""
    pairs = zip(ours.tokens, theirs.tokens, strict=True)
    parted = next((step for step, (mine, other) in enumerate(pairs) if mine != other), None)
    return replace(
        theirs,
        difference=difference,
        equal=parted is None,
        explained=parted is None or min(ours.margins[parted], theirs.margins[parted]) <= 2 * tolerance,
    )


def measure(
    place: Workplace,
    peers: Sequence[Peer],
    resolutions: Sequence[int],
    runs: int,
    report: Report,
    save: Callable[[], None],
) -> None:
    """Adds the samples and answers that `report` lacks, saving it after every process."""
    pending = [
        (run, side, peer)
        for run in range(runs)
        for side in resolutions
        for peer in peers
        if len(report.samples.setdefault(side, {}).setdefault(peer.name, [])) <= run
    ]
    for peer in peers:
        place.python(peer)
        place.checkpoint(peer)
    durations: dict[tuple[int, str], list[float]] = {}
    for number, (run, side, peer) in enumerate(pending):
        start = time.perf_counter()
        result, report.versions[peer.name] = sample(place, peer, side, run)
        report.samples[side][peer.name].append(result)
        save()
        durations.setdefault((side, peer.name), []).append(time.perf_counter() - start)
        rest = [median(known) for _, s, p in pending[number + 1 :] if (known := durations.get((s, p.name)))]
        unknown = len(pending) - number - 1 - len(rest)
        say(
            f"run {run + 1}/{runs}, {side} px, {peer.name}: cold {result.cold_ttft:.2f} s, "
            f"warm {result.warm_ttft:.2f} s; {sum(rest) / 60:.1f} min left"
            + (f" and {unknown} processes not timed yet" if unknown else "")
        )
    for side in resolutions:
        if side not in report.agreement:
            report.agreement[side] = agree(place, peers, side)
            save()
            say(f"{side} px: {json.dumps(report.to_dict()['agreement'][str(side)])}")


def table(report: Report) -> Iterator[str]:
    """Yields the lines of a comparison's table and caption."""
    peers = [peer for peer in PEERS if peer.name in report.versions]
    names = [peer.name for peer in peers]
    yield f"| | | {' | '.join(peer.title for peer in peers)} |"
    yield f"|---|---|{'---:|' * len(names)}"
    rows: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("warm TTFT", "warm_ttft", _seconds),
        ("cold TTFT", "cold_ttft", _seconds),
        ("decoding", "decode_rate", lambda value: f"{value:.{0 if value >= 100 else 1}f} tokens/s"),
        ("peak memory", "peak_bytes", lambda value: f"{value / 1e9:.2f} GB"),
    )
    summary = report.summary()
    for title, metric, text in rows:
        for side, metrics in summary.items():
            medians = {name: metrics[name][metric].median for name in names}
            ours = medians[OURS.name]
            cells = [
                text(value) + ("" if name == OURS.name else f" ({value / ours:.1f}×)")
                for name, value in medians.items()
            ]
            yield f"| {title} | {side} px | {' | '.join(cells)} |"
    machine, settings = report.conditions.machine, report.settings
    runs = {side: min(map(len, samples.values())) for side, samples in report.samples.items()}
    counts = ", ".join(f"{count} at {side} px" for side, count in runs.items())
    chip = machine.chip + (f" with {' and '.join(report.instructions)}" if report.instructions else "")
    exception = " where a column names no other" if report.instructions else ""
    yield ""
    yield (
        f"Measured {where(machine)}: {chip}, {settings.threads} threads, "
        f"{settings.size} with random weights, {settings.dtype} arithmetic{exception}, "
        f"medians of fresh processes that took turns ({counts}), factors relative to fastvlm-mlx. "
        f"{verdict(report, peers)}{versions(report)}; samples in `benchmarks/results/`."
    )


def verdict(report: Report, peers: Sequence[Peer]) -> str:
    """Returns a sentence about each group of peers whose greedy answers compare with ours in the same way."""
    groups: dict[str, list[str]] = {}
    for peer in peers:
        answers = [found[peer.name] for found in report.agreement.values() if peer.name in found]
        if peer is OURS or not answers:
            continue
        equal, explained = (all(getattr(answer, name) for answer in answers) for name in ("equal", "explained"))
        outcome = "are equal" if equal else "part where two candidates tie" if explained else "differ"
        groups.setdefault(outcome, []).append(peer.title)
    sides = ", ".join(f"{side} px" for side in report.agreement)
    tokens = f"The first {report.settings.max_tokens} greedy tokens"
    sentences = []
    for outcome, titles in groups.items():
        programs = "all" if len(groups) == 1 else f"fastvlm-mlx and {' and '.join(titles)}"
        sentences.append(f"{tokens} of {programs} {outcome} ({sides}). ")
    return "".join(sentences)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.0f} ms"


def where(machine: Machine) -> str:
    """Returns the kind of a machine in words."""
    if machine.system.startswith("macOS"):
        return "on a Mac"
    gpu = "on an NVIDIA GPU" if machine.device == "gpu" else "without a GPU"
    return f"on Linux {gpu}, not on a Mac"


def versions(report: Report) -> str:
    """Returns the versions of the peers, for a caption."""
    known = {name: version for packages in report.versions.values() for name, version in packages.items()}
    return ", ".join(f"{name} {known[name]}" for name in ("mlx", "mlx-vlm", "transformers", "torch") if name in known)


def phases(report: BenchReport) -> Iterator[str]:
    """Yields the lines of a table and caption for a report of `fastvlm bench` about one model."""
    machine, row = report.conditions.machine, report.rows[0]
    yield as_markdown([cells[2:] for cells in bench_table(report)], left=2)
    yield ""
    yield (
        f"{row.model}, {row.precision['language_model']}, by phase: medians in ms of "
        f"{report.settings.runs} runs in one warm process; measured {where(machine)}: {machine.chip}."
    )


def write_tables(reports: Sequence[Report | BenchReport], readme: Path) -> None:
    """Writes the tables of reports between the markers of a README.

    Raises:
        SystemExit: If the README has no markers.
    """
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"error: {readme} has no {BEGIN} … {END} to put the table into")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    tables = (phases(report) if isinstance(report, BenchReport) else table(report) for report in reports)
    content = "\n\n".join("\n".join(lines) for lines in tables)
    readme.write_text(f"{before}{BEGIN}\n{content}\n{END}{after}", encoding="utf-8")


def stored_reports() -> list[Report | BenchReport]:
    """Returns the reports in `results/`, from any machine: comparisons, then reports of `fastvlm bench`."""
    comparisons = [read_report(file) for file in sorted(RESULTS.glob("peers-*.json"))]
    return [*comparisons, *(read_bench_report(file) for file in sorted(RESULTS.glob("bench-*.json")))]


def read_report(file: Path) -> Report:
    """Reads a comparison from disk."""
    return Report.from_dict(json.loads(file.read_text(encoding="utf-8")))


def file_name(size: str) -> str:
    """Returns `peers-<size>-<system>-<chip>.json`."""
    chip = re.sub(r"[^a-z0-9]+", "-", describe().chip.lower()).strip("-")
    return f"peers-{size}-{platform.system().lower()}-{chip}.json"


def write_report(report: Report, file: Path) -> None:
    """Writes a comparison at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512, 1024], metavar="R")
    parser.add_argument("--runs", type=int, default=7, help="processes of each peer at each resolution")
    parser.add_argument("--peers", nargs="+", choices=[peer.name for peer in PEERS[1:]], metavar="PEER", help="not all")
    parser.add_argument("--here", action="store_true", help="run every peer in this environment")
    parser.add_argument("--dtype", choices=DTYPES, help="to compute in; float16 by default, float32 on a CPU")
    parser.add_argument("--images", type=int, help="for each process; 6 by default, 2 on a CPU, which is warm at once")
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="for checkpoints and images (10 GB)")
    parser.add_argument("--venvs", type=Path, help="for the peers' environments (3 GB); under --work by default")
    parser.add_argument("--output", type=Path, help="JSON file; under build/ by default")
    parser.add_argument("--record", action="store_true", help="replace the tracked results and tables at the end")
    parser.add_argument("--fresh", action="store_true", help="start again instead of continuing")
    parser.add_argument("--table", action="store_true", help="measure nothing; write the tables again")
    options = parser.parse_args()
    if options.table:
        write_tables(stored_reports(), README)
        return
    output: Path = options.output or BUILD / file_name(options.size)
    cpu = device() == "cpu"
    settings = Settings(
        size=options.size,
        dtype=options.dtype or ("float32" if cpu else "float16"),
        threads=options.threads,
        images=options.images or (2 if cpu else 6),
    )
    if output.exists() and not options.fresh:
        report = read_report(output)
        if report.settings != settings:
            raise SystemExit(f"error: {output} was measured with other settings; give --fresh or another --output")
    else:
        report = Report(conditions=conditions(), settings=settings)
    venvs = None if options.here else options.venvs or options.work / "venvs"
    place = Workplace(options.work, venvs, settings)
    named = [peer for peer in PEERS if peer is OURS or peer.name in (options.peers or ())]
    peers = named if options.peers else default_peers()
    if any(peer.dtype == "bfloat16" for peer in peers):
        report.instructions = bfloat16_instructions()

    measure(place, peers, options.resolutions, options.runs, report, lambda: write_report(report, output))
    print("\n".join(table(report)))
    if options.record:
        write_report(report, RESULTS / file_name(options.size))
        write_tables(stored_reports(), README)


if __name__ == "__main__":
    main()
