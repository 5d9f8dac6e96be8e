"""`fastvlm eval`: scores a model on a question file, by kind, alone or beside another model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm_mlx.cli.options import CHECK_FAILED, MODEL_HELP, DType, Model, parse_resolution
from fastvlm_mlx.cli.terminal import ByteProgress, LiveLine, note
from fastvlm_mlx.formatting import as_text

if TYPE_CHECKING:
    from fastvlm_mlx.inputs.images import Resolution
    from fastvlm_mlx.jobs.questions import BadRow, Question
    from fastvlm_mlx.jobs.scores import EvaluationReport


def evaluate(
    model: Model,
    data: Annotated[Path, typer.Option(help="JSON Lines with image, question, answers and, optionally, kind.")],
    baseline: Annotated[str | None, typer.Option(help=f"Another model to compare with. {MODEL_HELP}")] = None,
    metric: Annotated[str, typer.Option(help="exact, vqa, relaxed or anls.")] = "exact",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask a sample of this many rows, each kind in proportion.")
    ] = None,
    resolution: Annotated[
        Any, typer.Option("--resolution", "-r", parser=parse_resolution, metavar="INT|auto", help="Pixels a side.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Longest answer, in tokens.")] = 64,
    dtype: Annotated[DType | None, typer.Option(help="Load the weights as this type.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Score a model's answers to the questions in a file.

    Answers are stored in the cache folder as they come, so an interrupted run continues where it stopped. A row that
    cannot be asked counts as failed and makes the exit code 3.
    """
    from fastvlm_mlx.jobs.metrics import METRICS
    from fastvlm_mlx.jobs.questions import read_questions

    if metric not in METRICS:
        raise typer.BadParameter(f"{metric!r} is not one of {', '.join(METRICS)}", param_hint="--metric")
    questions = read_questions(data)

    def score(name: str) -> "EvaluationReport":
        return _score(name, data, questions, metric, limit, resolution, max_tokens, dtype)

    report = score(model)
    against = report.against(score(baseline)) if baseline else None
    for answer in report.failed:
        note(f"{data}:{answer.line}: {answer.error}")
    if as_json:
        from dataclasses import asdict

        record = {"model": model, "data": str(data), **report.to_dict()}
        if against:
            record["baseline"] = {"model": baseline, **asdict(against)}
        typer.echo(json.dumps(record, ensure_ascii=False))
    else:
        typer.echo(as_text([("kind", "questions", f"{metric} %", "95 % interval"), *report.table()]))
        if against:
            typer.echo(
                f"\nagrees with {baseline} on {100 * against.agreement.score:.1f} %; difference "
                f"{100 * against.difference:+.1f} points ({100 * against.low:+.1f} to {100 * against.high:+.1f}), "
                f"{against.won} won, {against.lost} lost"
            )
    if report.failed:
        note(f"{len(report.failed)} of {len(report.answers)} rows failed")
        raise typer.Exit(CHECK_FAILED)


def _score(
    name: str,
    data: Path,
    questions: "list[Question | BadRow]",
    metric: str,
    limit: int | None,
    resolution: "Resolution",
    max_tokens: int,
    dtype: DType | None,
) -> "EvaluationReport":
    from fastvlm_mlx import load
    from fastvlm_mlx.jobs.evaluate import EvaluationSettings, evaluate
    from fastvlm_mlx.jobs.journal import Predictions
    from fastvlm_mlx.resolve import cache_folder

    with ByteProgress() as progress:
        network, processor = load(name, dtype=dtype.value if dtype else None, notify=note, progress=progress)
    settings = EvaluationSettings.of(network, data, resolution=resolution, max_tokens=max_tokens)
    journal = cache_folder() / "eval" / settings.file_name(name)
    with LiveLine() as line, Predictions(journal, settings.to_dict()) as predictions:
        return evaluate(
            network,
            processor,
            questions,
            metric=metric,
            limit=limit,
            resolution=resolution,
            max_tokens=max_tokens,
            predictions=predictions,
            progress=lambda done, total: line.show(f"{name}: {done} of {total} questions"),
        )
