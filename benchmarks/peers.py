"""Times the first token of fastvlm-mlx beside mlx-vlm and transformers (PyTorch) on the same random checkpoint.

Every sample comes from a fresh process, the peers taking turns (A B C A B C …), each with the same picture, prompt,
resolution, threads and arithmetic: float32 on a CPU, float16 on a GPU. A process answers about several pictures. The
time from its start to the first token of the first answer is the **cold** TTFT; the time from the last picture's file
to its first token is the **warm** one. The first answer also gives the peak memory, on a GPU that which was allocated
there. For fastvlm-mlx, cold TTFT and a CPU's memory are those of `fastvlm generate`. Files are in the operating
system's cache. At the end, all answer about a picture that needs no resizing, and their greedy tokens and
log-probabilities are compared.

Peers live in virtual environments of their own; what is missing under --work is made there: environments, random
checkpoints in Apple's and transformers' layout, and mlx-vlm's and our conversions of them. After every process the
results so far are written; a run that was interrupted continues where it stopped.

    python benchmarks/peers.py --resolutions 256 512 1024 --runs 7
    python benchmarks/peers.py --peers transformers --here      # only this peer, installed where we are
    python benchmarks/peers.py --table      # only write the README's tables again
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from fastvlm_mlx.backend import device
from fastvlm_mlx.bench.conditions import conditions
from fastvlm_mlx.bench.images import Pictures
from fastvlm_mlx.bench.statistics import Statistics
from fastvlm_mlx.bench.tables import table as stage_table
from fastvlm_mlx.checkpoint.released import SIZES
from fastvlm_mlx.formatting import as_markdown

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
RESULTS = HERE / "results"
BEGIN, END = "<!-- bench-peers:begin -->", "<!-- bench-peers:end -->"
DEFAULT_WORK = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fastvlm-mlx-peers"
PROMPT = "Describe the image."
MAX_TOKENS = 8
CLI = "from fastvlm_mlx.cli import main; main()"
TOLERANCES = {"float32": 1e-2, "float16": 0.05}
"""Largest difference of log-probabilities, in nats, that arithmetic in another order may make; seen: 5e-4 and 0.032."""

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""What `ru_maxrss` counts in, in bytes."""

_TORCH = "torch==2.13.0"
"""The version that was compared with."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A program to compare.

    Attributes:
        name: What tables call it.
        script: What one of its processes runs.
        packages: What to install into its environment; none: it runs in this one.
        stored: What its checkpoint is stored as; None: what it computes in.
        preload: On a CPU, put OpenBLAS before what it is linked to.
    """

    name: str
    script: str
    packages: tuple[str, ...] = ()
    stored: str | None = None
    preload: bool = False


OURS = Peer(name="fastvlm-mlx", script="peer_ours.py", stored="float16")
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
        stored="bfloat16",
    ),
)


