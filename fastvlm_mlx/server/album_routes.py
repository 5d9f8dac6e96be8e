"""The search of an album over HTTP: `/album`, `/album/search`, and the pictures of its index alone."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fastvlm_mlx.album.album import THRESHOLD, Hit, Results
from fastvlm_mlx.album.asking import Asker, check_query
from fastvlm_mlx.errors import ConfigError, ImageError
from fastvlm_mlx.schema import parse_object
from fastvlm_mlx.server.album import REPAIR_SECONDS, ServedAlbum
from fastvlm_mlx.server.api import ApiError, Context, openai_error
from fastvlm_mlx.server.exchange import Disconnected, Reply, read_body, refusing
from fastvlm_mlx.server.fields import Fields
from fastvlm_mlx.server.service import Service
from fastvlm_mlx.server.settings import Settings

STATUS, SEARCH = "/album", "/album/search"
THUMBNAIL, PICTURE = "/album/thumbnails/{number}", "/album/pictures/{number}"
LINES = "application/x-ndjson"
SIDES = {THUMBNAIL: 320, PICTURE: 1536}
"""Pixels of the longer side of what is sent."""
MOST_HITS = 500
USUAL_HITS = 100
MOST_SEARCHES = 2
"""At the same time."""
MOST_READERS = 4
"""Pictures that are made smaller at the same time; one may take 300 MB."""
MOST_WAITING = 256
"""Pictures that clients wait for at the same time; a browser waits for six."""
_MOST_NUMBER = 2**63 - 1

log = logging.getLogger(__name__)


def routes(service: Service, settings: Settings) -> list[Route]:
    """The addresses of the album; none without one."""
    if service.album is None:
        return []
    album, pictures = service.album, Pictures(service.album, service)

    async def status(_: Request) -> Response:
        """What the index holds, and how far it is."""
        return JSONResponse(await service.in_thread(album.status))

    def picture(path: str) -> Route:
        async def send(request: Request) -> Response:
            """A picture of the index, as a JPEG without metadata."""
            data = await pictures.jpeg(request.path_params["number"], SIDES[path])
            return Response(data, media_type="image/jpeg")

        return Route(path, send)

    return [
        Route(STATUS, status),
        Route(SEARCH, Search(album, service, settings), methods=["POST"]),
        picture(THUMBNAIL),
        picture(PICTURE),
    ]


class Pictures:
    """The pictures of an album's index, made smaller: a few at a time, while others wait.

    Args:
        album: What is shown.
        service: The model, whose threads read pictures.
    """

    def __init__(self, album: ServedAlbum, service: Service) -> None:
        self._album = album
        self._service = service
        self._readers = asyncio.Semaphore(MOST_READERS)
        self._waiting = 0

    async def jpeg(self, number: str, side: int) -> bytes:
        """A picture as a JPEG.

        Raises:
            ApiError: If there is none of this number, too many are waited for, or the index cannot be read.
        """
        if not (number.isascii() and number.isdecimal() and len(number) < 20 and int(number) <= _MOST_NUMBER):
            raise ApiError(404, "there is no such picture in the album", code="not_found")
        if self._waiting >= MOST_WAITING:
            raise self._service.full(f"{MOST_WAITING} pictures are on their way")
        self._waiting += 1
        try:
            async with self._readers:
                return await self._service.in_thread(self._album.album.thumbnail, int(number), side)
        except ImageError as err:  # its message has the path of the folder
            log.info("album: %s", err)
            raise ApiError(
                404, f"picture {number} is not in the album, has gone, or cannot be read", code="not_found"
            ) from err
        except ConfigError as err:
            raise unavailable(self._album, err) from err
        finally:
            self._waiting -= 1


def unavailable(album: ServedAlbum, error: ConfigError) -> ApiError:
    """The error for whoever needs an index that cannot be read, which is then made anew."""
    album.notice(error)
    message = "the index of the album cannot be read; ask again when it has been made anew"
    return ApiError(503, message, kind="server_error", code="unavailable", retry_after=REPAIR_SECONDS)


class Search:
    """Answers searches with what is known so far, line by line; an ASGI application.

    Args:
        album: What is searched.
        service: The model.
        settings: What is allowed.
    """

    def __init__(self, album: ServedAlbum, service: Service, settings: Settings) -> None:
        self._album = album
        self._service = service
        self._settings = settings
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        reply = Reply(send, self._settings.send_seconds, Context.of(self._service, self._settings))
        async with refusing(scope, reply, body=openai_error, broken=_broken, media_type=LINES):
            await self._answer(receive, reply)

    async def _answer(self, receive: Receive, reply: Reply) -> None:
        fields = Fields(parse_object(await read_body(receive), "the request", error=_unreadable, advice=""))
        query = check_query(fields.text("query") or "")
        options = {
            "top": fields.whole("top", USUAL_HITS, least=1, most=MOST_HITS),
            "threshold": fields.number("threshold", THRESHOLD, least=0, most=1),
            "since": _day(fields),
            "seconds": self._settings.answer_seconds,
        }
        asks = not fields.flag("words")
        reply.warnings = fields.unknown()
        if asks:
            self._service.check_ready(0)
        if self._running >= MOST_SEARCHES:
            raise self._service.full(f"{MOST_SEARCHES} searches are on their way")
        self._running += 1
        gone = asyncio.create_task(_gone(receive))
        try:
            with self._album.asking() as asker:
                await self._send(query, asker if asks else None, options, reply, gone)
        finally:
            self._running -= 1
            gone.cancel()

    async def _send(
        self, query: str, asker: Asker | None, options: Mapping[str, Any], reply: Reply, gone: asyncio.Task[None]
    ) -> None:
        found: Iterator[Results] = self._album.album.search(query, asker, **options)
        while (results := await self._next(found)) is not None:
            if gone.done():
                raise Disconnected
            await reply.part(_line(_record(results)), LINES)
            if self._service.state == "stopping":
                raise self._service.unavailable()
        await reply.end()

    async def _next(self, found: Iterator[Results]) -> Results | None:
        """The next results; None if there are no more."""
        try:
            return await self._service.in_thread(next, found, None)
        except ConfigError as err:
            raise unavailable(self._album, err) from err


async def _gone(receive: Receive) -> None:
    """Waits until the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _unreadable(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")


def _day(fields: Fields) -> str | None:
    """The first day whose pictures count."""
    text = fields.text("since")
    if text is None:
        return None
    try:
        time.strptime(text, "%Y-%m-%d")
    except ValueError as err:
        raise fields.wrong("since", "a day such as 2026-11-26") from err
    return text


def _record(results: Results) -> dict[str, Any]:
    return {
        "hits": [_hit(hit) for hit in results.hits],
        "found": results.found,
        "asked": results.asked,
        "total": results.total,
        "seconds": round(results.seconds, 3),
        "done": results.done,
    }


def _hit(hit: Hit) -> dict[str, Any]:
    """A picture that was found; where the folder is, is not said."""
    return {"id": hit.id, "name": hit.name.encode("utf-8", "replace").decode(), **hit.record()}


def _broken(error: ApiError) -> bytes:
    """The end of a stream that an error ends."""
    return _line(openai_error(error))


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
