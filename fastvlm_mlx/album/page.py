"""What was found as one HTML file: pictures, captions and scripts are inside it, and it opens no address by itself."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from fastvlm_mlx.album.album import Album, Hit
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.formatting import counted, printable
from fastvlm_mlx.outputs import writing

MOST_PICTURES = 1000
"""On a page; they take about 15 MB."""
SIDE = 320
"""Pixels of a thumbnail's longer side."""
_TEMPLATE = Path(__file__).with_name("page.html")
_AT_ONCE = 64


def write_page(path: Path, album: Album, query: str, hits: Sequence[Hit], *, found: int | None = None) -> None:
    """Writes the page of a search.

    Each picture links to its file, by a path that begins at the folder of the page. A picture that cannot be read any
    more has its name in its place.

    Args:
        path: The file to write; one that is there is replaced.
        album: Where the pictures are.
        query: What was looked for.
        hits: The best of them are shown, at most `MOST_PICTURES`.
        found: How many there are in all; None for those given.

    Raises:
        ConfigError: If the file cannot be written.
    """
    shown = hits[:MOST_PICTURES]
    found = len(hits) if found is None else found
    folder = os.path.dirname(os.path.realpath(path))
    template = _TEMPLATE.read_text(encoding="utf-8")
    name = os.path.basename(album.folder) or album.folder
    best = f"; the best {len(shown)} are shown" if found > len(shown) else ""
    values = {
        "policy": _policy(template),
        "title": f"{query} – {name}",
        "query": query,
        "summary": f"{counted(found, 'picture')} found in {name}{best}",
        "count": f"{len(shown)} shown" if shown else "Nothing was found.",
        "footer": f"Made by fastvlm search on {datetime.now():%Y-%m-%d}. Scores are the model's; it may be wrong.",
    }
    before, after = template.split("{{pictures}}")
    with writing(path) as file, ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        file.write(_filled(before, values))
        for start in range(0, len(shown), _AT_ONCE):
            part = shown[start : start + _AT_ONCE]
            for hit, thumbnail in zip(part, threads.map(lambda each: _thumbnail(album, each), part), strict=True):
                file.write(_item(hit, thumbnail, folder).encode())
        file.write(_filled(after, values))


def _filled(template: str, values: dict[str, str]) -> bytes:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: _escaped(values[match[1]]), template).encode()


def _policy(template: str) -> str:
    """What a browser may do with the page: show the pictures inside it and run its own script, and nothing else."""
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", template, flags=re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; img-src data:; script-src {hashes['script']}; style-src {hashes['style']}; "
        "base-uri 'none'; form-action 'none'"
    )


def _thumbnail(album: Album, hit: Hit) -> bytes | None:
    """A small JPEG; None if the picture cannot be read any more."""
    try:
        return album.thumbnail(hit.id, SIDE)
    except FastVLMError:
        return None


def _item(hit: Hit, thumbnail: bytes | None, folder: str) -> str:
    name = _escaped(hit.name)
    if thumbnail is None:
        shown = f"<span>{name} cannot be read any more</span>"
    else:
        data = base64.b64encode(thumbnail).decode()
        shown = f'<img src="data:image/jpeg;base64,{data}" alt="{name}" loading="lazy" decoding="async">'
    is_asked = hit.probability is not None
    score = f"{100 * hit.score:.0f} %" if is_asked else "by words"
    link = html.escape(_relative(hit.path, folder))
    caption = f'<p class="caption" dir="auto">{_escaped(hit.caption)}</p>' if hit.caption else ""
    return (
        f'<li data-score="{hit.score:.4f}" data-date="{html.escape(hit.date)}" data-name="{name}">'
        f'<a class="picture" href="{link}">{shown}</a><div class="text">{caption}<p class="name">{name}</p>'
        f'<p class="facts"><span class="score{"" if is_asked else " word"}">'
        f'<span class="unseen">Score </span>{score}</span>'
        f'<time datetime="{html.escape(hit.date)}">{html.escape(hit.date)}</time></p></div></li>\n'
    )


def _relative(path: str, folder: str) -> str:
    """The address of a file, seen from a folder; it can be none of another scheme."""
    relative = os.path.relpath(os.path.realpath(path), folder)
    return quote(os.fsencode(f"./{relative}"))


def _escaped(text: str) -> str:
    """A text as HTML, without what moves a cursor or is no Unicode."""
    return html.escape(printable(text, 2000))
