"""`fastvlm verify`: checks that a checkpoint computes what another one does, and names the first part that does not."""

from typing import Annotated

import typer

from fastvlm_mlx.cli.options import CHECK_FAILED, MODEL_HELP
from fastvlm_mlx.cli.terminal import LiveLine, complain, show, show_json
from fastvlm_mlx.formatting import as_text

HEADER = ("segment", "output error", "allowed", "weight error", "allowed")


def verify(
    converted: Annotated[str, typer.Argument(metavar="CHECKPOINT", help=f"The checkpoint to check. {MODEL_HELP}")],
    against: Annotated[str, typer.Option(metavar="SOURCE", help=f"The reference. {MODEL_HELP}")],
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            min=0.0,
            help="Relative error allowed for weights, and twice that for outputs; by default by each segment's bits.",
        ),
    ] = None,
    gates: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            metavar="CONDITION",
            help="What the answers have to meet, such as 'top1>=0.95'; may be repeated. It can name visual_cosine, kl, "
            "top1, top5, greedy, weight_error. [default: top1>=0.9 and visual_cosine>=0.99; with layers of less than "
            "8 bits top1>=0.5 and visual_cosine>=0.9]",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare a checkpoint with its source, segment by segment and by their answers.

    What is not converted yet is converted in float32, an export for mlx-vlm too. Every segment runs on the reference's
    input, so that its error is its own. Exit code 3: a part is further off than rounding explains, the first one is
    named; or the answers do not meet a condition.
    """
    from fastvlm_mlx.convert import verify as run

    with LiveLine() as line:
        result = run(converted, against, allowed=tolerance, gates=gates or (), notify=line.show)
    if as_json:
        show_json(result.to_dict())
    else:
        errors = ", ".join(f"{part} {error:.2%}" for part, error in result.weight_errors.items())
        show(as_text([HEADER, *result.rows()]))
        show("\n".join(["", f"weights off by: {errors}", *result.agreement.lines()]))
        for gate in result.gates:
            show(gate.sentence(result))
        if result.holds:
            show("the same within rounding: no segment is off by more than allowed, and all gates are met")
    if first := result.first_drift:
        complain(
            f"{first.culprit} is the first part that drifts: its segment's output is off by "
            f"{first.output_error:.2g} ({first.output_allowed:.2g} allowed), its weights by {first.weight_error:.2g} "
            f"({first.allowed:.2g} allowed)"
        )
    if result.unmet:
        complain(f"the answers differ too much: {'; '.join(gate.sentence(result) for gate in result.unmet)}")
    if not result.holds:
        raise typer.Exit(CHECK_FAILED)
