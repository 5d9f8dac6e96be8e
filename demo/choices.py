"""Compares the choice that is scored as the most probable with the generated answer, and tests its probability.

    python demo/choices.py

The questions are the yes/no and the colour questions of the first seed of `evaluate.py`; the choices are all answers
that such questions have in their language. A probability is calibrated if choices with a probability of 90 % are right
in 90 % of cases; the expected calibration error (ECE) is the mean distance from that, over ten equal bins, weighted by
their sizes. At 128 px, below the resolution that the demo model was made for, it has something to be unsure about.
Writes `choices.json` and `choices.png` into `build/`, or with `--record` beside this file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from evaluate import first_questions, folder_of

from fastvlm_mlx import PrefixCache, choose, generate, load
from fastvlm_mlx.jobs.questions import Question, read_questions

KINDS = ("exists", "colour")
RESOLUTIONS = (128, 192)
BINS = 10
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


def language(question: Question) -> bool:
    """Returns whether a question is in Chinese."""
    return bool(_CHINESE.search(question.question))


def measure(model: str, questions: Path, limit: int | None) -> dict[str, list[dict[str, Any]]]:
    """Returns for each resolution what was chosen and what generated, a record for each question."""
    network, processor = load(model)
    rows = [row for row in read_questions(questions) if isinstance(row, Question) and row.kind in KINDS]
    choices: dict[tuple[str, bool], set[str]] = defaultdict(set)
    for row in rows:
        choices[row.kind, language(row)].add(row.answers[0])
    rows = rows[:limit]
    results: dict[str, list[dict[str, Any]]] = {}
    for resolution in RESOLUTIONS:
        records = results.setdefault(str(resolution), [])
        for row in rows:
            cache = PrefixCache()
            asked = {"image": row.image, "prompt": row.question, "resolution": resolution, "prefix_cache": cache}
            offered = sorted(choices[row.kind, language(row)])
            scored = choose(network, processor, offered, **asked)
            raw = max(scored, key=lambda choice: choice.probability)
            corrected = max(scored, key=lambda choice: choice.corrected)
            generated = generate(network, processor, max_tokens=16, **asked).text
            records.append(
                {
                    "kind": row.kind,
                    "generated": generated in row.answers,
                    "raw": raw.text in row.answers,
                    "raw_probability": raw.probability,
                    "corrected": corrected.text in row.answers,
                    "corrected_probability": corrected.corrected,
                }
            )
    return results


def calibration(right: Sequence[bool], probabilities: Sequence[float]) -> tuple[list[tuple[float, float, int]], float]:
    """Returns (mean probability, share right, count) of each bin that is not empty, and the ECE."""
    hits, claimed = np.array(right, dtype=float), np.array(probabilities)
    places = np.minimum((claimed * BINS).astype(int), BINS - 1)
    bins = [
        (float(claimed[places == place].mean()), float(hits[places == place].mean()), int((places == place).sum()))
        for place in range(BINS)
        if (places == place).any()
    ]
    error = sum(count * abs(probability - share) for probability, share, count in bins) / len(hits)
    return bins, float(error)


def summarize(results: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns accuracy and calibration by resolution and kind."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for resolution, records in results.items():
        for kind in (*KINDS, "all"):
            chosen = [record for record in records if kind in (record["kind"], "all")]
            entry: dict[str, Any] = {"count": len(chosen)}
            for name in ("generated", "raw", "corrected"):
                entry[name] = sum(record[name] for record in chosen) / len(chosen)
            for name in ("raw", "corrected"):
                right = [record[name] for record in chosen]
                bins, error = calibration(right, [record[f"{name}_probability"] for record in chosen])
                entry |= {f"{name}_ece": error, f"{name}_bins": bins}
            table.setdefault(resolution, {})[kind] = entry
    return table


def plot(table: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Draws how often choices of each probability are right; a dot's area grows with their number."""
    figure, panels = plt.subplots(1, len(table), figsize=(7.2, 3.6), layout="constrained", sharey=True)
    for axes, (resolution, kinds) in zip(panels, table.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":")
        for name, colour in (("raw", "C0"), ("corrected", "C1")):
            bins = kinds["all"][f"{name}_bins"]
            label = f"{name}: ECE {100 * kinds['all'][f'{name}_ece']:.1f} %"
            axes.plot([x for x, _, _ in bins], [y for _, y, _ in bins], color=colour, linewidth=1, label=label)
            sizes = [8 + 120 * count / kinds["all"]["count"] for _, _, count in bins]
            axes.scatter([x for x, _, _ in bins], [y for _, y, _ in bins], s=sizes, color=colour)
        axes.set_title(f"{resolution} px", fontsize="medium")
        axes.set_xlabel("probability of the choice")
        axes.set_xlim(0, 1.03)
        axes.set_ylim(0, 1.03)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small", loc="upper left")
    panels[0].set_ylabel("share that is right")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Accuracy and calibration of the demo model's scored choices.")
    parser.add_argument("questions", type=Path, nargs="?", help="those of the first seed of evaluate.py by default")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--limit", type=int, help="ask only the first questions")
    parser.add_argument("--record", action="store_true", help="replace the tracked figures")
    options = parser.parse_args()
    folder = folder_of(options.record)
    table = summarize(measure(options.model, options.questions or first_questions(), options.limit))
    (folder / "choices.json").write_text(json.dumps(table, indent=2) + "\n")
    plot(table, folder / "choices.png")
    for resolution, kinds in table.items():
        for kind, entry in kinds.items():
            accuracy = ", ".join(f"{name} {100 * entry[name]:.1f} %" for name in ("generated", "raw", "corrected"))
            errors = ", ".join(f"{name} {100 * entry[f'{name}_ece']:.1f} %" for name in ("raw", "corrected"))
            print(f"{resolution} px, {kind:7}{entry['count']:5} questions: right {accuracy}; ECE {errors}")


if __name__ == "__main__":
    main()
