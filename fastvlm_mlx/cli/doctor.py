"""`fastvlm doctor`: proves that this machine computes what it should, or names what is off."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from fastvlm_mlx.cli.candidates import Size
from fastvlm_mlx.cli.options import CHECK_FAILED, MODEL_HELP, choices, complete_model
from fastvlm_mlx.cli.terminal import ByteProgress, LiveLine, complain, note, show, show_json

if TYPE_CHECKING:
    from fastvlm_mlx.doctor.checks import Examination
    from fastvlm_mlx.doctor.subject import Subject


def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} [default: demo]", autocompletion=complete_model)
    ] = None,
    random_weights: Annotated[
        Size | None,
        typer.Option(
            metavar=choices(Size), help="Instead of a model: the full architecture of this size, random, no download."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, to paste into a bug report.")] = False,
) -> None:
    """Check this machine: environment, right answers, GPU against CPU, speed.

    Compares every part of the model on the GPU with the CPU's float32, in float32 and float16, eager and compiled,
    batched and single, quantized and not. Without a GPU, the CPU runs the GPU's modules, too. Names no paths and no
    people. Exit code 3: something is off. What was found before an interruption is printed.
    """
    if model is not None and random_weights is not None:
        raise typer.BadParameter("give a model or random weights, not both", param_hint="--random-weights")
    if as_json and markdown:
        raise typer.BadParameter("give --json or --markdown, not both", param_hint="--markdown")
    # By default NVIDIA GPUs and new Macs round the factors of float32 products, which would hide small faults.
    os.environ.setdefault("MLX_ENABLE_TF32", "0")

    from fastvlm_mlx.doctor.checks import Examination
    from fastvlm_mlx.doctor.steps import examination_steps

    demo = _subject("demo")
    subject = _random(random_weights.value) if random_weights else demo if model in (None, "demo") else _subject(model)
    examination = Examination()
    try:
        with LiveLine() as line:
            examination.run(examination_steps(subject, demo), line.show)
    finally:
        _show(examination, subject.label, as_json=as_json, markdown=markdown)
    if examination.wrong:
        complain(f"something is off: {len(examination.wrong)} checks failed")
        raise typer.Exit(CHECK_FAILED)


def _subject(name: str) -> "Subject":
    from fastvlm_mlx.bench.candidate import Candidate
    from fastvlm_mlx.checkpoint.released import parse_name
    from fastvlm_mlx.doctor.subject import Subject

    def load() -> Candidate:
        with ByteProgress() as progress:
            return Candidate.load(name, notify=note, progress=progress)

    location = parse_name(name)
    on_disk = location.path is not None and not location.bundled
    return Subject(load, "a model on disk" if on_disk else name)


def _random(size: str) -> "Subject":
    from fastvlm_mlx.bench.candidate import Candidate
    from fastvlm_mlx.doctor.subject import Subject

    return Subject(lambda: Candidate.random(size), f"{size}, random")


def _show(examination: "Examination", label: str, *, as_json: bool, markdown: bool) -> None:
    from fastvlm_mlx.doctor.report import Findings, as_lines

    findings = Findings.of(examination, label)
    if as_json:
        show_json(findings.to_dict())
    else:
        show("\n".join(as_lines(findings, markdown=markdown)))
