"""What is served where: the table of addresses, as an ASGI application."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from email.utils import formatdate
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastvlm_mlx import __version__
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.server import album_routes, health, models, ollama_models, openapi
from fastvlm_mlx.server.anthropic import CountTokens, Messages
from fastvlm_mlx.server.api import Api, ApiError, openai_error
from fastvlm_mlx.server.exchange import Exchange, error_headers
from fastvlm_mlx.server.guard import Guard, log_error
from fastvlm_mlx.server.ollama import Chat, Generate, Ollama
from fastvlm_mlx.server.ollama_models import Show
from fastvlm_mlx.server.openai_chat import ChatCompletions
from fastvlm_mlx.server.openai_responses import Responses
from fastvlm_mlx.server.page import page
from fastvlm_mlx.server.service import Service
from fastvlm_mlx.server.settings import Settings

SERVER = f"fastvlm-mlx/{__version__}".encode()
APIS: tuple[Api, ...] = (
    ChatCompletions(),
    Responses(),
    Messages(),
    CountTokens(),
    Generate(),
    Chat(),
    Show(),
)
SHAPES = {"/api/": Ollama().error, Messages.path: Messages().error}
"""The shapes of errors by the beginnings of addresses; OpenAI's is that of all others."""


def make_app(service: Service, settings: Settings) -> ASGIApp:
    """The ASGI application that serves a model.

    Args:
        service: The model; it may still be loading.
        settings: What is allowed.
    """
    app = Starlette(
        routes=_routes(service, settings),
        exception_handlers={
            HTTPException: partial(_http_error, service),
            ApiError: partial(_refuse, service),
            500: _bug,
        },
    )
    app.router.redirect_slashes = False
    guarded = Guard(app, settings, error=error_body, metrics=service.metrics, retry_after=service.retry_after)
    return Dated(guarded)


class Dated:
    """Adds the headers that HTTP wants of every server.

    Args:
        app: The application that answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""

        async def send_dated(message: Message) -> None:
            if message["type"] == "http.response.start":
                date = formatdate(usegmt=True).encode()
                message["headers"] = [*message["headers"], (b"date", date), (b"server", SERVER)]
            await send(message)

        await self._app(scope, receive, send_dated)


def _routes(service: Service, settings: Settings) -> Sequence[BaseRoute]:
    table = [
        *(Route(api.path, Exchange(api, service, settings), methods=["POST"]) for api in APIS),
        *models.routes(service),
        *ollama_models.routes(service),
        *health.routes(service),
        *album_routes.routes(service, settings),
        Route("/", page),
    ]
    return [*table, openapi.route(settings, [route.path for route in table], service.name)]


def error_body(path: str, error: ApiError) -> Mapping[str, Any]:
    """An error in the shape of the API that a path belongs to."""
    for prefix, shape in SHAPES.items():
        if path.startswith(prefix):
            return shape(error)
    return openai_error(error)


async def _http_error(service: Service, request: Request, error: Exception) -> Response:
    """Answers what no address takes."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    codes = {404: "not_found", 405: "method_not_allowed"}
    messages = {
        404: f"there is nothing at {printable(path)}; /openapi.json lists what there is",
        405: f"{printable(path)} does not take {printable(request.method)}",
    }
    status = error.status_code
    refusal = ApiError(status, messages.get(status, str(error.detail)), code=codes.get(status, "refused"))
    response = await _refuse(service, request, refusal)
    response.headers.update(error.headers or {})
    return response


async def _refuse(service: Service, request: Request, error: Exception) -> Response:
    """Answers with an error, in the shape of the API that was asked."""
    assert isinstance(error, ApiError)
    log_error(request.scope, error)
    service.metrics.refused(str(error.code))
    return JSONResponse(error_body(request.scope["path"], error), error.status, headers=error_headers(error))


async def _bug(request: Request, error: Exception) -> Response:
    """Answers what must not happen; the log has the traceback."""
    bug = ApiError(500, f"{type(error).__name__} in the server; its log says where", kind="server_error", code="bug")
    return JSONResponse(error_body(request.scope["path"], bug), 500)
