"""Times the first token of fastvlm-mlx beside mlx-vlm and transformers (PyTorch) on the same random checkpoint.

Every sample comes from a fresh process, the peers taking turns (A B C A B C …), each with the same picture, prompt,
resolution, threads and float32 arithmetic. A process answers about two pictures. The time from its start to the first
token of the first answer is the **cold** TTFT; the time from the second picture's file to its first token is the
**warm** one. The first answer also gives the peak memory. For fastvlm-mlx, cold TTFT and memory are those of
`fastvlm generate`. Files are in the operating system's cache. At the end, all three answer about a picture that needs
no resizing, and their greedy tokens and log-probabilities are compared.

Peers live in virtual environments of their own; what is missing under --work is made there: environments, random
checkpoints in Apple's and transformers' layout, and mlx-vlm's and our conversions of them. After every process the
results so far are written; a run that was interrupted continues where it stopped.

    python benchmarks/peers.py --resolutions 256 512 1024 --runs 7
    python benchmarks/peers.py --table      # only write the README's table again
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

from fastvlm_mlx.bench import Statistics
from fastvlm_mlx.conditions import conditions
from fastvlm_mlx.pictures import Pictures
from fastvlm_mlx.random_weights import SIZES

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- bench-peers:begin -->", "<!-- bench-peers:end -->"
DEFAULT_WORK = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fastvlm-mlx-peers"
PROMPT = "Describe the image."
MAX_TOKENS = 8
CLI = "from fastvlm_mlx.cli import main; main()"
TOLERANCE = 1e-2
"""Largest difference of log-probabilities, in nats, that float32 arithmetic in another order may make."""

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
        checkpoint: The folder under --work that it loads.
        stored: What its checkpoint is stored as.
        preload: Put OpenBLAS before what it is linked to.
    """

    name: str
    script: str
    packages: tuple[str, ...] = ()
    checkpoint: str
    stored: str
    preload: bool = False


OURS = Peer(name="fastvlm-mlx", script="peer_ours.py", checkpoint="ours-{size}", stored="float16")
PEERS = (
    OURS,
    Peer(
        name="mlx-vlm",
        script="peer_mlx_vlm.py",
        packages=("mlx-vlm", "mlx[cpu]" if sys.platform == "linux" else "mlx"),
        checkpoint="mlx-vlm-{size}",
        stored="float32",
        preload=True,
    ),
    Peer(
        name="transformers",
        script="peer_transformers.py",
        packages=(_TORCH, "transformers", "timm"),
        checkpoint="transformers-{size}",
        stored="bfloat16",
    ),
)


class Workplace:
    """Environments, checkpoints and pictures, made when they are first needed.

    Args:
        work: The folder for all of them.
        venvs: The folder of the environments `peers-<name>`.
        size: Of the model.
        threads: For every peer.
    """

    def __init__(self, work: Path, venvs: Path, size: str, threads: int) -> None:
        self._work, self._venvs, self._size, self._threads = work, venvs, size, threads
        work.mkdir(parents=True, exist_ok=True)

    def python(self, peer: Peer) -> Path:
        """The interpreter of a peer's environment."""
        if not peer.packages:
            return Path(sys.executable)
        folder = self._venvs / f"peers-{peer.name.replace('-', '')}"
        python = folder / "bin" / "python"
        if not (folder / ".installed").exists():
            say(f"installing {', '.join(peer.packages)} into {folder}")
            venv.create(folder, with_pip=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *peer.packages], check=True)
            (folder / ".installed").touch()
        return python

    def checkpoint(self, peer: Peer, dtype: str | None = None) -> Path:
        """The folder that a peer loads; `dtype` asks for ours in another one."""
        folder = self._work / peer.checkpoint.format(size=self._size)
        if dtype:
            folder = folder.with_name(f"{folder.name}-{dtype}")
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
        command = [str(self.python(peer)), *program, *places, "--dtype", dtype or peer.stored]
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
        """The files of the two pictures of a run."""
        files = [self._work / f"picture-{2 * run + which}.jpg" for which in range(2)]
        for which, file in enumerate(files):
            file.write_bytes(Pictures()(2 * run + which))
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
        preload = {"LD_PRELOAD": "libopenblas.so.0"} if peer.preload and sys.platform == "linux" else {}
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
    }
    environment, python = place.environment(peer), place.python(peer)
    load = round(os.getloadavg()[0], 2)
    cold, output, _ = run_process([python, HERE / peer.script, json.dumps(request)], environment)
    result: dict[str, Any] = {"load_average": load, "cold_ttft": cold, **json.loads(output.splitlines()[-1])}
    if peer is OURS:
        question = ["generate", pictures[0], "--model", str(request["model"]), "--prompt", PROMPT]
        options = ["--resolution", str(resolution), "--max-tokens", str(MAX_TOKENS)]
        cold, _, peak = run_process([python, "-c", CLI, *question, *options], environment)
        result |= {"cold_ttft": cold, "peak_bytes": peak}
    return result


