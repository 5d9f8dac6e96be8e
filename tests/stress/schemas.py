"""Random schemas, prompts, pictures and settings, many at once: every answer is JSON of its schema, or says it was cut.

python -m tests.stress.schemas --number 200 --seed 0
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

import fastvlm_mlx
from fastvlm_mlx import Engine, FastVLM, FastVLMProcessor, GenerationConfig, Request, load
from tests.structured.random_schemas import random_schema

PICTURES = sorted((Path(fastvlm_mlx.__file__).parent / "demo_model").glob("sample-*.png"))
PROMPTS = ("What is in the picture?", "What does the text say?", "How many shapes are there?", "Answer in JSON.")
MAX_TOKENS = 400


def requests(number: int, seed: int) -> Iterator[tuple[Request, dict[str, Any]]]:
    """Requests with the schemas that their answers have to follow."""
    for place in range(number):
        rng = np.random.default_rng([seed, place])
        schema = random_schema(rng)
        config = GenerationConfig(
            max_tokens=MAX_TOKENS, temperature=float(rng.choice([0.0, 0.7, 1.0, 1.5])), seed=place
        )
        picture = PICTURES[place % len(PICTURES)] if rng.random() < 0.8 else None
        yield Request(image=picture, prompt=str(rng.choice(PROMPTS)), config=config, schema=schema), schema


def check(model: FastVLM, processor: FastVLMProcessor, asked: Iterable[tuple[Request, dict[str, Any]]]) -> Counter[str]:
    """Asks everything together; counts the answers that are whole, those that were cut, and all tokens.

    Raises:
        ValueError: If an answer is neither JSON of its schema nor cut.
    """
    pairs, counts = list(asked), Counter[str]()
    with Engine(model, processor, max_batch=8) as engine:
        for handle, (_, schema) in zip(engine.map(request for request, _ in pairs), pairs, strict=True):
            result = handle.result()
            counts["tokens"] += result.generated_tokens
            if result.finish_reason == "length":
                counts["cut"] += 1
                continue
            try:
                jsonschema.Draft202012Validator(schema).validate(json.loads(result.text))
            except (ValueError, jsonschema.ValidationError) as err:
                raise ValueError(f"{result.text[:500]!r} is not JSON of {json.dumps(schema)}: {err}") from err
            counts["whole"] += 1
    return counts


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    counts = check(*load("demo"), requests(options.number, options.seed))
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({**vars(options), **counts, "seconds": seconds}))  # noqa: T201


if __name__ == "__main__":
    main()
