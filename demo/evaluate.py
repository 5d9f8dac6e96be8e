"""Measures the demo model on held-out questions that nobody can have looked at: their seeds come from its own weights.

    python demo/evaluate.py --record
    python demo/evaluate.py --model build/quantized/int4 --baseline demo

The seeds are the first groups of four hexadecimal digits of the SHA-256 of `model.safetensors`. Whoever changes the
model therefore changes the questions. `fastvlm eval` answers 2,000 questions of each seed. Any other model, such as a
quantized one, answers the same questions; with a baseline, the two are compared question by question. The result goes
into `build/evaluation.json`, or with `--record` into the one beside this file, which is about the shipped model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import stdev
from typing import Any

from scenes import KINDS, write_questions

HERE = Path(__file__).parent
WEIGHTS = HERE.parent / "fastvlm_mlx" / "demo_model" / "model.safetensors"
BUILD = Path("build")
DATA = BUILD / "evaluation"
SEEDS = 5
QUESTIONS = 2000
"""Per seed."""
Z95 = 1.959964
"""Half-width of a 95 % interval in standard deviations."""


def seeds_of(digest: str) -> list[int]:
    """Returns the seeds: the first groups of four hexadecimal digits of a hash."""
    return [int(digest[4 * i : 4 * i + 4], 16) for i in range(SEEDS)]


def shipped_digest() -> str:
    """Returns the SHA-256 of the weights that come with the package."""
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


def questions_of(seed: int, data: Path = DATA) -> Path:
    """Returns the file of a seed's questions, which are drawn into a folder of `data`."""
    folder = data / str(seed)
    write_questions(folder, QUESTIONS, seed, held_out=True)
    return folder / "questions.jsonl"


def first_questions() -> Path:
    """Returns the file of the first seed's questions; the other figures of the demo are measured on them."""
    return questions_of(seeds_of(shipped_digest())[0])


def interval(right: int, count: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a share."""
    share, spread = right / count, Z95**2 / count
    middle = share + spread / 2
    half = Z95 * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)


def summarize(reports: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Returns score, interval and spread between seeds, for each kind and for all kinds but "read".

    Args:
        reports: for each seed {kind: {"count", "score"}}.
    """
    groups = {**{kind: (kind,) for kind in KINDS}, "all but read": tuple(kind for kind in KINDS if kind != "read")}
    table = {}
    for name, kinds in groups.items():
        counts = [sum(report[kind]["count"] for kind in kinds) for report in reports]
        rights = [sum(round(report[kind]["count"] * report[kind]["score"]) for kind in kinds) for report in reports]
        by_seed = [right / count for right, count in zip(rights, counts, strict=True)]
        low, high = interval(sum(rights), sum(counts))
        table[name] = {
            "count": sum(counts),
            "score": sum(rights) / sum(counts),
            "low": low,
            "high": high,
            "by_seed": by_seed,
            "deviation": stdev(by_seed),
        }
    return table


def paired(comparisons: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the difference from a baseline over all seeds, with its 95 % interval, and the share of equal answers.

    Args:
        comparisons: for each seed the entry "baseline" of `fastvlm eval --json`.
    """
    count = sum(seed["agreement"]["count"] for seed in comparisons)
    won, lost = (sum(seed[name] for seed in comparisons) for name in ("won", "lost"))
    equal = sum(seed["agreement"]["count"] * seed["agreement"]["score"] for seed in comparisons)
    difference = (won - lost) / count
    # Each question counts as 1, 0 or -1.
    half = Z95 * math.sqrt((won + lost - count * difference**2) / (count - 1) / count)
    return {
        "count": count,
        "agreement": equal / count,
        "difference": difference,
        "low": difference - half,
        "high": difference + half,
        "won": won,
        "lost": lost,
    }


def evaluate(model: str, questions: Path, baseline: str | None) -> dict[str, Any]:
    """Returns the report of `fastvlm eval` on a question file."""
    program = shutil.which("fastvlm", path=str(Path(sys.executable).parent)) or "fastvlm"
    command = [program, "eval", "--model", model, "--data", str(questions), "--json"]
    if baseline:
        command += ["--baseline", baseline]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))


def folder_of(record: bool) -> Path:
    """Returns the folder that results go to: the one of the tracked figures only if they are to be recorded."""
    folder = HERE if record else BUILD
    folder.mkdir(exist_ok=True)
    return folder


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Accuracy of the demo model on questions that follow from its hash.")
    parser.add_argument("--model", default="demo", help="model to ask; the seeds are the shipped demo's in any case")
    parser.add_argument("--baseline", help="another model, to compare with on each question")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the questions")
    parser.add_argument("--out", type=Path, help="write the result into this JSON file instead")
    parser.add_argument("--record", action="store_true", help="write beside this script, not into build/")
    arguments = parser.parse_args()
    if arguments.record and (arguments.out or arguments.model != "demo" or arguments.baseline):
        parser.error("--record is for the shipped model alone, at its usual place")
    digest = shipped_digest()
    seeds = seeds_of(digest)
    files = [questions_of(seed, arguments.data) for seed in seeds]
    reports = [evaluate(arguments.model, file, arguments.baseline) for file in files]
    table = summarize([report["kinds"] for report in reports])
    result = {
        "model": Path(arguments.model).name,
        "sha256": digest,
        "seeds": seeds,
        "questions": QUESTIONS,
        "kinds": table,
    }
    if arguments.baseline:
        comparison = paired([report["baseline"] for report in reports])
        result["baseline"] = {"model": Path(arguments.baseline).name, **comparison}
    out = arguments.out or folder_of(arguments.record) / "evaluation.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"sha256 {digest}\nseeds {seeds}, {QUESTIONS} questions each")
    print(f"{'kind':14}{'count':>6}{'exact':>8}   95 % interval   by seed, %")
    for kind, row in table.items():
        by_seed = " ".join(f"{100 * score:5.1f}" for score in row["by_seed"])
        share, low, high = (f"{100 * row[name]:.2f}" for name in ("score", "low", "high"))
        print(f"{kind:14}{row['count']:6}{share:>8}   {low}-{high:10}{by_seed}")
    if arguments.baseline:
        share, difference, low, high = (100 * comparison[name] for name in ("agreement", "difference", "low", "high"))
        print(f"same answer as {arguments.baseline}: {share:.2f} %")
        print(f"difference: {difference:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}")


if __name__ == "__main__":
    main()
