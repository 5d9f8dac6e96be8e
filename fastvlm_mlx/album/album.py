"""An album: a folder of pictures that can be found by what they show. Several threads may use one."""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.album.asking import Asker, check_query, probability
from fastvlm_mlx.album.database import index_path
from fastvlm_mlx.album.index import Details, Index, day
from fastvlm_mlx.album.ranking import Match, matches, rank
from fastvlm_mlx.errors import ConfigError, ImageError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.images import load_image

THRESHOLD = 0.5
_FIRST_BATCH = 8
"""Pictures that are asked about first, which show how the model has to be asked."""
_EVERY = 0.25
"""Seconds after which results are worth looking at again."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A picture that was found.

    Attributes:
        id: Its number in the index.
        path: Its path.
        name: Its path below the album's folder.
        score: From 0 to 1, the probability that it is what was looked for; hits are sorted by it, best first.
        probability: Of yes against no, from the model; None if it has not been asked about this picture.
        words: The share of the query's words that are in its texts or its path.
        caption: What is known to be on it; empty if nothing.
        date: The day on which it was taken, or else its file was changed, as `2026-11-26`.
        size: Width and height in pixels, as stored; None if unknown.
    """

    id: int
    path: str
    name: str
    score: float
    probability: float | None
    words: float
    caption: str
    date: str
    size: tuple[int, int] | None

    def record(self) -> dict[str, Any]:
        """What is told of it to programs, but for how it is named."""
        width, height = self.size or (None, None)
        return {
            "score": round(self.score, 4),
            "probability": None if self.probability is None else round(self.probability, 4),
            "words": round(self.words, 4),
            "caption": self.caption,
            "date": self.date,
            "width": width,
            "height": height,
        }


@dataclass(frozen=True, kw_only=True)
class Results:
    """What is known so far.

    Attributes:
        hits: The pictures found, best first.
        found: How many there are, those that are not among `hits` included.
        asked: Pictures that the model has been asked about.
        total: Pictures that it can be asked about.
        seconds: Since the search began.
        done: Whether nothing will change any more.
    """

    hits: tuple[Hit, ...]
    found: int
    asked: int
    total: int
    seconds: float
    done: bool


class Album:
    """A folder's pictures and their index.

        with Album("~/Pictures") as album:
            for results in album.search("a red car", Asker(model, processor, form)):
                print([hit.path for hit in results.hits])

    Args:
        folder: The folder; it need not be there for a search.
        index: The file of the index; None for one in the cache.

    Attributes:
        folder: The folder.
        index: The index.

    Raises:
        ConfigError: If the index cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str], index: Path | None = None) -> None:
        self.folder = os.path.abspath(os.path.expanduser(folder))
        path = index_path(Path(self.folder)) if index is None else index
        self.index = Index(path, os.path.realpath(self.folder), own=index is None)

    def __enter__(self) -> Album:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the index."""
        self.index.close()

    def search(
        self,
        query: str,
        asker: Asker | None = None,
        *,
        top: int | None = None,
        threshold: float = THRESHOLD,
        since: str | None = None,
        seconds: float | None = None,
    ) -> Iterator[Results]:
        """Finds pictures; yields what is known so far again and again: at once what words find, then what asking does.

        The pictures that words find are asked about first.

        Args:
            query: What the pictures should show: any text.
            asker: Asks the model; None looks for words only.
            top: The most hits; None for all.
            threshold: The lowest score of a hit.
            since: Only pictures of this day, such as `2026-11-26`, or later.
            seconds: The search ends after so long, with what is known.

        Raises:
            PromptError: If there is nothing in the query, or too much.
            DamagedIndexError: If the index cannot be read.
        """
        query = check_query(query)
        began = reported = time.monotonic()
        candidates = self.index.candidates("" if asker is None else asker.form, since)
        present = {number for number, _ in candidates}
        found = {number: match for number, match in matches(self.index, query).items() if number in present}
        odds: dict[int, float] = {}

        def results(done: bool) -> Results:
            ranked = [(number, score) for number, score in rank(found, odds) if score >= threshold]
            chosen = ranked if top is None else ranked[:top]
            details = self.index.details([number for number, _ in chosen])
            return Results(
                hits=tuple(
                    self._hit(number, score, odds.get(number), found.get(number), details[number])
                    for number, score in chosen
                    if number in details
                ),
                found=len(ranked),
                asked=len(odds),
                total=total,
                seconds=time.monotonic() - began,
                done=done,
            )

        askable = {number: content for number, content in candidates if content is not None}
        total = len(askable) if asker is not None else 0
        if asker is None or not askable:
            yield results(done=True)
            return
        yield results(done=False)
        order = [number for number in found if number in askable]
        order += [number for number in askable if number not in found]
        inquiry = asker.ask(query)
        known: dict[int, float] = {}
        waiting = list(dict.fromkeys(askable[number] for number in order))
        holders: dict[int, list[int]] = {}
        for number in order:
            holders.setdefault(askable[number], []).append(number)
        batch = _FIRST_BATCH
        while waiting:
            if seconds is not None and time.monotonic() - began >= seconds:
                break
            part, waiting = waiting[:batch], waiting[batch:]
            shown = self.index.visual_tokens(part, asker.form)
            # Other shapes than one are in a damaged index only.
            for shape in {tokens.shape for tokens in shown.values() if tokens.shape[1] == asker.hidden_size}:
                alike = [content for content in part if content in shown and shown[content].shape == shape]
                values = inquiry([shown[content] for content in alike])
                known.update(zip(alike, map(float, values), strict=True))
                batch = inquiry.batch(shape[0])
            for content in part:
                if content in known:
                    odds.update(dict.fromkeys(holders[content], known[content]))
            if waiting and time.monotonic() - reported >= _EVERY:
                reported = time.monotonic()
                yield results(done=False)
        yield results(done=not waiting)

    def hit(self, number: int) -> Hit | None:
        """A picture by its number, as if it was found by nothing; None if there is none."""
        details = self.index.details([number]).get(number)
        return None if details is None else self._hit(number, 0.0, None, None, details)

    def _hit(self, number: int, score: float, odds: float | None, match: Match | None, details: Details) -> Hit:
        return Hit(
            id=number,
            path=os.path.join(self.folder, details.path),
            name=details.path,
            score=score,
            probability=None if odds is None else probability(odds),
            words=0.0 if match is None else match.share,
            caption=details.caption,
            date=details.taken or day(details.modified),
            size=details.size,
        )

    def thumbnail(self, number: int, side: int = 256) -> bytes:
        """A picture, by its number, as a JPEG of at most `side` pixels in width and height; made from the file.

        Raises:
            ImageError: If it is not in the album, has gone, or cannot be read.
        """
        hit = self.hit(number)
        if hit is None:
            raise ImageError(f"picture {number} is not in {printable(self.folder)}")
        image = load_image(Path(hit.path))
        image.thumbnail((side, side))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)
        return file.getvalue()


def checked_threshold(value: float) -> float:
    """A score from 0 to 1.

    Raises:
        ConfigError: If it is none.
    """
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ConfigError(f"threshold must be from 0 to 1, not {value}")
    return value
