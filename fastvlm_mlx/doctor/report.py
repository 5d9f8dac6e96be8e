"""An examination as text, as Markdown for a bug report, and as JSON; without paths and names of people."""

import getpass
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastvlm_mlx.doctor.agreement import PART as AGREEMENT
from fastvlm_mlx.doctor.answers import PART as ANSWERS
from fastvlm_mlx.doctor.checks import Check, Examination, Undone
from fastvlm_mlx.doctor.environment import PART as ENVIRONMENT
from fastvlm_mlx.doctor.forms import roles
from fastvlm_mlx.doctor.speed import PART as SPEED
from fastvlm_mlx.formatting import as_markdown, as_text

FORMAT_VERSION = 1
PRECISIONS = ("float32", "float16")
_BLOCK = re.compile(r"layers\.\d+")

_HIDDEN = "…"
"""What stands in the place of a path or a name."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The errors that another machine gave.

    Attributes:
        machine: What it is, in a few words.
        model: The label of the model.
        figures: Errors by `Check.key`.
    """

    machine: str
    model: str
    figures: Mapping[str, float]


def references() -> list[Reference]:
    """The figures in `reference.json`."""
    data = json.loads(files("fastvlm_mlx.doctor").joinpath("reference.json").read_text(encoding="utf-8"))
    return [Reference(**machine) for machine in data["machines"]]