class Workplace:
    """Environments, checkpoints and pictures, made when they are first needed.

    Args:
        work: The folder for all of them.
        venvs: The folder of the environments `peers-<name>`; None: all run in this one.
        size: Of the model.
        threads: For every peer.
        dtype: To compute in.
        pictures: That a process answers about.
    """

    def __init__(self, work: Path, venvs: Path | None, size: str, threads: int, dtype: str, pictures: int) -> None:
        self._work, self._venvs, self._size, self._threads, self._pictures = work, venvs, size, threads, pictures
        self.dtype = dtype
        work.mkdir(parents=True, exist_ok=True)

    def python(self, peer: Peer) -> Path:
        """The interpreter of a peer's environment."""
        if not peer.packages or self._venvs is None:
            return Path(sys.executable)
        folder = self._venvs / f"peers-{peer.name.replace('-', '')}"
        python = folder / "bin" / "python"
        if not (folder / ".installed").exists():
            say(f"installing {', '.join(peer.packages)} into {folder}")
            venv.create(folder, with_pip=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *peer.packages], check=True)
            (folder / ".installed").touch()
        return python

    def checkpoint(self, peer: Peer, stored: str | None = None) -> Path:
        """The folder that a peer loads; `stored` asks for its weights in another dtype than is usual."""
        stored = stored or peer.stored or self.dtype
        folder = self._work / f"{peer.name}-{self._size}-{stored}"
        if folder.exists():
            return folder
        say(f"making {folder}")
        if peer.name == "transformers":
            return self._random(folder, "transformers")
        source = self._work / f"apple-{self._size}"
        if not source.exists():
            self._random(source, "apple")
        partial = folder.with_name(folder.name + ".partial")
        program = ["-m", "mlx_vlm", "convert"] if peer.packages else ["-c", CLI, "convert"]
        places = (
            ["--hf-path", str(source), "--mlx-path", str(partial)] if peer.packages else [str(source), str(partial)]
        )
        command = [str(self.python(peer)), *program, *places, "--dtype", stored]
        done = subprocess.run(command, env=self.environment(peer), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"error: converting for {peer.name} failed:\n{done.stderr[-2000:]}")
        partial.rename(folder)
        return folder

    def _random(self, folder: Path, layout: str) -> Path:
        script = HERE / "random_checkpoint.py"
        subprocess.run([sys.executable, script, self._size, folder, "--layout", layout], stdout=sys.stderr, check=True)
        return folder

    def pictures(self, run: int) -> list[str]:
        """The files of the pictures of a run."""
        numbers = range(self._pictures * run, self._pictures * (run + 1))
        files = [self._work / f"picture-{number}.jpg" for number in numbers]
        for number, file in zip(numbers, files, strict=True):
            file.write_bytes(Pictures()(number))
        return [str(file) for file in files]

    def plain_picture(self, resolution: int) -> str:
        """The file of a picture that has the resolution already, and so the same pixels for everybody."""
        file = self._work / f"picture-{resolution}.png"
        with Image.open(io.BytesIO(Pictures()(0))) as picture:
            picture.resize((resolution, resolution)).save(file)
        return str(file)

    def logits(self, peer: Peer) -> Path:
        """The file for a peer's first log-probabilities."""
        return self._work / f"logits-{peer.name}.npy"

    def environment(self, peer: Peer) -> dict[str, str]:
        """What a peer's process sees: the same number of threads for all, OpenBLAS, no network."""
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        preload = {"LD_PRELOAD": "libopenblas.so.0"} if peer.preload and device() == "cpu" else {}
        return {**os.environ, **dict.fromkeys(names, str(self._threads)), **offline, **preload}


def say(text: str) -> None:
    """Writes progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def run_process(arguments: Sequence[str | Path], environment: dict[str, str]) -> tuple[float, str, int]:
    """Seconds from the start of a process to its first character, its whole output, and the bytes it had in RAM.

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


def sample(place: Workplace, peer: Peer, resolution: int, run: int) -> dict[str, Any]:
    """One process of a peer; of ours two, since the command line answers the cold question."""
    pictures = place.pictures(run)
    request = {
        "model": str(place.checkpoint(peer)),
        "pictures": pictures,
        "prompt": PROMPT,
        "resolution": resolution,
        "max_tokens": MAX_TOKENS,
        "dtype": place.dtype,
    }
    environment, python = place.environment(peer), place.python(peer)
    load = round(os.getloadavg()[0], 2)
    cold, output, _ = run_process([python, HERE / peer.script, json.dumps(request)], environment)
    result: dict[str, Any] = {"load_average": load, "cold_ttft": cold, **json.loads(output.splitlines()[-1])}
    if peer is OURS:
        question = ["generate", pictures[0], "--model", str(request["model"]), "--prompt", PROMPT]
        options = ["--resolution", str(resolution), "--max-tokens", str(MAX_TOKENS), "--dtype", place.dtype]
        result["cold_ttft"], _, peak = run_process([python, "-c", CLI, *question, *options], environment)
        if device() == "cpu":
            result["peak_bytes"] = peak
    return result


def agree(place: Workplace, peers: Sequence[Peer], resolution: int) -> dict[str, Any]:
    """The greedy tokens of every peer on the same pixels, and how far their log-probabilities are from ours."""
    found: dict[str, Any] = {}
    for peer in peers:
        request = {
            "model": str(place.checkpoint(peer, place.dtype if peer is OURS else None)),
            "pictures": [place.plain_picture(resolution)],
            "prompt": PROMPT,
            "resolution": resolution,
            "max_tokens": MAX_TOKENS,
            "dtype": place.dtype,
            "logits": str(place.logits(peer)),
        }
        _, output, _ = run_process(
            [place.python(peer), HERE / peer.script, json.dumps(request)], place.environment(peer)
        )
        answer = json.loads(output.splitlines()[-1])
        found[peer.name] = {"tokens": answer["tokens"], "margins": answer["margins"]}
    ours = np.load(place.logits(OURS))
    for peer in peers:
        if peer is not OURS:
            theirs = np.load(place.logits(peer))
            difference = float(np.abs(ours - theirs[: len(ours)]).max())
            tokens = compare_tokens(found[OURS.name], found[peer.name], TOLERANCES[place.dtype])
            found[peer.name] |= {"difference": difference, **tokens}
    return found


