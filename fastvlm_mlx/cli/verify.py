"""`fastvlm verify`: whether a checkpoint computes what another one does, and where it first does not."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fastvlm_mlx.cli.options import MODEL_HELP
from fastvlm_mlx.cli.terminal import LiveLine, note
from fastvlm_mlx.formatting import as_text

HEADER = ("stage", "output error", "weight error", "allowed")


def verify(
    converted: Annotated[Path, typer.Argument(metavar="CONVERTED", help="A converted folder.")],
    against: Annotated[str, typer.Option(metavar="SOURCE", help=f"The reference. {MODEL_HELP}")],
    tolerance: Annotated[
        float | None, typer.Option(min=0.0, help="Relative error allowed; by default by the bits of each stage.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare a checkpoint with what it was made from, stage by stage.

    A source that is not converted is converted afresh in float32. Every stage runs on the reference's input, so that
    its error is its own. Ends with exit code 1 and the first part that is further off than rounding explains.
    """
    from fastvlm_mlx.convert.compare.verify import verify as run

    with LiveLine() as line:
        result = run(converted, against, allowed=tolerance, notify=line.show)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        found = result.agreement
        typer.echo(as_text([HEADER, *result.rows()]))
        errors = ", ".join(f"{part} {error:.2%}" for part, error in result.weight_errors.items())
        typer.echo(f"\nweights off by: {errors}")
        typer.echo(
            f"next tokens, {found.positions} positions: the same likeliest {found.top1:.1%}, KL divergence "
            f"{found.kl:.2g} nats; visual tokens' cosine {found.visual_cosine:.4f}"
        )
    if first := result.first_drift:
        note(
            f"error: {first.culprit} is the first part that drifts: its stage's output is off by "
            f"{first.output_error:.2g}, its weights by {first.weight_error:.2g}, and {first.allowed:.2g} is allowed"
        )
        raise typer.Exit(1)
