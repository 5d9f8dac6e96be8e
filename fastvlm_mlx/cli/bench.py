"""`fastvlm bench`: measures the time to first token, computes the cost of a model, compares two reports."""

import shutil
from collections.abc import Iterable, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from fastvlm_mlx.cli.candidates import (
    AnswerLength,
    JsonReport,
    Models,
    RandomWeights,
    check_models,
    load_candidates,
    names,
)
from fastvlm_mlx.cli.compare import compare
from fastvlm_mlx.cli.options import (
    DEFAULT_PROMPT,
    LoadDType,
    Revision,
    choices,
    is_for_subcommand,
    parse_resolution,
    refuse,
    user_path,
)
from fastvlm_mlx.cli.terminal import LiveLine, show, warn_of_slow_blas
from fastvlm_mlx.cli.throughput import throughput
from fastvlm_mlx.cli.usage import Command, CommandGroup, is_given
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import as_blocks, as_markdown

if TYPE_CHECKING:
    from fastvlm_mlx.bench.candidate import Candidate
    from fastvlm_mlx.inputs.resolution import Resolution

_UNUSED_BY_COST = {
    "--image": "image",
    "--megapixels": "megapixels",
    "--format": "formats",
    "--prompt": "prompt",
    "--runs": "runs",
    "--warmup": "warmup",
    "--max-tokens": "max_tokens",
    "--dtype": "dtype",
    "--cold": "cold",
}
"""The options that only a measurement needs, and their parameters."""

_STDOUT = Path("-")
"""The file that stands for stdout."""


class Format(str, Enum):
    """Formats of images."""

    jpeg = "jpeg"
    heic = "heic"
    webp = "webp"


app = typer.Typer(cls=CommandGroup, invoke_without_command=True, rich_markup_mode=None)
app.command(cls=Command, short_help="Compare two reports.")(compare)
app.command(cls=Command, short_help="Measure many questions at once.")(throughput)


@app.callback()
def bench(
    context: typer.Context,
    models: Models = None,
    revision: Revision = None,
    random_weights: RandomWeights = None,
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=user_path,
            help="Instead of synthetic images: copies of this one, each with a small square of its own colour.",
        ),
    ] = None,
    megapixels: Annotated[
        list[float] | None,
        typer.Option(
            metavar="N",
            min=0.01,
            max=200,
            help="Size of the synthetic images, such as 12 for a phone's; repeatable. [default: 1.2]",
        ),
    ] = None,
    formats: Annotated[
        list[Format] | None,
        typer.Option(
            "--format",
            metavar=choices(Format),
            help="Format of the synthetic images; repeatable. HEIC is written by pillow-heif. [default: jpeg]",
        ),
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="The question.")] = DEFAULT_PROMPT,
    resolutions: Annotated[
        list[Any] | None,
        typer.Option(
            "--resolution",
            "-r",
            parser=parse_resolution,
            metavar="N|auto",
            envvar="FASTVLM_RESOLUTION",
            help="Pixels per side, or auto; repeatable. [default: the model's own]",
        ),
    ] = None,
    runs: Annotated[int, typer.Option(metavar="N", min=1, help="Measured runs.")] = 10,
    warmup: Annotated[int, typer.Option(metavar="N", min=0, help="Runs before the measured ones.")] = 3,
    max_tokens: AnswerLength = 32,
    dtype: LoadDType = None,
    cold: Annotated[bool, typer.Option("--cold", help="Also measure the cold TTFT; needs a model on disk.")] = False,
    cost: Annotated[
        bool,
        typer.Option(
            "--cost",
            help="Measure nothing: FLOPs, bytes and kernels by part, and the least time on M-series chips, at 256, 512 "
            "and 1024 px unless --resolution is given.",
        ),
    ] = False,
    json_file: JsonReport = None,
    csv_file: Annotated[
        Path | None,
        typer.Option(
            "--csv", metavar="FILE", parser=user_path, help="Write one line for each sample; - as for --json."
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=user_path, help="Draw the phases: .svg, .png or .pdf; needs matplotlib."),
    ] = None,
) -> None:
    """Measure the time to first token.

    Wall TTFT: encoded image bytes and a prompt -> the first token id on the host, model loaded. Measured on the
    function that `fastvlm generate` runs, in a process that has answered before.

    Cold TTFT: start of a `fastvlm generate` process -> the first character it writes. Files are in the system's cache.

    Paper TTFT: pixel values -> logits after the visual tokens alone (arXiv 2412.13303): vision tower, projector and
    prefill of the visual tokens, without image decoding and text.

    Phases: load, decode (bytes -> image), preprocess (-> pixel values, token ids), vision, projector, prefill (all
    positions), first token (logits -> token id on the host). Each ends with an evaluation, so they sum to more than
    the wall TTFT.

    tokens/s counts the tokens after the first. Every run shows a new image. The table holds medians in ms; --json keeps
    every sample and the conditions.
    """
    if is_for_subcommand(context):
        return
    check_models(models, revision, random_weights)
    if random_weights and cold:
        raise typer.BadParameter("a cold start needs a model on disk, not random weights", param_hint="--cold")
    files = {option: path for option, path in (("--json", json_file), ("--csv", csv_file), ("--plot", plot)) if path}
    for option in files:
        if cost:
            raise typer.BadParameter("--cost prints its tables and writes no file", param_hint=option)
    if len({path.absolute() for path in files.values()}) < len(files):
        raise typer.BadParameter("each report needs a file of its own", param_hint=" / ".join(files))
    if cost:
        unused = [option for option, name in _UNUSED_BY_COST.items() if is_given(context, name)]
        refuse(unused, "with --cost, which measures nothing")
    if cost and is_given(context, "resolutions") and any(isinstance(side, str) for side in resolutions or ()):
        raise typer.BadParameter("--cost needs pixels, not auto", param_hint="--resolution")
    if image:
        refuse({"--megapixels": megapixels, "--format": formats}, "with --image")
    if plot:
        from fastvlm_mlx.bench.plot import SUFFIXES

        if plot.suffix not in SUFFIXES:
            raise typer.BadParameter(f"ends in none of {', '.join(SUFFIXES)}", param_hint="--plot")
    if cost:
        sides = [side for side in resolutions or () if not isinstance(side, str)] or [256, 512, 1024]
        _print_costs([size.value for size in random_weights or ()], names(models), revision, sides, markdown)
        return

    outputs = Outputs(json_file, csv_file, plot, markdown)
    _measure(
        load_candidates(models, revision, random_weights, dtype.value if dtype else None),
        image,
        megapixels or [],
        formats or [],
        prompt,
        resolutions or [None],
        outputs,
        cold=cold,
        runs=runs,
        warmup=warmup,
        max_tokens=max_tokens,
    )


