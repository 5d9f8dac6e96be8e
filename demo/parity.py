"""Compares greedy answers of the checkpoint as it was trained, in PyTorch, with those of the runtime after folding.

    python demo/scenes.py --held-out --out build/held-out
    python demo/parity.py build/held-out/questions.jsonl

The runtime's processor prepares images and prompts for both, so that only the networks differ. Then the runtime's
float16 answers are compared with its float32 answers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from model import FastVLM

from fastvlm_mlx import generate, load
from fastvlm_mlx.config import IMAGE_TOKEN
from fastvlm_mlx.jobs.evaluate import ANSWER_TOKENS
from fastvlm_mlx.jobs.questions import Question, read_questions

CHECKPOINT = Path(__file__).parent.parent / "fastvlm_mlx" / "demo_model"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Compare PyTorch's answers with the runtime's.")
    parser.add_argument("questions", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="in Apple's train-time layout")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, help="write the counts into this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    reference = FastVLM.load(arguments.checkpoint)
    (full, processor), (half, _) = (load(arguments.checkpoint, dtype=dtype) for dtype in ("float32", "float16"))
    rows = [row for row in read_questions(arguments.questions) if isinstance(row, Question)][: arguments.limit]
    counts = {"questions": len(rows), "float32_equals_torch": 0, "float16_equals_float32": 0}
    for row in rows:
        inputs = processor(row.image, row.question)
        ids = inputs["input_ids"][0].tolist()
        image = ids.index(IMAGE_TOKEN)
        pixels = torch.from_numpy(inputs["pixel_values"].astype(np.float32) / 255).permute(0, 3, 1, 2)
        expected = reference.greedy(pixels, ids[:image], ids[image + 1 :], processor.eos_token_ids, ANSWER_TOKENS)
        answers = [
            generate(model, processor, image=row.image, prompt=row.question, max_tokens=ANSWER_TOKENS).token_ids
            for model in (full, half)
        ]
        counts["float32_equals_torch"] += answers[0] == tuple(expected)
        counts["float16_equals_float32"] += answers[1] == answers[0]
        if answers[0] != tuple(expected) or answers[1] != answers[0]:
            texts = [processor.decode(list(tokens)) for tokens in (expected, *answers)]
            print(f"line {row.line}: torch {texts[0]!r}, float32 {texts[1]!r}, float16 {texts[2]!r}")
    print(json.dumps(counts))
    if arguments.out:
        arguments.out.write_text(json.dumps(counts, indent=2) + "\n")


if __name__ == "__main__":
    main()
