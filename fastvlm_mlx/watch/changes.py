"""Notices when a picture has become another one: cuts, fades, and small things that come or go.

A picture is compared as 32×32 cells of mean colour. The cell that differs most decides, so that a small object counts
as much as a new scene; README.md has the measurements.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

GRID = 32
LEAST_CHANGE = 16.0
"""Levels of 255 that a cell has to change by: above what compression and a clean camera's noise do to one."""
_MOST_NEEDED = 100.0
"""Other scenes differ by more, however restless the picture is."""
_STILL = 8.0
"""Two looks that differ by less show a picture that stands still."""
_MOST_STILL = 40.0
"""More is no stillness, however restless the picture is."""
_ABRUPT = 0.7
"""A cut makes so much of a change between two looks."""
_CALM = 0.5
"""Seconds of stillness that end a change which is no cut."""
_FADE = 0.95
"""During a fade, what differs from the picture before stays the same and only grows: the cosine between two looks."""
_LONGEST_FADE = 6.0
"""Seconds."""
_CUT_SHARE = 0.2
"""The part of the cells that a new scene changes; fewer is something within the same scene."""
_DARK = 16.0
_PLAIN = 8.0
_RECENT = 50
_GAIN = 0.7, 1.4
"""A camera that adapts to the light changes all cells within these factors."""

Signature = NDArray[np.float32]


def sign(pixels: NDArray[np.uint8]) -> Signature:
    """The mean colours of 32×32 cells of a picture (H, W, 3), in about a millisecond."""
    from PIL import Image

    step = max(1, min(pixels.shape[:2]) // (8 * GRID))
    image = Image.fromarray(np.ascontiguousarray(pixels[::step, ::step]))
    return np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX), np.float32)


def is_dark(signature: Signature) -> bool:
    """Whether a picture is black, or nearly, with nothing in it."""
    return bool(signature.mean() < _DARK and np.ptp(signature) < 2 * _PLAIN)


def cell_changes(first: Signature, second: Signature) -> NDArray[np.float32]:
    """How many levels each cell differs by, (32, 32), apart from a change of brightness that is the same everywhere."""
    gain = np.clip((first.mean((0, 1)) + 1) / (second.mean((0, 1)) + 1), *_GAIN)
    changes: NDArray[np.float32] = np.abs(first - second * gain).max(axis=2)
    return changes


def distance(first: Signature, second: Signature) -> float:
    """How many levels the cell that differs most differs by."""
    return float(cell_changes(first, second).max())


def _mean_change(first: Signature, second: Signature) -> float:
    """The mean of what all cells differ by, which grows evenly during a fade."""
    return float(np.abs(first - second).mean())


class Look(NamedTuple):
    """What one look at the picture gave.

    Attributes:
        time: Of the frame.
        signature: Of the frame.
        change: Levels by which it differs from the picture that was accepted last.
        changed: Whether that is another picture.
        settled: Whether the picture stands still.
        ready: Whether it is time to describe it: it has changed, and settled or been restless for long.
        cut: Whether another scene is there, rather than a change within the scene.
        since: When the picture was first seen to differ, if it does.
    """

    time: float
    signature: Signature
    change: float
    changed: bool
    settled: bool
    ready: bool
    cut: bool
    since: float


class Scenes:
    """Follows a picture from look to look.

    What a cell has to change by adapts itself to how restless the picture is: sensor noise, compression, a hand that
    shakes. A change has settled when the picture stands still: after a cut with the next look, after a fade when
    nothing has moved for half a second. A picture that never stands still is accepted as it is after some patience.

    Args:
        least: Levels of 255 that a cell has to change by at least.
        patience: Seconds that a picture may move, apart from a fade.
    """

    def __init__(self, least: float = LEAST_CHANGE, patience: float = 1.0) -> None:
        self._least = least
        self._patience = patience
        self._anchor: Signature | None = None
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._recent: deque[tuple[float, Signature]] = deque()
        self._trail: deque[tuple[float, Signature]] = deque(maxlen=1000)
        self._before: Signature | None = None
        self._moved = -math.inf
        self._abrupt = self._stood = True
        self._since = 0.0

    def look(self, time: float, signature: Signature) -> Look:
        """Compares a frame with those before it."""
        noise = float(np.percentile(self._steps, 30)) if self._steps else 0.0
        still = min(max(_STILL, 2.5 * noise), _MOST_STILL)
        needed = min(max(self._least, 4 * noise), max(self._least, _MOST_NEEDED))
        dark = is_dark(signature)
        settled = self._settle(time, signature, still) or dark
        if self._anchor is None:
            change, changed, share = 255.0, True, 1.0
        else:
            changes = cell_changes(self._anchor, signature)
            change = float(changes.max())
            changed = change > needed and not (dark and is_dark(self._anchor))
            share = float((changes > needed).mean())
        if not changed:
            self._trail.clear()
        elif not self._trail:
            self._since = time
        ready = False
        if changed:
            self._trail.append((time, signature))
            lasted = time - self._since
            patience = self._patience + (_LONGEST_FADE if self._fades(signature) else 0)
            ready = settled or lasted >= patience
        return Look(time, signature, change, changed, settled, ready, share >= _CUT_SHARE, self._since)

    def _fades(self, signature: Signature) -> bool:
        """Whether the picture is on its way from one to another without anything that moves in it."""
        if self._anchor is None:
            return False
        now, earlier = ((each - self._anchor).ravel() for each in (signature, self._trail[len(self._trail) // 2][1]))
        product = float(np.linalg.norm(now) * np.linalg.norm(earlier))
        return product > 0 and float(now @ earlier) >= _FADE * product

    def _settle(self, time: float, signature: Signature, still: float) -> bool:
        """Whether the picture stands still now."""
        if not self._recent:
            self._recent.append((time, signature))
            self._before, self._moved = signature, time
            return False
        step = distance(self._recent[-1][1], signature)
        self._steps.append(step)
        if step > still:
            start = self._recent[0][1] if self._before is None else self._before
            self._abrupt = step >= _ABRUPT * distance(start, signature)
            self._before, self._moved = start, time
            self._recent.clear()
        self._recent.append((time, signature))
        while time - self._recent[0][0] > _CALM:
            self._recent.popleft()
        calm = self._abrupt or time - self._moved >= _CALM
        if step > still or not calm or distance(self._recent[0][1], signature) > still:
            return False
        self._before = None
        return True

    def accept(self, look: Look) -> tuple[float, float]:
        """Takes the picture of a look as the one to compare with.

        Returns when the one before had gone and when this one was there: in the middle of a fade from one to the other.
        What moves all the time is there from the look on, and holds until the next picture is there.
        """
        trail, before, stood = list(self._trail), self._anchor, self._stood
        self._anchor, self._stood = look.signature, look.settled
        self._trail.clear()
        if not trail:
            return look.time, look.time
        if before is None:
            return trail[0][0], trail[0][0]
        if not look.settled:
            return trail[0][0] if stood else look.time, look.time
        half = _mean_change(before, look.signature) / 2
        gone = next((time for time, each in trail if _mean_change(before, each) > half), look.time)
        came = trail[0][0]
        for time, each in reversed(trail):
            if _mean_change(look.signature, each) > half:
                break
            came = time
        return min(gone, came) if stood else came, came
