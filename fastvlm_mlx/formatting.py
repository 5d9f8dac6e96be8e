"""Formats byte counts, lists of names and tables for people to read."""

from collections.abc import Collection, Sequence

MESSAGE_LENGTH = 500
"""The most characters of a message."""


def readable_bytes(count: float) -> str:
    """`count` bytes with three digits and a decimal unit: `994 MB`, `1.30 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:#.3g} {unit}"


def names(items: Collection[str], most: int = 5) -> str:
    """The first `most` names and how many more there are: `a, b and 3 more`; `nothing` if there are none.

    Long names are shortened as in `printable`.
    """
    shown = ", ".join(printable(item, 100) for item in list(items)[:most])
    return f"{shown} and {len(items) - most} more" if len(items) > most else shown or "nothing"


def counted(count: int, noun: str) -> str:
    """A number of things: `1 image`, `3 images`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def per_second(rate: float) -> str:
    """A rate to two digits, without an exponent: `0.53`, `8.2`, `150`."""
    return f"{rate:.2g}" if rate < 99.5 else f"{rate:,.0f}"


def printable(text: object, length: int = 200) -> str:
    """Formats a name for a message: one line of at most `length` characters.

    The middle of a longer name is left out; characters that cannot be printed are escaped.
    """
    text = str(text)
    if len(text) > 2 * length:
        text = text[:length] + text[-length:]
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text if len(text) <= length else f"{text[: length // 2]}…{text[len(text) - (length - 1) // 2 :]}"


def as_text(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table with aligned columns; the first row is the header.

    Args:
        rows: Of equal length.
        left: How many columns are aligned to the left; the others are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{'<' if column < left else '>'}{widths[column]}}" for column, cell in enumerate(row)).rstrip()
        for row in rows
    )


def as_blocks(rows: Sequence[Sequence[str]], *, left: int = 1, width: int = 80) -> str:
    """A table as `as_text` makes it, in several parts if it is too wide; each begins with the first `left` columns.

    Args:
        rows: Of equal length; the first is the header.
        left: How many columns are aligned to the left and repeated.
        width: Columns of text; a part that cannot be narrower is wider.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    fixed = sum(widths[:left]) + 2 * left
    blocks: list[list[int]] = [[]]
    for column in range(left, len(widths)):
        used = fixed + sum(widths[each] + 2 for each in blocks[-1])
        if blocks[-1] and used + widths[column] > width:
            blocks.append([])
        blocks[-1].append(column)
    parts = ([[row[column] for column in (*range(left), *block)] for row in rows] for block in blocks)
    return "\n\n".join(as_text(part, left=left) for part in parts)


def as_markdown(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table in Markdown; the first row is the header.

    Args:
        rows: Of equal length.
        left: How many columns are aligned to the left; the others are aligned to the right.
    """
    rule = ["---" if column < left else "---:" for column in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))