def agree(place: Workplace, resolution: int) -> dict[str, Any]:
    """The greedy tokens of every peer in float32 on the same pixels, and how far apart their log-probabilities are."""
    found: dict[str, Any] = {}
    for peer in PEERS:
        request = {
            "model": str(place.checkpoint(peer, "float32" if peer is OURS else None)),
            "pictures": [place.plain_picture(resolution)],
            "prompt": PROMPT,
            "resolution": resolution,
            "max_tokens": MAX_TOKENS,
            "logits": str(place.logits(peer)),
        }
        _, output, _ = run_process(
            [place.python(peer), HERE / peer.script, json.dumps(request)], place.environment(peer)
        )
        answer = json.loads(output.splitlines()[-1])
        found[peer.name] = {"tokens": answer["tokens"], "margins": answer["margins"]}
    ours = np.load(place.logits(OURS))
    for peer in PEERS[1:]:
        theirs = np.load(place.logits(peer))
        difference = float(np.abs(ours - theirs[: len(ours)]).max())
        found[peer.name] |= {"difference": difference, **compare_tokens(found[OURS.name], found[peer.name])}
    return found


def compare_tokens(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Whether two greedy answers are the same, and whether a tie within `TOLERANCE` explains where they part."""
    pairs = zip(ours["tokens"], theirs["tokens"], strict=True)
    parted = next((step for step, (mine, other) in enumerate(pairs) if mine != other), None)
    return {
        "equal": parted is None,
        "explained": parted is None or min(ours["margins"][parted], theirs["margins"][parted]) <= 2 * TOLERANCE,
    }


def measure(
    place: Workplace, resolutions: Sequence[int], runs: int, report: dict[str, Any], save: Callable[[], None]
) -> None:
    """Fills `report` with what it does not hold yet, saving it after every process."""
    samples: dict[str, Any] = report["samples"]
    pending = [
        (run, side, peer)
        for run in range(runs)
        for side in resolutions
        for peer in PEERS
        if len(samples.setdefault(str(side), {}).setdefault(peer.name, [])) <= run
    ]
    for peer in PEERS:
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
            report["agreement"][str(side)] = agree(place, side)
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
    names = [peer.name for peer in PEERS]
    yield f"| | | {' | '.join(names)} |"
    yield f"|---|---|{'---:|' * len(names)}"
    rows: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("warm TTFT", "warm_ttft", lambda value: f"{value:.2f} s"),
        ("cold TTFT", "cold_ttft", lambda value: f"{value:.2f} s"),
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
    compared = " and ".join(f"{side} px" for side in report["agreement"])
    equal = [
        peer["equal"] for answers in report["agreement"].values() for name, peer in answers.items() if name != OURS.name
    ]
    verdict = "are equal" if equal and all(equal) else "differ only where two candidates tie"
    yield ""
    yield (
        f"Measured on Linux without a GPU, not on a Mac: {found['chip']}, {report['settings']['threads']} threads, "
        if not found["system"].startswith("macOS")
        else f"Measured on {found['chip']}: "
    ) + (
        f"{report['settings']['size']} with random weights, float32 arithmetic, medians of fresh processes that took "
        f"turns ({counted}), factors relative to fastvlm-mlx. The first {MAX_TOKENS} greedy tokens of all three "
        f"{verdict} ({compared}). "
        f"{versions(report)}; samples in `benchmarks/results/`."
    )


def versions(report: dict[str, Any]) -> str:
    """The versions of the peers, for the table's caption."""
    found = report["versions"]
    return (
        f"mlx {found['fastvlm-mlx']['mlx']}, mlx-vlm {found['mlx-vlm']['mlx-vlm']}, "
        f"transformers {found['transformers']['transformers']}, torch {found['transformers']['torch']}"
    )


def write_table(report: dict[str, Any], readme: Path) -> None:
    """Puts the table between the markers of the README."""
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"error: {readme} has no {BEGIN} … {END} to put the table into")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(f"{before}{BEGIN}\n{chr(10).join(table(report))}\n{END}{after}", encoding="utf-8")


def default_output(size: str) -> Path:
    """`results/peers-<size>-<chip>.json`."""
    chip = re.sub(r"[^a-z0-9]+", "-", conditions()["chip"].lower()).strip("-")
    return HERE / "results" / f"peers-{size}-{platform.system().lower()}-{chip}.json"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 512, 1024], metavar="R")
    parser.add_argument("--runs", type=int, default=7, help="processes of each peer at each resolution")
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="for checkpoints and pictures (10 GB)")
    parser.add_argument("--venvs", type=Path, help="for the peers' environments (3 GB); under --work by default")
    parser.add_argument("--output", type=Path, help="JSON file; under benchmarks/results by default")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--table", action="store_true", help="measure nothing; write the README's table from the file")
    options = parser.parse_args()
    output: Path = options.output or default_output(options.size)
    known = json.loads(output.read_text()) if output.exists() and not options.fresh else None
    if options.table:
        if known is None:
            raise SystemExit(f"error: {output} does not exist; measure first")
        write_table(known, README)
        return
    settings = {"size": options.size, "threads": options.threads, "prompt": PROMPT, "max_tokens": MAX_TOKENS}
    if known and known["settings"] != settings:
        raise SystemExit(f"error: {output} was measured with other settings; give --fresh or another --output")
    report = known or {
        "conditions": conditions(),
        "settings": settings,
        "stored": {peer.name: peer.stored for peer in PEERS},
        "versions": {},
        "samples": {},
        "agreement": {},
    }
    place = Workplace(options.work, options.venvs or options.work / "venvs", options.size, options.threads)

    def save() -> None:
        summarize(report)
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        partial.replace(output)

    measure(place, options.resolutions, options.runs, report, save)
    print("\n".join(table(report)))
    if options.output is None:
        write_table(report, README)


if __name__ == "__main__":
    main()
