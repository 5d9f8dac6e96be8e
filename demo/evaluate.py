"""Measures the demo model on held-out questions that nobody can have looked at: their seeds come from its own weights.

    python demo/evaluate.py
    python demo/evaluate.py --model build/demo-int4 --out build/int4.json

The SHA-256 of the finished `model.safetensors`, read in groups of four hexadecimal digits, gives the seeds, so that
whoever changes the model changes the questions. For each of them `fastvlm eval` answers 2,000. Another model, a
quantized one say, is asked the same.
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

from scenes import KINDS, write_questions

HERE = Path(__file__).parent
WEIGHTS = HERE.parent / "fastvlm_mlx" / "demo_model" / "model.safetensors"
SEEDS = 5
QUESTIONS = 2000
"""Per seed."""
Z95 = 1.959964
"""Half-width of a 95 % interval in standard deviations."""


def seeds_of(digest: str) -> list[int]:
    """Returns the seeds: the first groups of four hexadecimal digits of a hash."""
    return [int(digest[4 * i : 4 * i + 4], 16) for i in range(SEEDS)]


def interval(right: int, count: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a share."""
    share, spread = right / count, Z95**2 / count
    middle = share + spread / 2
    half = Z95 * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)


def summarize(reports: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, object]]:
    """Returns score, interval and the spread between seeds, per kind and over all kinds but reading.

    Args:
        reports: per seed {kind: {"count", "score"}}.
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


def evaluate(model: str, questions: Path) -> dict[str, dict[str, float]]:
    """Returns what `fastvlm eval` says of a question file, per kind."""
    program = shutil.which("fastvlm", path=str(Path(sys.executable).parent)) or "fastvlm"
    command = [program, "eval", "--model", model, "--data", str(questions), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["kinds"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Accuracy of the demo model on questions that follow from its hash.")
    parser.add_argument("--model", default="demo", help="model to ask; the seeds are the demo's in any case")
    parser.add_argument("--data", type=Path, default=Path("build/evaluation"), help="folder of the questions")
    parser.add_argument("--out", type=Path, default=HERE / "evaluation.json")
    arguments = parser.parse_args()
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    seeds = seeds_of(digest)
    reports = []
    for seed in seeds:
        folder = arguments.data / str(seed)
        write_questions(folder, QUESTIONS, seed, held_out=True)
        reports.append(evaluate(arguments.model, folder / "questions.jsonl"))
    table = summarize(reports)
    result = {"model": arguments.model, "sha256": digest, "seeds": seeds, "questions": QUESTIONS, "kinds": table}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"sha256 {digest}\nseeds {seeds}, {QUESTIONS} questions each")
    print(f"{'kind':14}{'count':>6}{'exact':>8}   95 % interval   by seed, %")
    for kind, row in table.items():
        by_seed = " ".join(f"{100 * score:5.1f}" for score in row["by_seed"])
        share, low, high = (f"{100 * row[name]:.2f}" for name in ("score", "low", "high"))
        print(f"{kind:14}{row['count']:6}{share:>8}   {low}-{high:10}{by_seed}")


if __name__ == "__main__":
    main()
