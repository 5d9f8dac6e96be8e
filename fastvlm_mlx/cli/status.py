"""`fastvlm status`: whether a background server keeps a model warm."""

from typing import Annotated, Any

import typer

from fastvlm_mlx.cli.terminal import show, show_json
from fastvlm_mlx.cli.usage import CHECK_FAILED
from fastvlm_mlx.formatting import readable_bytes


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Say whether `fastvlm serve --background` keeps a model warm; the exit code is 3 if it does not."""
    from fastvlm_mlx.warm.client import status as ask
    from fastvlm_mlx.warm.place import Place

    place = Place.of_user()
    holder, said = place.holder(), ask(place)
    state = str((said or {}).get("state", "no" if holder is None else "silent"))
    if as_json:
        show_json({"running": holder is not None, "state": state, "pid": holder or None, **(said or {})})
    elif said is not None:
        show("\n".join(f"{name:<9} {value}" for name, value in _lines(said)))
    elif holder is None:
        show("no background server runs; `fastvlm serve --background` starts one")
    else:
        show(f"the background server (process {holder or 'unknown'}) does not answer; `fastvlm stop` ends it")
    if state != "ready":
        raise typer.Exit(CHECK_FAILED)


def _lines(said: dict[str, Any]) -> list[tuple[str, str]]:
    """What a server says about itself, for people."""
    ends = said["ends_in_seconds"]
    idle = "with `fastvlm stop`" if ends is None else f"in {_time(ends)} unless it is asked something"
    model = f"{said['model']}, computes in {said['dtype']}" if said["dtype"] else said["model"]
    return [
        ("state", said["state"]),
        ("model", model),
        ("process", f"{said['pid']}, for {_time(said['up_seconds'])}"),
        ("answers", f"{said['answered']} given, {said['answering']} on the way"),
        ("memory", readable_bytes(said["memory_bytes"])),
        ("ends", idle),
    ]


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
