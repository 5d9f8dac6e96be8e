"""`fastvlm eval`: scores a model on a question file, by kind, alone or beside another model."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm_mlx.cli.options import (
    CHECK_FAILED,
    MODEL_HELP,
    Detail,
    DType,
    LoadDType,
    Model,
    Resolution,
    Revision,
    choices,
    complete_model,
    user_path,
    with_detail,
)
from fastvlm_mlx.cli.terminal import ByteProgress, LiveLine, note, show, show_json, warn_of_slow_blas
from fastvlm_mlx.formatting import as_text, names, printable

if TYPE_CHECKING:
    from fastvlm_mlx.inputs.resolution import Resolution as Pixels
    from fastvlm_mlx.jobs.questions import BadRow, Question
    from fastvlm_mlx.jobs.scores import EvaluationReport


class Metric(str, Enum):
    """The metrics of `fastvlm_mlx.jobs.metrics.METRICS`."""

    exact = "exact"
    vqa = "vqa"
    relaxed = "relaxed"
    anls = "anls"


def evaluate(
    model: Model,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE", parser=user_path, help="JSON Lines with image, question, answers and, optionally, kind."
        ),
    ],
    revision: Revision = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help=f"Another model to compare with. {MODEL_HELP}", autocompletion=complete_model
        ),
    ] = None,
    metric: Annotated[Metric, typer.Option(metavar=choices(Metric), help="How answers are scored.")] = Metric.exact,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Ask a sample of this many rows, each kind in proportion.")
    ] = None,
    resolution: Resolution = None,
    detail: Detail = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", metavar="N", min=1, help="Longest answer, in tokens.")
    ] = 64,
    dtype: LoadDType = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ask again what earlier runs have answered.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", parser=user_path, help="Write question, answer and score of each row as JSON Lines."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Score a model's answers to the questions in a file.

    Answers are kept in the cache folder as they come, so an interrupted run continues where it stopped. They are found
    again by what they depend on: the content of the model's files and of the image, the question, the settings and the
    versions of the programs. A row that cannot be asked counts as failed and makes the exit code 3.
    """
    from fastvlm_mlx.jobs.questions import check_images, read_questions
    from fastvlm_mlx.outputs import check_output, json_line, write_output
    from fastvlm_mlx.resolve import check_names

    if output:
        if output.exists() and data.exists() and output.samefile(data):
            raise typer.BadParameter("is the file of questions; name another", param_hint="--output")
        check_output(output)
    questions = read_questions(data)
    check_images(data, questions)
    check_names([(model, revision), *([(baseline, None)] if baseline else [])])
    settings = _Settings(metric.value, limit, with_detail(resolution, detail), max_tokens, dtype, fresh)
    warn_of_slow_blas()
    folder = _resolve(model, revision)
    baseline_folder = _resolve(baseline, None) if baseline else None  # before the first question to the other
    report = _score(model, folder, questions, settings)
    other = _score(baseline, baseline_folder, questions, settings) if baseline and baseline_folder else None
    if output:
        records = list(report.records(questions))
        for record, answer in zip(records, other.answers if other else (), strict=False):
            record |= {"baseline_prediction": answer.prediction, "baseline_score": answer.score}
        write_output(output, b"".join(map(json_line, records)))
    _note_failures(printable(data), report)
    if as_json:
        show_json(_record(model, data, report, baseline, other))
    else:
        show(_table(metric.value, report, baseline, other))
    if report.failed:
        note(f"{len(report.failed)} of {len(report.answers)} rows failed")
        raise typer.Exit(CHECK_FAILED)


@dataclass(frozen=True)
class _Settings:
    """The options that are the same for both models."""

    metric: str
    limit: int | None
    resolution: "Pixels"
    max_tokens: int
    dtype: DType | None
    fresh: bool


def _resolve(name: str, revision: str | None) -> Path:
    from fastvlm_mlx.resolve import resolve

    with ByteProgress() as progress:
        return resolve(name, revision=revision, notify=note, progress=progress)


def _score(name: str, folder: Path, questions: "list[Question | BadRow]", settings: _Settings) -> "EvaluationReport":
    from fastvlm_mlx.errors import CheckpointError
    from fastvlm_mlx.jobs.evaluate import evaluate, prediction_settings
    from fastvlm_mlx.jobs.fingerprints import checkpoint_files, checkpoint_fingerprint, versions
    from fastvlm_mlx.jobs.predictions import Predictions
    from fastvlm_mlx.machine import cache_folder
    from fastvlm_mlx.resolve import load

    with LiveLine() as line, ByteProgress() as progress:
        line.wait_for(f"loading {name}")
        files = checkpoint_files(folder)
        before = versions(files)
        network, processor = load(folder, dtype=settings.dtype.value if settings.dtype else None)
        checkpoint = checkpoint_fingerprint(folder, cache_folder() / "digests.json", progress)
    if versions(files) != before:
        raise CheckpointError(f"{printable(folder)}: changed while it was loaded; run the command again")
    depends = prediction_settings(network, checkpoint, resolution=settings.resolution, max_tokens=settings.max_tokens)
    with LiveLine() as line, Predictions(cache_folder() / "eval", depends, fresh=settings.fresh, notify=note) as known:
        report = evaluate(
            network,
            processor,
            questions,
            metric=settings.metric,
            limit=settings.limit,
            resolution=settings.resolution,
            max_tokens=settings.max_tokens,
            predictions=known,
            progress=lambda done, total: line.show(f"{name}: {done} of {total} questions"),
        )
    if report.kept:
        note(f"{name}: {report.kept} of {len(report.answers)} answers are from an earlier run; --fresh asks again")
    return report


def _note_failures(data: str, report: "EvaluationReport") -> None:
    """Names the rows that failed, those with the same error together."""
    lines: dict[str, list[str]] = {}
    for answer in report.failed:
        lines.setdefault(str(answer.error), []).append(str(answer.line))
    for error, numbers in lines.items():
        note(f"{data}:{numbers[0]}: {error}" if len(numbers) == 1 else f"{data}: lines {names(numbers)}: {error}")


def _record(
    model: str, data: Path, report: "EvaluationReport", baseline: str | None, other: "EvaluationReport | None"
) -> dict[str, Any]:
    from dataclasses import asdict

    record = {"model": model, "data": str(data), **report.to_dict()}
    if other:
        record["baseline"] = {"model": baseline, **asdict(report.against(other)), **other.to_dict()}
    return record


def _table(metric: str, report: "EvaluationReport", baseline: str | None, other: "EvaluationReport | None") -> str:
    header, rows = ("kind", "questions", f"{metric} %", "95 % interval"), report.table()
    if not other:
        return as_text([header, *rows])
    beside = [(*mine, *theirs[2:]) for mine, theirs in zip(rows, other.table(), strict=True)]
    against = report.against(other)
    return (
        as_text([(*header, "baseline %", "95 % interval"), *beside])
        + f"\n\nagrees with {baseline} on {100 * against.agreement.score:.1f} %; difference "
        f"{100 * against.difference:+.1f} points ({100 * against.low:+.1f} to {100 * against.high:+.1f}), "
        f"{against.won} won, {against.lost} lost"
    )
