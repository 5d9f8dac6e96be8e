"""`fastvlm verify`: checks that a checkpoint computes what another one does, and names the first part that does not."""

from pathlib import Path
from typing import Annotated

import typer

from fastvlm_mlx.cli.options import CHECK_FAILED, MODEL_HELP, user_path
from fastvlm_mlx.cli.terminal import LiveLine, complain, show, show_json
from fastvlm_mlx.formatting import as_text

HEADER = ("segment", "output error", "weight error", "allowed")


def verify(
    converted: Annotated[Path, typer.Argument(metavar="CONVERTED", parser=user_path, help="A converted folder.")],
    against: Annotated[str, typer.Option(metavar="SOURCE", help=f"The reference. {MODEL_HELP}")],
    tolerance: Annotated[
        float | None,
        typer.Option(metavar="N", min=0.0, help="Relative error allowed; by default by the bits of each segment."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare a checkpoint with its source, segment by segment.

    A source that is not converted yet is converted in float32. Every segment runs on the reference's input, so that
    its error is its own. Exit code 3: a part is further off than rounding explains; the first one is named.
    """
    from fastvlm_mlx.convert import verify as run

    with LiveLine() as line:
        result = run(converted, against, allowed=tolerance, notify=line.show)
    if as_json:
        show_json(result.to_dict())
    else:
        agreement = result.agreement
        show(as_text([HEADER, *result.rows()]))
        errors = ", ".join(f"{part} {error:.2%}" for part, error in result.weight_errors.items())
        show(f"\nweights off by: {errors}")
        show(
            f"next tokens, {agreement.positions} positions: the same most likely {agreement.top1:.1%}, KL divergence "
            f"{agreement.kl:.2g} nats; visual tokens' cosine {agreement.visual_cosine:.4f}"
        )
    if first := result.first_drift:
        complain(
            f"{first.culprit} is the first part that drifts: its segment's output is off by "
            f"{first.output_error:.2g}, its weights by {first.weight_error:.2g}, and {first.allowed:.2g} is allowed"
        )
        raise typer.Exit(CHECK_FAILED)
