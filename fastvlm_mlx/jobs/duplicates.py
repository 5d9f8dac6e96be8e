"""Finds pictures that occur more than once, by content."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def find_duplicates(paths: Iterable[str]) -> dict[str, str]:
    """Returns for each file whose content occurred before the first file with it.

    Only files of equal size are read. Those that cannot be read have no duplicates.
    """
    sizes: dict[int, list[str]] = defaultdict(list)
    for path in paths:
        try:
            sizes[os.stat(path).st_size].append(path)
        except (OSError, ValueError):
            continue
    first: dict[bytes, str] = {}
    duplicates = {}
    for group in sizes.values():
        for path in group if len(group) > 1 else ():
            digest = _digest(path)
            if digest is not None and first.setdefault(digest, path) != path:
                duplicates[path] = first[digest]
    return duplicates


def pixels_digest(image: "Image") -> str:
    """Returns the SHA-256 of an image's size and pixels: equal for pictures that look the same to a model."""
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def _digest(path: str) -> bytes | None:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:
        return None
    return digest.digest()
