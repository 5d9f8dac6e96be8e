"""`fastvlm caption`: asks the same about many pictures, and continues where an earlier run stopped."""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm_mlx.cli.captioning import NAMED, Run, run
from fastvlm_mlx.cli.clustering import Cluster
from fastvlm_mlx.cli.exporting import (
    Csv,
    Embed,
    Hf,
    Overwrite,
    Txt,
    WebDataset,
    Xmp,
    XmpName,
    chosen_exports,
    note_exports,
)
from fastvlm_mlx.cli.finding import find, part_choice, plan_line
from fastvlm_mlx.cli.holders import find_holder
from fastvlm_mlx.cli.inputs import read_schema
from fastvlm_mlx.cli.options import (
    CHECK_FAILED,
    DEFAULT_MODEL,
    DEFAULT_PROMPT,
    Background,
    Detail,
    Frames,
    LoadDType,
    Model,
    Resolution,
    Revision,
    Warm,
    parse_seconds,
    refuse,
    user_path,
    with_detail,
)
from fastvlm_mlx.cli.servers import connect, read_addresses
from fastvlm_mlx.cli.terminal import note
from fastvlm_mlx.cli.usage import is_given, usage_errors
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable

if TYPE_CHECKING:
    from fastvlm_mlx.jobs.exports import Exports
    from fastvlm_mlx.jobs.shards import Shard

_FIELD = re.compile(r"[A-Za-z_]\w{0,63}")
_RESERVED = frozenset("file text time page width height finish_reason error answers".split())
_NEEDS = {
    "output": ("retry_errors", "force"),
    "ray": ("ray_cores",),
    "server": ("api_key_file",),
}
"""Options that need another one."""
_REPLACES = {
    "prefix": (("keep_openings",), "no phrase is removed then"),
    "schema": (("prefix", "sentence", "max_words", "keep_openings"), "captions are JSON then"),
    "server": (("revision", "dtype"), "servers have loaded their model"),
}
"""Options that leave others nothing to do, and why."""