def redact(text: str) -> str:
    """`text` without paths, the user's name and the host's."""
    for place in sorted({str(Path.cwd()), os.path.expanduser("~")}, key=len, reverse=True):
        if len(place) > 1:
            text = text.replace(place, _HIDDEN)
    text = re.sub(r"(?<![\w.)\]])(?:[A-Za-z]:[\\/]|~?/|…/)[^\s:;,'\"()]+", _HIDDEN, text)
    try:
        people = {getpass.getuser(), platform.node().partition(".")[0]}
    except (OSError, KeyError):
        people = {platform.node().partition(".")[0]}
    for name in people:
        if len(name) > 2:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", _HIDDEN, text)
    return text


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What an examination found, ready to be shown.

    Attributes:
        label: Of the model.
        roles: What was compared with what.
        checks: All of them.
        undone: Steps that did not run to their end.
    """

    label: str
    roles: str
    checks: tuple[Check, ...]
    undone: tuple[Undone, ...]

    @classmethod
    def of(cls, examination: Examination, label: str) -> "Findings":
        """Takes what an examination has so far; what is not this project's own wording loses paths and names."""

        def clean(check: Check) -> Check:
            value = redact(check.value) if isinstance(check.value, str) else check.value
            return replace(check, value=value, reason=redact(check.reason))

        return cls(
            label=label,
            roles=roles(),
            checks=tuple(map(clean, examination.checks)),
            undone=tuple(Undone(name=each.name, reason=redact(each.reason)) for each in examination.undone),
        )

    @property
    def wrong(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.ok is False]

    def part(self, name: str) -> list[Check]:
        """The checks of a part."""
        return [check for check in self.checks if check.part == name]

    def worst(self, precision: str) -> float | None:
        """The largest relative error in a precision; None if none was measured."""
        errors = [
            check.value
            for check in self.part(AGREEMENT)
            if check.precision == precision and isinstance(check.value, float)
        ]
        return max(errors, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return {
            "fastvlm_doctor": FORMAT_VERSION,
            "model": self.label,
            "compared": self.roles,
            "ok": not self.wrong,
            "verdict": list(verdict(self)),
            "checks": [{**asdict(check), "value": _finite(check.value)} for check in self.checks],
            "undone": [asdict(each) for each in self.undone],
        }


def _finite(value: float | str) -> float | str | None:
    """A value that JSON has; infinity means that nothing could be compared."""
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def verdict(findings: Findings) -> Iterator[str]:
    """The result in plain words."""
    for check in findings.wrong:
        yield f"{_what(check)}: {_value(check)}. {check.reason}".strip()
    done = [check for check in findings.checks if check.ok is not None]
    if findings.wrong:
        yield f"Something is off: {len(findings.wrong)} of {len(done)} checks failed. They are named above."
        return
    for precision in PRECISIONS:
        worst = findings.worst(precision)
        if worst is not None:
            yield f"In {precision}, the two forms of the model agree to within {worst:.1g} of the largest value."
    if findings.undone:
        yield f"All {len(done)} checks that ran are right; {len(findings.undone)} steps were not done."
    else:
        yield f"All is well: {len(done)} checks, all right."


def _what(check: Check) -> str:
    """A failed check's subject, for the verdict."""
    where = {
        ENVIRONMENT: check.name,
        ANSWERS: f"wrong answer about {check.name}",
        AGREEMENT: f"{check.name}{f' in {check.precision}' if check.precision else ''}",
        SPEED: f"speed of {check.name}",
    }
    return where.get(check.part, check.name)


def _value(check: Check) -> str:
    if isinstance(check.value, str):
        return check.value
    return f"off by {check.value:.2g}, {check.limit:.2g} is allowed" if check.limit else f"{check.value:.3g}"


def as_lines(findings: Findings, *, markdown: bool = False) -> Iterator[str]:
    """The lines of the report, for a terminal or as Markdown."""
    table = as_markdown if markdown else as_text
    heading = "**{}**" if markdown else "{}"
    yield heading.format(f"fastvlm doctor: {findings.label}")
    sections: Sequence[tuple[str, list[list[str]]]] = (
        ("Environment", _environment(findings.part(ENVIRONMENT))),
        ("Questions to the demo model", _answers(findings.part(ANSWERS))),
        (f"Largest relative errors: {findings.roles}", _agreement(findings)),
        ("Speed", _speed(findings.part(SPEED))),
        ("Not done", [["step", "reason"], *([each.name, each.reason] for each in findings.undone)]),
    )
    for title, rows in sections:
        if len(rows) > 1:
            yield ""
            yield heading.format(title)
            yield ""
            headless = not markdown and not any(rows[0])
            yield table(rows[1:] if headless else rows, left=len(rows[0]))
    if findings.part(AGREEMENT):
        yield ""
        yield from _limits(findings.part(AGREEMENT))
    yield ""
    yield heading.format("Verdict")
    yield ""
    yield from verdict(findings)


def _mark(check: Check) -> str:
    return {True: "ok", False: "WRONG", None: ""}[check.ok]


def _environment(checks: Sequence[Check]) -> list[list[str]]:
    return [["", "", ""], *([check.name, str(check.value), check.reason] for check in checks)]


def _answers(checks: Sequence[Check]) -> list[list[str]]:
    if not checks:
        return [["", ""]]
    right = sum(check.ok is True for check in checks)
    wrong = [[check.name, f"{check.value} ({check.reason})"] for check in checks if not check.ok]
    return [["", ""], ["right", f"{right} of {len(checks)}"], *wrong]


def _agreement(findings: Findings) -> list[list[str]]:
    """Rows by what was compared, columns by precision and by other machine; decoder blocks that are right as one."""
    others = [each for each in references() if each.model == findings.label] + [
        each for each in references() if each.model != findings.label
    ]
    cells: dict[str, dict[str, Check]] = {}
    for check in _grouped(findings.part(AGREEMENT)):
        cells.setdefault(check.name, {})[check.precision] = check
    header = ["", *PRECISIONS, *(f"{each.machine}, {each.model}" for each in others)]
    rows = []
    for name, found in cells.items():
        if set(found) <= {""}:
            rows.append([name, str(found[""].value), *[""] * (len(header) - 2)])
            continue
        ours = [_cell(found.get(precision)) for precision in PRECISIONS]
        theirs = [
            " / ".join(f"{each.figures[key]:.1e}" for key in (f"{p} {name}" for p in PRECISIONS) if key in each.figures)
            for each in others
        ]
        rows.append([name, *ours, *theirs])
    return [header, *rows]


def _grouped(checks: Sequence[Check]) -> Iterator[Check]:
    """The checks, those of decoder blocks that are right replaced by the worst of them."""
    blocks: dict[str, list[Check]] = {}
    for check in checks:
        if _BLOCK.fullmatch(check.name) and check.ok:
            blocks.setdefault(check.precision, []).append(check)
    for check in checks:
        mine = blocks.get(check.precision, [])
        if check not in mine:
            yield check
        elif check is mine[0]:
            worst = max(mine, key=lambda each: each.value)
            yield replace(worst, name="layers.*, the worst")


def _cell(check: Check | None) -> str:
    if check is None:
        return ""
    value = check.value if isinstance(check.value, str) else f"{check.value:.1e}"
    return value if check.ok else f"{value} WRONG"


def _limits(checks: Sequence[Check]) -> Iterator[str]:
    """What is allowed and why, once for each reason."""
    limits = dict.fromkeys(
        f"At most {check.limit:.0e}{f' in {check.precision}' if check.precision else ''}: {check.reason}."
        for check in checks
        if check.limit is not None
    )
    return iter(limits)


def _speed(checks: Sequence[Check]) -> list[list[str]]:
    rows = [[check.name, str(check.value), _mark(check), check.reason if _shown(check) else ""] for check in checks]
    return [["", "", "", ""], *rows]


def _shown(check: Check) -> bool:
    """Whether the reason says more than that a limit was kept."""
    return check.limit is None or check.ok is False
