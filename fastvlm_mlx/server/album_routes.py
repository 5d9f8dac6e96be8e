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
from fastvlm_mlx.errors import ImageError
from fastvlm_mlx.schema import parse_object
from fastvlm_mlx.server.album import ServedAlbum
from fastvlm_mlx.server.api import ApiError, Context, openai_error
from fastvlm_mlx.server.exchange import Disconnected, Reply, read_body, refusing
from fastvlm_mlx.server.fields import Fields
from fastvlm_mlx.server.guard import log_error
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
_MOST_NUMBER = 2**63 - 1

log = logging.getLogger(__name__)


def routes(service: Service, settings: Settings) -> list[Route]:
    """The addresses of the album; none without one."""
    if service.album is None:
        return []
    album = service.album
    readers = asyncio.Semaphore(MOST_READERS)

    async def status(_: Request) -> Response:
        """What the index holds, and how far it is."""
        return JSONResponse(await service.in_thread(album.status))

    def picture(path: str) -> Route:
        async def send(request: Request) -> Response:
            """A picture of the index, as a JPEG without metadata."""
            number = request.path_params["number"]
            try:
                if not (number.isascii() and number.isdecimal() and len(number) < 20 and int(number) <= _MOST_NUMBER):
                    raise ImageError("there is no such picture in the album")
                async with readers:
                    data = await service.in_thread(album.album.thumbnail, int(number), SIDES[path])
            except ImageError as err:
                refusal = ApiError(404, str(err), code="not_found")
                log_error(request.scope, refusal)
                return JSONResponse(openai_error(refusal), 404)
            return Response(data, media_type="image/jpeg")

        return Route(path, send)

    return [
        Route(STATUS, status),
        Route(SEARCH, Search(album, service, settings), methods=["POST"]),
        picture(THUMBNAIL),
        picture(PICTURE),
    ]


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
        while (results := await self._service.in_thread(next, found, None)) is not None:
            if gone.done():
                raise Disconnected
            await reply.part(_line(_record(results)), LINES)
            if self._service.state == "stopping":
                raise self._service.unavailable()
        await reply.end()


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
