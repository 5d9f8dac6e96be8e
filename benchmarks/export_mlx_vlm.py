"""Loads an export of `fastvlm convert --format mlx-vlm` in mlx-vlm and compares its logits with upstream's.

    python benchmarks/export_mlx_vlm.py EXPORT tests/golden/apple

It runs in an environment with mlx-vlm and without this project. The second folder holds `spec.json`, `prompt.txt` and
`expected.safetensors` as the golden checkpoints do. `fastvlm convert` refuses to export their small towers, which
mlx-vlm loads only with the constants that are set here; in this project's environment, this exports one:

    from fastvlm_mlx.convert import convert_checkpoint
    from fastvlm_mlx.convert.export.mlx_vlm import export_mlx_vlm

    convert_checkpoint("tests/golden/apple/reparam", "build/apple", dtype="float32")
    export_mlx_vlm("build/apple", "build/export")

The last line on stdout is JSON; the exit code is 3 if the logits differ by more than 1e-4 of the largest.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_vlm.models.fastvlm import config as architecture
from mlx_vlm.utils import load_model, load_processor

TOLERANCE = 1e-4
IMAGE_TOKEN = -200
CHECK_FAILED = 3


def main() -> int:
    """Compares the logits for every image of the golden folder; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("golden", type=Path)
    options = parser.parse_args()
    export, golden = options.export, options.golden
    vision: dict[str, Any] = json.loads((export / "config.json").read_text())["vision_config"]
    # mlx-vlm has these as class attributes that its config cannot set; released sizes are right by default.
    architecture.VisionConfig.layers = vision["layers"]
    architecture.VisionConfig.embed_dims = vision["embed_dims"]
    model = load_model(export)
    tokenizer = load_processor(export).tokenizer
    before, after = (golden / "prompt.txt").read_text().split("<image>")
    ids = [*tokenizer.encode(before), IMAGE_TOKEN, *tokenizer.encode(after)]
    expected: Any = mx.load(str(golden / "expected.safetensors"))
    errors = {}
    for name in (key.removesuffix(".pixel_values") for key in expected if key.endswith(".pixel_values")):
        embedded = model.get_input_embeddings(mx.array([ids]), expected[f"{name}.pixel_values"][None]).inputs_embeds
        logits = np.array(model.language_model(None, inputs_embeds=embedded).logits[0, -1])
        expected_logits = np.array(expected[f"{name}.logits"])
        errors[name] = float(np.abs(logits - expected_logits).max() / np.abs(expected_logits).max())
    versions = {name: version(name) for name in ("mlx-vlm", "mlx")}
    print(json.dumps({"relative_errors": errors, "tolerance": TOLERANCE, "versions": versions}))
    return CHECK_FAILED if max(errors.values()) > TOLERANCE else 0


if __name__ == "__main__":
    sys.exit(main())
