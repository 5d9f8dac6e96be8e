"""Finds the pictures that a command line names, and says what was found."""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fastvlm_mlx.cli.captioning import NAMED
from fastvlm_mlx.cli.terminal import LiveLine, note
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable

if TYPE_CHECKING:
    from fastvlm_mlx.inputs.resolution import Resolution
    from fastvlm_mlx.inputs.views import Choice
    from fastvlm_mlx.jobs.caption import Plan
    from fastvlm_mlx.jobs.pictures import Pictures


def part_choice(frames: int | None, every: float | None, pages: str | None, resolution: "Resolution") -> "Choice":
    """Which frames and pages are looked at.

    Raises:
        typer.BadParameter: If pages are no pages, or there are both frames and a time between them.
    """
    from fastvlm_mlx.inputs.fragments import page_ranges
    from fastvlm_mlx.inputs.views import Choice

    if frames is not None and every is not None:
        raise typer.BadParameter("cannot be with --frames", param_hint="--every")
    ranges = page_ranges(pages) if pages is not None else ()
    if pages is not None and not ranges:
        raise typer.BadParameter(f"{printable(pages, 40)!r} is not like 2, 1-3 or all", param_hint="--pages")
    side = resolution if isinstance(resolution, int) else None
    return Choice(frames=frames, every=every, pages=ranges or None, whole=True, resolution=side)


def find(
    paths: list[str], filelist: Path | None, include: list[str], exclude: list[str], choice: "Choice | None" = None
) -> "Pictures":
    """The pictures that the command line, a list and stdin name, and the parts of films and PDFs.

    Raises:
        ConfigError: If there are none.
    """
    from fastvlm_mlx.inputs.named import ANIMATION, FILM, PDF
    from fastvlm_mlx.jobs.parts import with_parts
    from fastvlm_mlx.jobs.pictures import find_pictures, read_names

    names: list[str] = []
    for path in paths:
        names += read_names(sys.stdin.buffer.read(), "stdin") if path == "-" else [path]
    if filelist is not None:
        try:
            listed = filelist.read_bytes()
        except (OSError, ValueError) as err:  # a name with half a character
            reason = getattr(err, "strerror", None) or err
            raise ConfigError(f"{printable(filelist)}: cannot be read as a list of names ({reason})") from err
        names += read_names(listed, str(filelist))
    with LiveLine() as line:
        line.wait_for("looking for pictures")
        choice = choice or part_choice(None, None, None, None)
        kinds = [*((FILM, ANIMATION) if choice.moves else ()), *((PDF,) if choice.pages else ())]
        found = with_parts(find_pictures(names, include=include, exclude=exclude, kinds=kinds), choice, note)
    if not found.found:
        for missing in found.unreadable[:NAMED]:
            note(f"{missing.path}: {missing.reason}")
        raise ConfigError(f"there are no pictures{_skipped(found)}")
    return found


def _skipped(found: "Pictures") -> str:
    """What was left out, by reason."""
    reasons = Counter(skipped.reason.partition(" of the Live Photo")[0] for skipped in found.skipped)
    return "".join(f", {count} skipped ({reason})" for reason, count in reasons.most_common(NAMED))


def plan_line(found: "Pictures", plan: "Plan", retry_errors: bool, shard: str) -> str:
    """What is to do, in a line; `shard` says how much of that is this process's."""
    parts = [f"{len(found.found)} picture{'s' * (len(found.found) != 1)}"]
    if shard:
        parts.append(shard)
    if plan.done:
        parts.append(f"{plan.done} done")
    if plan.failed:
        parts.append(f"{plan.failed} failed before (--retry-errors tries them again)")
    if found.unreadable:
        parts.append(f"{len(found.unreadable)} unreadable")
    return f"{', '.join(parts)}, {len(plan.todo)} to do{_skipped(found)}"