def _print_costs(
    sizes: list[str], models: list[str], revision: str | None, resolutions: list[int], markdown: bool
) -> None:
    from fastvlm_mlx.bench.costs import chips, cost_table, costs, roofline_table
    from fastvlm_mlx.checkpoint.released import full_size
    from fastvlm_mlx.cli.info import from_headers

    formatted = partial(as_markdown, left=2) if markdown else partial(as_blocks, left=2, width=_width())
    peaks, sources = chips()
    for name in sizes or models:
        if sizes:
            parts = costs(full_size(name), resolutions)
        else:
            config, tensors, _ = from_headers(name, revision)
            parts = costs(config, resolutions, tensors)
        show(f"{name}\n\n{formatted(cost_table(parts))}\n\n{formatted(roofline_table(parts, peaks))}\n")
    show(
        "Lower bounds from published peaks, not measurements: each kernel takes as long as its arithmetic or its "
        f"memory traffic does at these peaks, whichever is longer, and launching it takes no time. {sources}"
    )


class Outputs(NamedTuple):
    """Where a report goes."""

    json: Path | None
    csv: Path | None
    plot: Path | None
    markdown: bool

    @property
    def files(self) -> list[Path]:
        """The files to write."""
        return [path for path in (self.json, self.csv, self.plot) if path and path != _STDOUT]

    @property
    def stdout_taken(self) -> bool:
        """Whether a report goes to stdout, in the place of the table."""
        return _STDOUT in (self.json, self.csv)


def _measure(
    candidates: "Iterable[Candidate]",
    image: Path | None,
    megapixels: Sequence[float],
    formats: Sequence[Format],
    prompt: str,
    resolutions: "Sequence[Resolution]",
    outputs: Outputs,
    *,
    cold: bool,
    runs: int,
    warmup: int,
    max_tokens: int,
) -> None:
    import json

    from fastvlm_mlx.bench.conditions import conditions
    from fastvlm_mlx.bench.images import HEIF, MEGAPIXELS, Images
    from fastvlm_mlx.bench.measure import measure
    from fastvlm_mlx.bench.plot import check_plot, plot
    from fastvlm_mlx.bench.report import Report, Settings
    from fastvlm_mlx.bench.tables import as_csv, table, text
    from fastvlm_mlx.outputs import check_output, write_output

    if outputs.plot:
        check_plot(outputs.plot)
    for path in outputs.files:
        check_output(path)
    given = Images(image.read_bytes() if image else None, str(image))
    shown = [given]
    if megapixels or formats:
        shown = [
            Images(megapixels=size, form={Format.heic: HEIF}.get(form, form.value.upper()))
            for size in dict.fromkeys(megapixels or [MEGAPIXELS])
            for form in dict.fromkeys(formats or [Format.jpeg])
        ]
    warn_of_slow_blas()
    before = conditions()
    with LiveLine() as line:
        rows = [
            measure(
                candidate,
                images=images,
                prompt=prompt,
                resolution=resolution,
                runs=runs,
                warmup=warmup,
                max_tokens=max_tokens,
                cold=cold,
                progress=partial(_show_run, line, candidate.name, resolution),
            )
            for candidate in candidates
            for resolution in resolutions
            for images in shown
        ]
    settings = Settings(prompt=prompt, image_sha256=given.sha256, runs=runs, warmup=warmup, max_tokens=max_tokens)
    report = Report(conditions=before, settings=settings, rows=tuple(rows))
    medians = as_markdown(table(report), left=2) if outputs.markdown else text(report, _width())
    show(medians, err=outputs.stdout_taken)
    contents = {outputs.json: json.dumps(report.to_dict(), indent=1) + "\n", outputs.csv: as_csv(report)}
    failures = []
    for file in filter(None, (outputs.json, outputs.csv, outputs.plot)):
        try:
            if file == _STDOUT:
                typer.echo(contents[file], nl=False)
            elif file == outputs.plot:
                plot(report, file)
            else:
                write_output(file, contents[file].encode())
        except ConfigError as err:  # what can be written is not lost with what cannot
            failures.append(str(err))
    if failures:
        raise ConfigError("; ".join(failures))


def _width() -> int:
    """The width for tables: the terminal's, else 80 columns."""
    return shutil.get_terminal_size((80, 24)).columns


def _show_run(line: LiveLine, name: str, resolution: "Resolution", done: int, total: int) -> None:
    size = "native resolution" if resolution is None else f"{resolution} px"
    line.show(f"{name}, {size}: run {done + 1} of {total}")
