"""`fastvlm merge`: makes one journal of those of several workers, and files for other programs from it."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
from fastvlm_mlx.cli.finding import find
from fastvlm_mlx.cli.options import CHECK_FAILED, user_path
from fastvlm_mlx.cli.terminal import ByteProgress, note
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import counted, printable

if TYPE_CHECKING:
    from fastvlm_mlx.jobs.exports import Exports
    from fastvlm_mlx.jobs.merging import Merged


def merge(
    journals: Annotated[
        list[Path],
        typer.Argument(metavar="JOURNAL", parser=user_path, help="Files that `fastvlm caption -o` has written."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", parser=user_path, help="The one journal; what it has already is kept."
        ),
    ],
    pictures: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="The folder of the pictures, for --txt and the like; may be repeated."),
    ] = None,
    txt: Txt = False,
    xmp: Xmp = False,
    xmp_name: XmpName = None,
    embed: Embed = False,
    csv: Csv = None,
    hf: Hf = False,
    webdataset: WebDataset = None,
    overwrite: Overwrite = False,
    force: Annotated[
        bool, typer.Option("--force", help="Merge records of different settings, models and versions, too.")
    ] = False,
) -> None:
    """Merge the journals of shards, servers or machines: a line for each picture, in the order of their names.

    Where journals overlap, an answer counts more than an error, and a later journal more than an earlier one. Shards
    that are missing or not done are named, and make the exit code 3; merge again when they are there.
    """
    from fastvlm_mlx.jobs.merging import merge as merge_journals
    from fastvlm_mlx.outputs import check_output

    exports = chosen_exports(
        txt=txt, xmp=xmp, xmp_name=xmp_name, embed=embed, csv=csv, hf=hf, webdataset=webdataset, overwrite=overwrite
    )
    _check(journals, output, exports, pictures)
    check_output(output)
    with ByteProgress() as progress:
        merged = merge_journals(
            journals, output, mixed=force, progress=lambda done, all_: progress(done, all_, "merging")
        )
    _report(merged, output, len(journals))
    incomplete = bool(merged.missing or merged.failed)
    if csv is not None:
        from fastvlm_mlx.jobs.results import write_table

        write_table(csv, output, merged.settings)
    if pictures is not None:
        incomplete |= _export(output, merged, exports, pictures)
    if incomplete:
        raise typer.Exit(CHECK_FAILED)


def _show(progress: ByteProgress, done: int, total: int) -> None:
    progress(done, total, "merging")


def _check(journals: list[Path], output: Path, exports: "Exports", pictures: list[str] | None) -> None:
    """Refuses what cannot be done, before anything is."""
    missing = [journal for journal in journals if not journal.is_file()]
    if missing:
        raise ConfigError(f"{printable(missing[0])}: no such file; give the journals that shards have written")
    if exports.csv is not None and exports.csv.absolute() in [each.absolute() for each in (output, *journals)]:
        raise typer.BadParameter("is a journal; name another file", param_hint="--csv")
    wanted = {"--txt": exports.txt, "--xmp": exports.xmp, "--embed": exports.embed, "--hf": exports.hf}
    given = [name for name, chosen in {**wanted, "--webdataset": exports.webdataset}.items() if chosen]
    if given and not pictures:
        raise typer.BadParameter("needs the pictures; name their folder with --pictures", param_hint=given[0])
    if pictures and not given:
        raise typer.BadParameter("would change nothing without --txt, --xmp or the like", param_hint="--pictures")


def _report(merged: "Merged", output: Path, journals: int) -> None:
    """Says what was merged."""
    for journal, count in merged.damaged.items():
        note(f"{journal}: {counted(count, 'line')} left out that {'is no record' if count == 1 else 'are no records'}")
    parts = [f"{counted(merged.records, 'picture')} of {counted(journals, 'journal')} in {output}"]
    if merged.failed:
        parts.append(f"{merged.failed} failed")
    if merged.repeated:
        parts.append(f"{counted(merged.repeated, 'record')} about a picture that had one")
    if merged.differing:
        parts.append(f"{merged.differing} of them with another answer; the later journal counts")
    note(", ".join(parts))
    for line in merged.missing:
        note(f"missing: {line}")


def _export(output: Path, merged: "Merged", exports: "Exports", names: list[str]) -> bool:
    """Writes what needs the pictures; returns whether something could not be written."""
    from fastvlm_mlx.jobs.journal import Journal
    from fastvlm_mlx.jobs.results import write_results

    found = find(names, None, [], [])
    if exports.need_a_caption and "text" not in merged.settings.get("questions", {}):
        raise ConfigError(f"{printable(output)}: holds answers but no captions, which --txt and the like are for")
    with Journal(output) as journal:
        exporter = write_results(journal, merged.settings, replace(exports, csv=None), found.found)
    note_exports(exporter)
    return bool(exporter.failures)
