"""One of several processes that share a decoder: computes logits with each model that it is told, and saves them.

python tests/model/ranks.py OUT [whole] FOLDER…
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from fastvlm_mlx.backend import mx
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.cli.ranks import meet
from fastvlm_mlx.streams import turn

PROMPT = list(range(3, 40))


def peak() -> int:
    """Bytes that this process has held at most, without files that the system keeps."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    return 0


def main(out: Path, folders: list[str]) -> None:
    group = None
    if folders[0] == "whole":
        folders = folders[1:]
    else:
        group = meet()
    results: dict[str, object] = {}
    for number, folder in enumerate(folders):
        model = load_model(Path(folder), dtype="float32", group=group)
        with turn():
            logits, cache = model.prefill(PROMPT)
            after = model.language_model(mx.argmax(logits, axis=-1)[:, None], cache)[:, -1]
            mx.eval(after)
        results |= {f"{number}-prompt": np.array(logits), f"{number}-after": np.array(after)}
        from mlx.utils import tree_flatten

        results[f"{number}-bytes"] = sum(value.nbytes for _, value in tree_flatten(model.language_model.parameters()))
    rank = 0 if group is None else group.rank()
    with tempfile.NamedTemporaryFile(dir=out, suffix=".npz", delete=False) as file:
        np.savez(file, peak=peak(), **results)
    Path(file.name).rename(out / f"{rank}.npz")
    if group is not None:
        mx.eval(mx.distributed.all_sum(mx.array(1), group=group))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