def caption(
    context: typer.Context,
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH", help="Pictures, folders, patterns such as '2024/**/*.jpg'; films, PDFs; - reads names."
        ),
    ] = None,
    filelist: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=user_path, help="Names of pictures, one on each line.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Only pictures whose name matches; may be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave out what matches; may be repeated.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="What to ask; name, directory, date, camera, gps, existing and tags in braces stand for what is known "
            f"of a picture. [default: {DEFAULT_PROMPT}]",
        ),
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=TEXT", help="A question whose answer goes into a field; may be repeated."),
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Begin each caption, but no --ask, with this; the model goes on.")
    ] = None,
    schema: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Make captions JSON of the JSON schema in a file; json is any JSON object."),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="Replaces the system prompt.")] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", metavar="N", min=1, help="Longest answer, in tokens.")
    ] = 128,
    sentence: Annotated[bool, typer.Option("--sentence", help="End each answer after its first sentence.")] = False,
    max_words: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="End each answer after N words; of Chinese and Japanese, characters."),
    ] = None,
    keep_openings: Annotated[
        bool, typer.Option("--keep-openings", help="Keep phrases such as “The image shows”.")
    ] = False,
    frames: Frames = None,
    every: Annotated[
        float | None,
        typer.Option(metavar="TIME", parser=parse_seconds, help="A frame of each film every so often: 2s, 500ms, 1m."),
    ] = None,
    pages: Annotated[
        str | None, typer.Option(metavar="PAGES", help="Pages of each PDF: 1, 1-3, or all. [default: all]")
    ] = None,
    resolution: Resolution = None,
    detail: Detail = None,
    background: Background = None,
    dtype: LoadDType = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Pictures at a time. [default: what suits the machine]")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", parser=user_path, help="Add the lines to a file, and resume it."
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Only part I of N of the pictures, by their names; the same everywhere. [default: mlx.launch's rank]",
        ),
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="URL,URL...", help="Have these `fastvlm serve` answer, instead of this machine."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=user_path, help="Has the key for --server; so may FASTVLM_API_KEY."),
    ] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Try pictures again that failed.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Ask again about pictures that have a line.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    json_progress: Annotated[
        bool, typer.Option("--json-progress", help="Say how far it is on stderr as JSON, a line a second.")
    ] = False,
    txt: Txt = False,
    xmp: Xmp = False,
    xmp_name: XmpName = None,
    embed: Embed = False,
    csv: Csv = None,
    hf: Hf = False,
    webdataset: WebDataset = None,
    overwrite: Overwrite = False,
    warm: Warm = True,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Have the machines of a Ray cluster answer: HOST:PORT of its head, auto for the one that this machine "
            "is part of, local for one of this machine alone.",
        ),
    ] = None,
    ray_cores: Annotated[
        int | None,
        typer.Option("--ray-cores", metavar="N", min=1, max=64, help="Cores of a worker on a CPU. [default: up to 4]"),
    ] = None,
) -> None:
    """Caption many pictures: a line of JSON for each, on stdout or in a file that a later run continues.

    The same command goes on where an earlier one stopped: what has a line in --output is not asked about again, unless
    the picture has changed. A picture that cannot be read gets a line with the error, and makes the exit code 3.

    Each frame of a film and each page of a PDF has a line of its own, called film.mp4#t=2.5 or paper.pdf#3. In folders,
    films are left out without --frames or --every, and PDFs without --pages.
    """
    from fastvlm_mlx import __version__
    from fastvlm_mlx.engine.options import GenerationConfig
    from fastvlm_mlx.jobs.caption import CaptionJob, Plan
    from fastvlm_mlx.jobs.exports import Exporter
    from fastvlm_mlx.jobs.journal import Journal
    from fastvlm_mlx.jobs.parts import PartReader
    from fastvlm_mlx.jobs.shards import Names
    from fastvlm_mlx.jobs.task import Task

    _check_combinations(context.params)
    prefix = _prefix(prefix, max_words)
    followed = None if schema is None else read_schema(schema)
    exports = chosen_exports(
        txt=txt, xmp=xmp, xmp_name=xmp_name, embed=embed, csv=csv, hf=hf, webdataset=webdataset, overwrite=overwrite
    )
    questions = field_questions(prompt, ask or [])
    if "text" not in questions:
        _refuse_without_caption(exports, prefix, schema)
    addresses = read_addresses(server or [])
    part = _shard(shard)
    output = _output_of(output, part, exports, launched=shard is None)
    choice = part_choice(frames, every, pages, resolution)
    found = find(paths or [], filelist, include or [], exclude or [], choice)
    fleet = None
    if addresses:
        fleet = connect(addresses, api_key_file, model if is_given(context, "model") else "", followed, batch)
        model = fleet.holds.name
    exporter = Exporter(exports, found.found, fields=list(questions), generator=f"fastvlm-mlx {__version__}, {model}")
    if not dry_run:
        exporter.check()
    holder = find_holder(
        model,
        revision,
        dtype,
        fleet=fleet,
        cluster=None if ray is None else Cluster(ray, ray_cores),
        schema=followed,
        batch=batch,
        warm=warm,
        fetch=not dry_run,
    )
    record_names = Names(found.found)
    mine = found.found if part is None else [each for each in found.found if part.holds(record_names.of(each))]
    with ExitStack() as stack, PartReader(choice, note) as parts:
        task, job, plan = None, None, Plan(mine, 0, 0)
        if holder.identity is not None:
            task = Task(
                questions=questions,
                model=model,
                **holder.identity,
                system=system,
                resolution=with_detail(resolution, detail),
                background=background,
                config=GenerationConfig(max_tokens=max_tokens),
                keep_openings=keep_openings,
                sentence=sentence,
                max_words=max_words,
                prefix=prefix,
                schema=followed,
            )
            journal = None
            if output is not None and not (dry_run and not output.exists()):
                journal = stack.enter_context(Journal(output, read_only=dry_run, notify=note))
            job = CaptionJob(task, journal, mixed=force, parts=parts)
            plan = job.plan(mine, names=record_names, retry_errors=retry_errors, force=force)
            if part is not None and not dry_run:
                job.keep_shard(part, len(mine), len(found.found))
        note(plan_line(found, plan, retry_errors, "" if part is None else f"{len(mine)} of them in shard {part}"))
        for unreadable in found.unreadable[:NAMED]:
            note(f"{unreadable.path}: {unreadable.reason}")
        if dry_run or job is None or task is None:
            return
        if fleet is not None and plan.todo:
            fleet.start(task)
        failed = plan.failed + run(job, plan, exporter, holder, Run(force, output, json_progress))
        exporter.write_data_sets(job.record)
    note_exports(exporter)
    if failed or found.unreadable or exporter.failures:
        if part is not None and shard is None:
            return  # a launcher ends the other ranks if one fails, and their pictures have nothing to do with it
        raise typer.Exit(CHECK_FAILED)


