"""Measures what `fastvlm serve --background` saves: from the start of a command to its first character.

Every run asks about a new picture, so that no answer comes from a cache. The four ways take turns, so that a busy
moment of the machine hits all:

- **model**: `stream_generate` in a process that holds the model, from encoded bytes to the first token;
- **warm**: `fastvlm generate` with the background server, from the start of the process to the first character;
- **warm again**: the same about the same picture, which the server has seen;
- **cold**: `fastvlm generate --no-warm`.

    python benchmarks/warm.py demo
    python benchmarks/warm.py MODEL --resolution 256 --record
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from recording import write_report

from fastvlm_mlx import load, stream_generate
from fastvlm_mlx.bench.conditions import conditions
from fastvlm_mlx.bench.images import Images

COMMAND = [sys.executable, "-m", "fastvlm_mlx"]
PROMPT = "Describe the image."
WAYS = ("model", "warm", "warm again", "cold")


def first_character(arguments: list[str]) -> tuple[float, str]:
    """Returns the seconds from the start of a command to the first character that it writes, and all that it writes."""
    start = time.perf_counter()
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        rest = process.stdout.read()
    if process.returncode:
        sys.exit(f"{' '.join(arguments)}: ended with {process.returncode}")
    return seconds, (first + rest).decode()


def measure(options: argparse.Namespace) -> tuple[dict[str, list[float]], list[dict[str, str]]]:
    """Returns the seconds of every way, and the answers to every picture."""
    images = Images()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    answers: list[dict[str, str]] = []
    network, processor = load(options.model)
    settings: dict[str, Any] = {"resolution": options.resolution, "max_tokens": options.max_tokens}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-options.warm_ups, options.runs):
            picture = Path(folder, f"{number}.jpg")
            picture.write_bytes(images(number + options.warm_ups))
            question = ["generate", str(picture), "-m", options.model, "-p", PROMPT, "-n", str(options.max_tokens)]
            question += [] if options.resolution is None else ["-r", str(options.resolution)]
            pieces = list(stream_generate(network, processor, PROMPT, picture, **settings))
            taken = {"model": (pieces[0].timings.ttft, "".join(piece.text for piece in pieces) + "\n")}
            for way in ("warm", "warm again"):
                taken[way] = first_character(question)
            taken["cold"] = first_character([*question, "--no-warm"])
            if number >= 0:
                for way, (each, _) in taken.items():
                    seconds[way].append(each)
                answers.append({way: answer for way, (_, answer) in taken.items()})
    return seconds, answers


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as for `fastvlm generate`")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--warm-ups", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="write to the tracked results")
    options = parser.parse_args()
    before = conditions()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FASTVLM_CACHE"] = cache
        subprocess.run([*COMMAND, "serve", options.model, "--background"], check=True)
        try:
            seconds, answers = measure(options)
        finally:
            subprocess.run([*COMMAND, "stop"], check=True)
    medians = {way: median(values) for way, values in seconds.items()}
    over = medians["warm"] - medians["model"]
    same = all(len(set(each.values())) == 1 for each in answers)
    name = Path(options.model).name
    values = {
        "conditions": before.to_dict(),
        "model": name,
        "settings": {"resolution": options.resolution, "max_tokens": options.max_tokens, "runs": options.runs},
        "seconds": seconds,
        "answers": answers,
    }
    file = write_report("warm", values, name, str(options.resolution or "native"), record=options.record)
    for way, value in medians.items():
        print(f"{way:<10}  {value:.3f} s")
    print(f"warm takes {over:.3f} s more than the model; the answers {'agree' if same else 'DIFFER'}")
    print(json.dumps({"medians": medians, "over": over, "same": same, "file": str(file)}))


if __name__ == "__main__":
    main()