def compare_tokens(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """Whether two greedy answers are the same, and whether a tie within `tolerance` explains where they part."""
    pairs = zip(ours["tokens"], theirs["tokens"], strict=True)
    parted = next((step for step, (mine, other) in enumerate(pairs) if mine != other), None)
    return {
        "equal": parted is None,
        "explained": parted is None or min(ours["margins"][parted], theirs["margins"][parted]) <= 2 * tolerance,
    }


def measure(
    place: Workplace,
    peers: Sequence[Peer],
    resolutions: Sequence[int],
    runs: int,
    report: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Fills `report` with what it does not hold yet, saving it after every process."""
    samples: dict[str, Any] = report["samples"]
    pending = [
        (run, side, peer)
        for run in range(runs)
        for side in resolutions
        for peer in peers
        if len(samples.setdefault(str(side), {}).setdefault(peer.name, [])) <= run
    ]
    for peer in peers:
        place.python(peer)
        place.checkpoint(peer)
    taken: dict[tuple[int, str], list[float]] = {}
    for number, (run, side, peer) in enumerate(pending):
        start = time.perf_counter()
        result = sample(place, peer, side, run)
        report["versions"][peer.name] = result.pop("versions")
        samples[str(side)][peer.name].append(result)
        save()
        taken.setdefault((side, peer.name), []).append(time.perf_counter() - start)
        rest = [median(known) for _, s, p in pending[number + 1 :] if (known := taken.get((s, p.name)))]
        unknown = len(pending) - number - 1 - len(rest)
        say(
            f"run {run + 1}/{runs}, {side} px, {peer.name}: cold {result['cold_ttft']:.2f} s, "
            f"warm {result['warm_ttft']:.2f} s; {sum(rest) / 60:.1f} min left"
            + (f" and {unknown} processes not timed yet" if unknown else "")
        )
    for side in resolutions:
        if str(side) not in report["agreement"]:
            report["agreement"][str(side)] = agree(place, peers, side)
            save()
            say(f"{side} px: {json.dumps(report['agreement'][str(side)])}")


def summarize(report: dict[str, Any]) -> None:
    """Adds the statistics of the samples to a report."""
    report["summary"] = {
        side: {
            name: {
                metric: asdict(Statistics.of([result[metric] for result in results]))
                for metric in ("cold_ttft", "warm_ttft", "decode_rate", "peak_bytes")
            }
            for name, results in peers.items()
            if results
        }
        for side, peers in report["samples"].items()
    }


def table(report: dict[str, Any]) -> Iterator[str]:
    """The README's lines."""
    names = [peer.name for peer in PEERS if peer.name in report["versions"]]
    yield f"| | | {' | '.join(names)} |"
    yield f"|---|---|{'---:|' * len(names)}"
    rows: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("warm TTFT", "warm_ttft", _seconds),
        ("cold TTFT", "cold_ttft", _seconds),
        ("peak memory", "peak_bytes", lambda value: f"{value / 1e9:.2f} GB"),
    )
    for title, metric, text in rows:
        for side, peers in report["summary"].items():
            ours = peers[OURS.name][metric]["median"]
            cells = [
                text(peers[name][metric]["median"])
                + ("" if name == OURS.name else f" ({peers[name][metric]['median'] / ours:.1f}×)")
                for name in names
            ]
            yield f"| {title} | {side} px | {' | '.join(cells)} |"
    found = report["conditions"]
    runs = {side: min(map(len, peers.values())) for side, peers in report["samples"].items()}
    counted = ", ".join(f"{count} at {side} px" for side, count in runs.items())
    compared = ", ".join(f"{side} px" for side in report["agreement"])
    equal = [
        peer["equal"] for answers in report["agreement"].values() for name, peer in answers.items() if name != OURS.name
    ]
    explained = all(
        peer["explained"]
        for answers in report["agreement"].values()
        for name, peer in answers.items()
        if name != OURS.name
    )
    verdict = "are equal" if all(equal) else "part where two candidates tie" if explained else "differ"
    yield ""
    yield (
        f"Measured {where(found)}: {found['chip']}, {report['settings']['threads']} threads, "
        f"{report['settings']['size']} with random weights, {report['settings']['dtype']} arithmetic, medians of fresh "
        f"processes that took turns ({counted}), factors relative to fastvlm-mlx. "
        + (f"The first {MAX_TOKENS} greedy tokens of all {verdict} ({compared}). " if equal else "")
        + f"{versions(report)}; samples in `benchmarks/results/`."
    )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.0f} ms"


