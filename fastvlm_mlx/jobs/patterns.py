"""Patterns of file names, as a shell has them, without its trouble: links that lead back are not followed for ever."""

import fnmatch
import glob
import os
import re
from collections.abc import Callable, Sequence

Matcher = Callable[[str], bool]
"""Whether a path relative to a folder matches."""


def is_pattern(name: str) -> bool:
    """Whether a name has characters with a meaning in patterns."""
    return glob.has_magic(name)


def any_of(patterns: Sequence[str]) -> Matcher:
    """Matches paths of which the whole or the last part matches one of the patterns, whatever their case."""
    expression = re.compile("|".join(map(fnmatch.translate, patterns)), re.IGNORECASE)
    return lambda path: bool(expression.match(path) or expression.match(os.path.basename(path)))


def expand(pattern: str) -> list[str]:
    """The names that match a pattern without `**`; hidden ones only if it asks for them."""
    return glob.glob(pattern)


def split_recursive(pattern: str) -> tuple[str, Matcher] | None:
    """The part of a pattern before `**` and a matcher of what is below it; None for a pattern without `**`.

    What is inside a folder that matches, matches too.
    """
    parts = pattern.split("/")
    if "**" not in parts:
        return None
    first = parts.index("**")
    rest = [part for part in parts[first:] if part]
    return "/".join(parts[:first]) or ("/" if pattern.startswith("/") else "."), lambda path: _match(
        path.split("/"), rest
    )


def _match(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return True
    if patterns[0] == "**":
        return any(_match(parts[start:], patterns[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0]) and _match(parts[1:], patterns[1:])
