"""Measures size, time and memory of a full-size quantization, each step in a process of its own.

    python benchmarks/random_checkpoint.py 0.5b build/source && fastvlm convert build/source build/float16
    python benchmarks/quantization.py build/float16 build/quantized

Prints one JSON object, as kept in `quantization.json` beside this file. Memory after load counts all arrays in
memory, dequantized copies included, and is given as a share of the float16 folder's on the same machine.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PRESETS = ("int8", "int4")


def peak() -> int:
    """Returns the size of this process's largest resident set in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def quantize(source: Path, target: Path, preset: str) -> dict[str, Any]:
    """Quantizes with a report; returns seconds, processor seconds and peak bytes."""
    start = time.perf_counter()
    from fastvlm_mlx.convert.pipeline import convert_and_quantize
    from fastvlm_mlx.convert.quantize.scheme import Quantization

    report = convert_and_quantize(source, target, quantization=Quantization(preset=preset))
    assert report is not None
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time(),
        "peak_bytes": peak(),
        "size_ratio": report.size_ratio,
        "load_average": os.getloadavg()[0],
    }


def run(folder: Path) -> dict[str, Any]:
    """Loads and answers; returns seconds to load, bytes in memory after it, and the decoding speed."""
    start = time.perf_counter()
    import numpy as np

    from fastvlm_mlx import generate, load
    from fastvlm_mlx.backend import mx

    model, processor = load(folder)
    mx.eval(model.parameters())
    loaded, held = time.perf_counter() - start, mx.get_active_memory()
    image = np.zeros((256, 256, 3), np.uint8)
    result = generate(model, processor, image=image, prompt="Describe.", max_tokens=24, resolution=256)
    return {
        "load_seconds": loaded,
        "held_bytes": held,
        "ttft_seconds": result.timings.ttft,
        "tokens_per_second": result.tokens_per_second,
        "peak_bytes": peak(),
        "load_average": os.getloadavg()[0],
    }


def child(*arguments: object) -> dict[str, Any]:
    """Runs one step in a fresh process and returns its measurements."""
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    """Runs all steps, or the one that the arguments name."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s SOURCE WORK", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a converted folder, not quantized")
    parser.add_argument("work", type=Path, nargs="?", help="folder for the quantized checkpoints")
    parser.add_argument("--preset", help=argparse.SUPPRESS)  # one step: quantizes `source` to `work`
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)  # one step: loads `source` and answers
    options = parser.parse_args()
    source, work = options.source, options.work
    if options.run:
        print(json.dumps(run(source)))
        return
    if work is None:
        parser.error("the folder for the quantized checkpoints is missing")
    if options.preset:
        print(json.dumps(quantize(source, work, options.preset)))
        return
    if kept := [preset for preset in PRESETS if (work / preset).exists()]:
        parser.error(f"{work / kept[0]} exists already; remove it or choose another folder, so that all is measured")
    from fastvlm_mlx.bench.conditions import conditions

    results: dict[str, Any] = {"conditions": conditions().to_dict(), "float16": child(source, "--run")}
    for preset in PRESETS:
        made = child(source, work / preset, "--preset", preset)
        results[preset] = {"quantize": made, **child(work / preset, "--run")}
        results[preset]["held_ratio"] = results[preset]["held_bytes"] / results["float16"]["held_bytes"]
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
