"""The models that `fastvlm bench` measures, by their options."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastvlm_mlx.cli.options import DEFAULT_MODEL, MODEL_HELP, choices, complete_model, refuse, user_path
from fastvlm_mlx.cli.terminal import ByteProgress, LiveLine, note

if TYPE_CHECKING:
    from fastvlm_mlx.bench.candidate import Candidate


class Size(str, Enum):
    """The released models."""

    small = "0.5b"
    medium = "1.5b"
    large = "7b"


Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help=f"{MODEL_HELP} Repeatable. [env var: FASTVLM_MODEL] [default: {DEFAULT_MODEL}]",
        autocompletion=complete_model,
    ),
]
AnswerLength = Annotated[int, typer.Option("--max-tokens", "-n", metavar="N", min=1, help="Length of each answer.")]
JsonReport = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        parser=user_path,
        help="Write the report, every sample in it; - writes it to stdout, and the table to stderr.",
    ),
]
RandomWeights = Annotated[
    list[Size] | None,
    typer.Option(
        metavar=choices(Size),
        help="Instead of a model: the full architecture of this size, random, no download. Repeatable.",
    ),
]


def check_models(models: Sequence[str] | None, revision: str | None, random_weights: Sequence[Size] | None) -> None:
    """Checks that these options go together.

    Raises:
        BadParameter: If they do not.
    """
    if random_weights and models:
        raise typer.BadParameter("give models or random weights, not both", param_hint="--random-weights")
    if random_weights:
        refuse({"--revision": revision}, "with random weights")


def names(models: Sequence[str] | None) -> list[str]:
    """The names of the models; by default the user's usual one."""
    return list(models or [os.environ.get("FASTVLM_MODEL") or DEFAULT_MODEL])


def load_candidates(
    models: Sequence[str] | None, revision: str | None, random_weights: Sequence[Size] | None, dtype: str | None
) -> Iterator["Candidate"]:
    """The models one after the other, each under a name of its own."""
    from fastvlm_mlx.bench.candidate import Candidate

    if random_weights:
        return _distinct(Candidate.random(size.value, dtype=dtype) for size in random_weights)
    return _distinct(_load_each(names(models), revision, dtype))


def _load_each(models: Sequence[str], revision: str | None, dtype: str | None) -> Iterator["Candidate"]:
    """The models one after the other; a mistake in a name costs no download of another one."""
    from fastvlm_mlx.bench.candidate import Candidate
    from fastvlm_mlx.resolve import check_names

    check_names([(name, revision) for name in models])
    for name in models:
        with LiveLine() as line, ByteProgress() as progress:
            line.wait_for(f"loading {name}")
            candidate = Candidate.load(name, dtype=dtype, revision=revision, notify=note, progress=progress)
        yield candidate


def _distinct(candidates: "Iterable[Candidate]") -> "Iterator[Candidate]":
    """Yields the candidates; of several with one name, the later ones with a number, to tell their rows apart."""
    seen: Counter[str] = Counter()
    for candidate in candidates:
        seen[candidate.name] += 1
        number = seen[candidate.name]
        yield candidate if number == 1 else replace(candidate, name=f"{candidate.name} ({number})")
