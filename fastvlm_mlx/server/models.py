"""Which model is served: `GET /v1/models`, and one of them by its name."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastvlm_mlx import __version__
from fastvlm_mlx.server.api import ApiError, openai_error
from fastvlm_mlx.server.service import Service


def describe_model(service: Service) -> dict[str, Any]:
    """The model as `/v1/models` lists it."""
    settings = service.settings
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": service.name.partition("/")[0] if "/" in service.name else "local",
        "max_model_len": service.max_model_len or None,
        "license": service.license or None,
        "system_fingerprint": service.fingerprint or None,
        "weights": service.weights or None,
        "dtype": service.dtype or None,
        "version": __version__,
        "image_resolution": service.native_resolution or None,
        "default_resolution": settings.resolution or service.native_resolution or None,
        "limits": {
            "max_batch": service.engine.max_batch if service.engine else 0,
            "max_queue": settings.max_queue,
            "max_body_bytes": settings.max_body_bytes,
            "max_tokens": settings.max_tokens,
            "max_resolution": settings.max_resolution,
        },
        "capabilities": {
            "vision": True,
            "streaming": True,
            "tools": False,
            "audio": False,
            "album": service.album is not None,
        },
        "aliases": list(service.aliases),
    }


def routes(service: Service) -> list[Route]:
    """The two addresses; they answer while the model loads, too."""

    async def models(_: Request) -> Response:
        """The list of models, which has one."""
        return JSONResponse({"object": "list", "data": [describe_model(service)]})

    async def model(request: Request) -> Response:
        """One model."""
        try:
            service.check(request.path_params["name"])
        except ApiError as error:
            return JSONResponse(openai_error(error), error.status)
        return JSONResponse(describe_model(service))

    return [Route("/v1/models", models), Route("/v1/models/{name:path}", model)]
