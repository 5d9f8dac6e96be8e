"""`fastvlm search`: finds the pictures of a folder that show something."""

import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm_mlx.cli.options import (
    CHECK_FAILED,
    DEFAULT_MODEL,
    DEFAULT_PROMPT,
    Background,
    LoadDType,
    Model,
    Revision,
    parse_resolution,
    refuse,
    user_path,
)
from fastvlm_mlx.cli.terminal import note
from fastvlm_mlx.cli.usage import usage_errors
from fastvlm_mlx.formatting import printable

if TYPE_CHECKING:
    pass

_DAY = re.compile(r"\d{4}(-\d\d(-\d\d)?)?")
_SHOWN = 20
"""Hits on a terminal by default."""
_MOST_TOKENS = 64
"""Of a caption, which is found by its words as well if its end is missing."""


def _parse_side(text: str) -> int:
    """The resolution of an index, which is one for all pictures."""
    side = parse_resolution(text)
    if not isinstance(side, int):
        raise typer.BadParameter("all pictures of an index have one resolution; give a multiple of 64")
    return side


def _parse_day(text: str) -> str:
    """The first day of `2026`, `2026-11` or `2026-11-26`."""
    if not _DAY.fullmatch(text):
        raise typer.BadParameter(f"{text!r} is no date; write it as 2026, 2026-11 or 2026-11-26")
    return text


def search(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", parser=user_path, help="The folder of pictures.")],
    query: Annotated[
        str | None,
        typer.Argument(metavar="QUERY", help="What the pictures should show; without it, only the index is made."),
    ] = None,
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    top: Annotated[
        int | None,
        typer.Option("--top", "-n", metavar="N", min=1, help=f"Show the best N. [default: {_SHOWN} on a terminal]"),
    ] = None,
    threshold: Annotated[
        float, typer.Option(metavar="P", min=0, max=1, help="Show what is at least so probable.")
    ] = 0.5,
    question: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Ask this about each picture; empty braces stand for the query."),
    ] = None,
    since: Annotated[
        Any, typer.Option(metavar="DATE", parser=_parse_day, help="Only pictures of this day, month or year on.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(metavar="N", min=0, help="Ask for so long, then show what is known.")
    ] = None,
    words: Annotated[bool, typer.Option("--words", help="Look for words in captions and names; ask nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each picture.")] = False,
    print0: Annotated[bool, typer.Option("--print0", "-0", help="End names with zero bytes, for xargs -0.")] = False,
    page: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="FILE", parser=user_path, help="Write a page with the pictures found, for any browser."
        ),
    ] = None,
    open_best: Annotated[
        bool, typer.Option("--open", help="Open the best; with --top the best N, with --html the page.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update/--no-update", help="Look first at what has changed in the folder.")
    ] = True,
    captions: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", parser=user_path, help="Take in what `caption --output` wrote; may be repeated."),
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=TEXT", help="Index this answer, too, such as text='What does the text say?'"),
    ] = None,
    no_captions: Annotated[
        bool, typer.Option("--no-captions", help="Caption no pictures: the index is made several times faster.")
    ] = False,
    resolution: Annotated[
        Any,
        typer.Option(
            "--resolution",
            "-r",
            parser=_parse_side,
            metavar="N",
            help="Pixels per side that the index is made at. [default: the index's, or the model's own up to 512]",
        ),
    ] = None,
    background: Background = None,
    dtype: LoadDType = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Pictures at a time. [default: what suits the machine]")
    ] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Try pictures again that failed.")] = False,
    index: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=user_path, help="The index. [default: one in the cache]")
    ] = None,
) -> None:
    """Find the pictures of a folder that show something, best first: their names, one on each line.

    The first time it makes an index: what the model sees in each picture, and a caption. Later it only looks at what
    has changed. Words find pictures at once by their captions and names; the model is then asked about each picture
    whether it shows what you look for. Ctrl-C ends the asking, and loses nothing.

    The index is in the cache folder; `fastvlm cache` shows and removes it. Nothing is written into FOLDER.
    """
    from fastvlm_mlx.album.album import Album
    from fastvlm_mlx.album.asking import check_query, check_template
    from fastvlm_mlx.album.database import DamagedIndexError
    from fastvlm_mlx.album.page import write_page
    from fastvlm_mlx.cli.searching import Show, Wanted, bring_up_to_date, find, prepare

    if query is None:
        given = {
            **{"--top": top, "--question": question, "--since": since, "--seconds": seconds, "--words": words},
            **{"--json": as_json, "--print0": print0, "--html": page, "--open": open_best, "--no-update": not update},
        }
        refuse(given, "without QUERY")
    else:
        with usage_errors():
            query = check_query(query)
    if question is not None:
        with usage_errors("--question"):
            check_template(question)
    if page is not None:
        from fastvlm_mlx.outputs import check_output

        with usage_errors("--html"):
            check_output(page)
    if words:
        refuse({"--question": question, "--seconds": seconds}, "with --words")
    if as_json:
        refuse({"--print0": print0}, "with --json")
    if not update:
        given = {"--captions": captions, "--ask": ask, "--no-captions": no_captions, "--retry-errors": retry_errors}
        refuse(given, "with --no-update")
    if top is None and sys.stdout.isatty() and not as_json:
        top = _SHOWN
    wanted = Wanted(
        model=model,
        revision=revision,
        dtype=dtype,
        resolution=resolution,
        background=background,
        questions=_questions(ask or [], no_captions=no_captions),
        max_tokens=_MOST_TOKENS,
        journals=captions or [],
        batch=batch,
        retry_errors=retry_errors,
    )

    def run(album: "Album") -> int:
        """Does what the command line says; returns how many pictures failed."""
        failed = 0
        if album.index.rebuilt:
            kept = "" if index is None else f"; the damaged one is now {printable(index.name)}.damaged"
            note(f"{printable(album.index.path)}: the index was damaged, and is made anew{kept}")
        with prepare(album, wanted) if update or not words else nullcontext() as prepared:
            if prepared is not None and update:
                failed = bring_up_to_date(album, prepared)
            if query is not None:
                show = Show(folder, as_json=as_json, end=b"\0" if print0 else b"\n")
                asker = None if prepared is None or words else prepared.asker(question)
                results = find(album, query, asker, show, top=top, threshold=threshold, since=since, seconds=seconds)
                if page is not None:
                    write_page(page, album, query, results.hits, found=results.found)
                if open_best:
                    best = results.hits if top is not None else results.hits[:1]
                    show.open([page] if page is not None else [Path(show.path(hit)) for hit in best])
        return failed

    _check_folder(folder, index)
    with Album(folder, index) as album:
        try:
            failed = run(album)
        except DamagedIndexError:
            album.index.rebuild()
            failed = run(album)
    if failed:
        raise typer.Exit(CHECK_FAILED)


def _check_folder(folder: Path, index: Path | None) -> None:
    """Checks that there is a folder, or an index of what it held.

    Raises:
        typer.BadParameter: If there is neither.
    """
    from fastvlm_mlx.album.database import index_path

    if folder.is_dir() or (not os.path.lexists(folder) and (index or index_path(folder)).exists()):
        return
    reason = "is not a folder" if os.path.lexists(folder) else "no such folder"
    raise typer.BadParameter(f"{printable(folder)}: {reason}", param_hint="FOLDER")


def _questions(ask: list[str], *, no_captions: bool) -> dict[str, str] | None:
    """What is asked about every picture, by field; None for what the index was made with."""
    from fastvlm_mlx.cli.caption import field_questions

    if not ask:
        return {} if no_captions else None
    return field_questions(None if no_captions else DEFAULT_PROMPT, ask)
