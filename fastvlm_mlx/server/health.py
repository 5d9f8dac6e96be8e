"""How the server is: `GET /health`, `GET /ready` and `GET /metrics`. None waits for the engine."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastvlm_mlx.server.metrics import MEDIA_TYPE
from fastvlm_mlx.server.service import Service


def routes(service: Service) -> list[Route]:
    """The three addresses."""

    async def health(_: Request) -> Response:
        """200 while the process and the engine's thread live, the model loading included; otherwise 503."""
        engine = service.engine
        step = engine.step_seconds if engine else 0.0
        status = "ok" if service.is_healthy else "failed"
        body = {"status": status, "state": service.state, "step_seconds": round(step, 3), "requests": service.running}
        return JSONResponse(body, 200 if service.is_healthy else 503)

    async def ready(_: Request) -> Response:
        """200 while questions are answered; otherwise 503."""
        is_ready = service.state == "ready" and service.is_healthy
        body = {"ready": is_ready, "state": service.state, "detail": service.activity}
        return JSONResponse(body, 200 if is_ready else 503)

    async def metrics(_: Request) -> Response:
        """What Prometheus reads."""
        return Response(service.metrics.render(), media_type=MEDIA_TYPE)

    return [Route("/health", health), Route("/ready", ready), Route("/metrics", metrics)]
