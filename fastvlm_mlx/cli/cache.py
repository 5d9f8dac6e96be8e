"""`fastvlm cache`: shows what the cache folder holds, and removes from it."""

import os
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm_mlx.cli.options import is_for_subcommand, refuse
from fastvlm_mlx.cli.terminal import note, show, show_json
from fastvlm_mlx.cli.usage import CHECK_FAILED, Command, CommandGroup
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.formatting import as_text, names, printable, readable_bytes

if TYPE_CHECKING:
    from fastvlm_mlx.cache import Item

app = typer.Typer(cls=CommandGroup, rich_markup_mode=None)

_UNITS = {"h": 3600, "d": 86400, "w": 7 * 86400}


def _parse_age(text: str) -> float:
    """Seconds from `12h`, `30d` or `4w`."""
    if not (text[:-1].isdecimal() and text[-1:] in _UNITS):
        raise typer.BadParameter(f"{text!r} is no age; write it as 12h, 30d or 4w")
    return float(int(text[:-1]) * _UNITS[text[-1]])


def is_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin is not None and sys.stdin.isatty()


@app.callback(invoke_without_command=True)
def cache(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what the cache folder holds, or remove from it.

    It holds converted models, the indexes of `fastvlm search`, and the answers of `fastvlm eval`.

    `fastvlm cache rm` removes from it. What the Hub's own cache holds of these models is shown, too; that folder
    belongs to huggingface_hub (`hf cache`), and nothing in it is removed here.
    """
    if is_for_subcommand(context):
        return
    from fastvlm_mlx.cache import hub_copies, items
    from fastvlm_mlx.machine import cache_folder

    found = items()
    copies = hub_copies(found)
    if as_json:
        record = {
            "cache": str(cache_folder()),
            "items": [{**asdict(item), "path": str(item.path)} for item in found],
            "hub": {name: {"path": str(path), "size_bytes": size} for name, (path, size) in copies.items()},
        }
        show_json(record)
        return
    total = sum(item.size_bytes for item in found)
    show(f"{cache_folder()}: {readable_bytes(total) if found else 'empty'}")
    if found:
        show("\n" + as_text([("name", "kind", "size", "last used", "from"), *_rows(found)], left=5))
    if copies:
        show("\nin the Hub's own cache, which `hf cache` manages:")
        show(as_text([(name, readable_bytes(size), str(path)) for name, (path, size) in copies.items()]))


def _rows(found: "list[Item]") -> list[tuple[str, str, str, str, str]]:
    """A row for each model, album and leftover, and one for all answers."""
    rows = []
    for item in found:
        if item.kind != "answers":
            remarks = ", ".join(filter(None, [item.remark, "in use" if item.in_use else ""]))
            origin = f"{item.source} ({remarks})" if remarks else item.source
            rows.append((item.name, item.kind, readable_bytes(item.size_bytes), _day(item.last_used), origin))
    if answers := [item for item in found if item.kind == "answers"]:
        size, used = sum(item.size_bytes for item in answers), max(item.last_used for item in answers)
        rows.append(("eval", "answers", readable_bytes(size), _day(used), f"{len(answers)} runs of fastvlm eval"))
    return rows


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


@app.command(cls=Command, short_help="Remove from the cache.")
def rm(
    selected: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="A name that `fastvlm cache` shows, or a model's: demo, 0.5b, a Hub id."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything that `fastvlm cache` shows.")] = False,
    older_than: Annotated[
        Any, typer.Option(parser=_parse_age, metavar="AGE", help="What was not used for so long: 12h, 30d, 4w.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove models, indexes and answers from the cache; they are made again when they are needed.

    On a terminal it asks first. Exit code 3: something was kept because a running process uses it. Nothing outside the
    cache folder is removed, nor anything in it that fastvlm did not put there.
    """
    if not (selected or everything or older_than is not None):
        raise typer.BadParameter("give names, --all or --older-than", param_hint="NAME")
    if selected:
        refuse({"--all": everything}, "beside names")
    from fastvlm_mlx.cache import items, remove

    found = items()
    chosen = _choose(found, selected) if selected else found
    if older_than is not None:
        chosen = [item for item in chosen if time.time() - item.last_used > older_than]
    if not chosen:
        note("nothing to remove")
        return
    if is_terminal() and not yes:
        size = readable_bytes(sum(item.size_bytes for item in chosen))
        for item in chosen:
            note(f"{item.name}, {readable_bytes(item.size_bytes)}")
        typer.confirm(f"Remove {size}?", abort=True, err=True)
    kept = 0
    for item in chosen:
        if remove(item):
            show(f"removed {item.name}, {readable_bytes(item.size_bytes)}")
        else:
            note(f"{item.name}: kept, because a running process uses it")
            kept += 1
    if kept:
        raise typer.Exit(CHECK_FAILED)


def _choose(found: "list[Item]", selected: list[str]) -> "list[Item]":
    """The items that names stand for.

    Raises:
        CheckpointError: If a name stands for none.
    """
    from fastvlm_mlx.checkpoint.released import ALIASES

    chosen: list[Item] = []
    for name in selected:
        model, path = ALIASES.get(name.lower(), name), os.path.realpath(os.path.expanduser(name))
        matching = [
            item
            for item in found
            if name in (item.name, item.name.partition("/")[0])
            or (item.source and item.source in (model, path))
            or (name and item.source.partition("@")[0] == model)
        ]
        if not matching:
            there = names(sorted({item.name.partition("/")[0] for item in found}))
            raise CheckpointError(f"{printable(name)}: is not in the cache, which holds {there}")
        chosen += [item for item in matching if item not in chosen]
    return chosen