def where(found: dict[str, Any]) -> str:
    """The kind of machine of a measurement's conditions."""
    if found["system"].startswith("macOS"):
        return "on a Mac"
    gpu = "on an NVIDIA GPU" if found["device"] == "gpu" else "without a GPU"
    return f"on Linux {gpu}, not on a Mac"


def versions(report: dict[str, Any]) -> str:
    """The versions of what was compared, for the table's caption."""
    found = {name: version for versions in report["versions"].values() for name, version in versions.items()}
    return ", ".join(f"{name} {found[name]}" for name in ("mlx", "mlx-vlm", "transformers", "torch") if name in found)


def stages(report: dict[str, Any]) -> Iterator[str]:
    """The README's lines for a report of `fastvlm bench` about one model."""
    found, row = report["conditions"], report["rows"][0]
    yield as_markdown([cells[2:] for cells in stage_table(report)], left=2)
    yield ""
    yield (
        f"{row['model']}, {row['precision']['language_model']}, by stage: medians in ms of "
        f"{report['settings']['runs']} runs in one warm process; measured {where(found)}: {found['chip']}."
    )


def write_tables(reports: Sequence[dict[str, Any]], readme: Path) -> None:
    """Puts a table of each report, of this comparison or of `fastvlm bench`, between the markers of the README."""
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"error: {readme} has no {BEGIN} … {END} to put the table into")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    tables = "\n\n".join("\n".join((stages if "rows" in report else table)(report)) for report in reports)
    readme.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}", encoding="utf-8")


def stored_reports() -> list[dict[str, Any]]:
    """What has been measured and kept, on any machine: comparisons, then reports of `fastvlm bench`."""
    files = [file for kind in ("peers", "bench") for file in sorted(RESULTS.glob(f"{kind}-*.json"))]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def default_output(size: str) -> Path:
    """`results/peers-<size>-<chip>.json`."""
    chip = re.sub(r"[^a-z0-9]+", "-", conditions()["chip"].lower()).strip("-")
    return RESULTS / f"peers-{size}-{platform.system().lower()}-{chip}.json"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512, 1024], metavar="R")
    parser.add_argument("--runs", type=int, default=7, help="processes of each peer at each resolution")
    parser.add_argument("--peers", nargs="+", choices=[peer.name for peer in PEERS[1:]], metavar="PEER", help="not all")
    parser.add_argument("--here", action="store_true", help="run every peer in this environment")
    parser.add_argument("--dtype", choices=TOLERANCES, help="to compute in; float16 by default, float32 on a CPU")
    parser.add_argument(
        "--pictures", type=int, help="for each process; 6 by default, 2 on a CPU, which is warm at once"
    )
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="for checkpoints and pictures (10 GB)")
    parser.add_argument("--venvs", type=Path, help="for the peers' environments (3 GB); under --work by default")
    parser.add_argument("--output", type=Path, help="JSON file; under benchmarks/results by default")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--table", action="store_true", help="measure nothing; write the README's tables again")
    options = parser.parse_args()
    if options.table:
        write_tables(stored_reports(), README)
        return
    output: Path = options.output or default_output(options.size)
    known = json.loads(output.read_text()) if output.exists() and not options.fresh else None
    settings = {
        "size": options.size,
        "dtype": options.dtype or ("float32" if device() == "cpu" else "float16"),
        "threads": options.threads,
        "pictures": options.pictures or (2 if device() == "cpu" else 6),
        "prompt": PROMPT,
        "max_tokens": MAX_TOKENS,
    }
    if known and known["settings"] != settings:
        raise SystemExit(f"error: {output} was measured with other settings; give --fresh or another --output")
    report = known or {
        "conditions": conditions(),
        "settings": settings,
        "versions": {},
        "samples": {},
        "agreement": {},
    }
    venvs = None if options.here else options.venvs or options.work / "venvs"
    place = Workplace(options.work, venvs, options.size, options.threads, settings["dtype"], settings["pictures"])
    peers = [peer for peer in PEERS if peer is OURS or not options.peers or peer.name in options.peers]

    def save() -> None:
        summarize(report)
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        partial.replace(output)

    measure(place, peers, options.resolutions, options.runs, report, save)
    print("\n".join(table(report)))
    if options.output is None:
        write_tables(stored_reports(), README)


if __name__ == "__main__":
    main()
