"""The parts of films, animations and PDFs as pictures of a job: which there are, and one after another."""

import os
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING

from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.sources import Encoded, read
from fastvlm_mlx.jobs.pictures import LIVE, Picture, Pictures, Skipped

if TYPE_CHECKING:
    from fastvlm_mlx.inputs.bundles import Bundle
    from fastvlm_mlx.inputs.views import Choice


def with_parts(found: Pictures, choice: "Choice", notify: Callable[[str], None]) -> Pictures:
    """What was found, with the parts of each film, animation and PDF in its place; what cannot be read is unreadable.

    Args:
        found: From `find_pictures`.
        choice: Which parts, where a name does not say.
        notify: Called with what is wrong with a film that can be read in part.
    """
    pictures: list[Picture] = []
    unreadable = list(found.unreadable)
    for picture in found.found:
        if picture.kind in ("", LIVE):
            pictures.append(picture)
            continue
        from fastvlm_mlx.inputs.bundles import open_bundle

        try:
            with open_bundle(picture.path, picture.kind, printable(picture.path), notify=notify) as bundle:
                parts = bundle.parts(choice.wanted, picture.fragment)
        except ImageError as err:
            named = f"{picture.path}{picture.fragment.text if picture.fragment else ''}"
            reason = str(err).removeprefix(f"{printable(named)}: ").removeprefix(f"{printable(picture.path)}: ")
            unreadable.append(Skipped(named, reason))
        else:
            pictures += [picture._replace(part=part) for part in parts if part.fragment] or [picture._replace(kind="")]
    return Pictures(_each_once(pictures), found.skipped, unreadable)


def _each_once(pictures: Iterable[Picture]) -> list[Picture]:
    return list({(picture.root, picture.place): picture for picture in pictures}.values())


class PartReader:
    """Reads the parts of films, animations and PDFs, and what devices show; keeps the last file open.

    Args:
        choice: At which resolution pages are drawn.
        notify: Called with what is wrong with a film that can be read in part.
    """

    def __init__(self, choice: "Choice", notify: Callable[[str], None] | None = None) -> None:
        self._choice, self._notify = choice, notify
        self._path = ""
        self._bundle: Bundle | None = None

    def read(self, picture: Picture) -> Encoded:
        """A part, decoded.

        Raises:
            ImageError: If it cannot be read.
        """
        from fastvlm_mlx.inputs.bundles import open_bundle
        from fastvlm_mlx.inputs.views import views

        if picture.kind == LIVE:
            source: object = next(iter(views(picture.path, self._choice, notify=self._notify))).source
            return source if isinstance(source, Encoded) else read(os.fspath(str(source)))
        assert picture.part is not None
        if self._bundle is None or self._path != picture.path:
            self.close()
            self._bundle = open_bundle(
                picture.path, picture.kind, printable(picture.path), side=self._choice.side, notify=self._notify
            )
            self._path = picture.path
        return self._bundle.picture(picture.part)

    def close(self) -> None:
        """Closes the file."""
        if self._bundle is not None:
            self._bundle.__exit__(None, None, None)
            self._bundle = None

    def __enter__(self) -> "PartReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