def _check_combinations(given: Mapping[str, Any]) -> None:
    """Refuses options that would change nothing beside others, by the values of all parameters."""
    if not given["paths"] and not given["filelist"]:
        raise typer.BadParameter("give pictures or folders, or names with --filelist", param_hint="PATH")
    if given["server"] and given["ray"] is not None:
        raise typer.BadParameter("cannot be used with --server; choose one of them", param_hint="--ray")
    for name, options in _NEEDS.items():
        if not given[name]:
            refuse(_values(given, options), f"without {_option(name)}")
    for name, (options, reason) in _REPLACES.items():
        if given[name]:
            refuse(_values(given, options), f"with {_option(name)}: {reason}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _values(given: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {_option(name): given[name] for name in names}


def _refuse_without_caption(exports: "Exports", prefix: str, schema: str | None) -> None:
    """Refuses what is for captions where there are none."""
    needs = {"--txt, --xmp, --embed, --hf": exports.need_a_caption, "--prefix": prefix, "--schema": schema is not None}
    for option, needed in needs.items():
        if needed:
            raise typer.BadParameter("--ask alone gives no caption; add --prompt", param_hint=option)


def _prefix(prefix: str | None, max_words: int | None) -> str:
    """What captions begin with, without spaces around it; nothing if none was given."""
    if prefix is None:
        return ""
    from fastvlm_mlx.generation.words import count_words

    if not prefix.strip():
        raise typer.BadParameter("is empty; give the first words of the captions", param_hint="--prefix")
    if max_words is not None and (words := count_words(prefix)) >= max_words:
        raise typer.BadParameter(f"has {words} of {max_words} words, and leaves none", param_hint="--prefix")
    return prefix.strip()


def field_questions(prompt: str | None, ask: list[str]) -> dict[str, str]:
    """The prompts by field: the caption, unless only other fields are asked for."""
    questions = {} if ask and prompt is None else {"text": DEFAULT_PROMPT if prompt is None else prompt}
    for each in ask:
        name, equals, text = each.partition("=")
        if not equals or not _FIELD.fullmatch(name) or not text.strip():
            raise typer.BadParameter(f"{each!r} is not like colour='What colour is it?'", param_hint="--ask")
        if name in questions or name in _RESERVED:
            raise typer.BadParameter(f"{name} is taken; choose another name", param_hint="--ask")
        questions[name] = text
    from fastvlm_mlx.jobs.captions import PromptTemplate

    for text in questions.values():
        with usage_errors():
            PromptTemplate(text)
    return questions


def _output_of(output: Path | None, part: "Shard | None", exports: "Exports", *, launched: bool) -> Path | None:
    """The journal of this process, which with the other outputs can be written.

    Args:
        output: The one that was named.
        part: Which shard this process has; None for all.
        exports: The other outputs.
        launched: Whether a launcher has given the shard, so that each process needs a journal of its own.

    Raises:
        typer.BadParameter: If a file is named twice, or one for all pictures would be written for a shard.
        ConfigError: If a folder does not exist.
        OutputError: If a file is in the way.
    """
    from fastvlm_mlx.jobs.shards import journal_of
    from fastvlm_mlx.outputs import check_output

    if part is not None:
        if exports.for_all:
            reason = f"is one for all pictures, and this is shard {part}; `fastvlm merge` makes it of all shards"
            raise typer.BadParameter(reason, param_hint=exports.for_all[0])
        if launched and output is not None:
            output = journal_of(output, part)
    paths = [path for path in (output, exports.csv) if path is not None]
    if len({path.absolute() for path in paths}) < len(paths):
        raise typer.BadParameter("is --output; name another file", param_hint="--csv")
    for path in paths + [path for path in (exports.webdataset,) if path is not None]:
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"{printable(path)}: cannot be written, since its folder does not exist")
    if output is not None and output.exists():
        check_output(output)
    return output


def _shard(text: str | None) -> "Shard | None":
    """The part of the pictures that an option or a launcher gives this process; None for all."""
    from fastvlm_mlx.jobs.shards import Shard, launched_shard

    if text is None:
        return launched_shard()
    with usage_errors("--shard"):
        return Shard.parse(text)
