"""What Ollama's clients ask about the model: `/api/tags`, `/api/show`, `/api/version` and `/api/ps`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastvlm_mlx import __version__
from fastvlm_mlx.generation.result import GenerationResult
from fastvlm_mlx.inputs.prompts import CHAT_TEMPLATE
from fastvlm_mlx.server.api import Context, Known, Question
from fastvlm_mlx.server.fields import Fields
from fastvlm_mlx.server.ollama import Ollama
from fastvlm_mlx.server.service import Service

API_VERSION = "0.12.11"
"""The release of Ollama whose API is spoken here; clients decide by it what they may ask for."""
_FAMILY = "fastvlm"
_FOREVER = timedelta(days=36500)


class Show(Ollama, Known):
    """One model by its name: `POST /api/show`."""

    path = "/api/show"

    def read(self, body: Mapping[str, Any], context: Context) -> Question:
        """The question, which needs no answer of the model."""
        fields = Fields(body)
        model = fields.text("model") or fields.text("name")
        if not model:
            raise fields.wrong("model", "the model's name")
        context.service.check(model)
        fields.ignore("name", "verbose")
        return Question(requests=(), model=model, warnings=fields.unknown())

    def whole(self, question: Question, results: Sequence[GenerationResult], context: Context) -> dict[str, Any]:
        """The body of the answer."""
        service = context.service
        return {
            "license": service.license,
            "modelfile": f"FROM {service.name}\n",
            "parameters": f"temperature {service.settings.temperature:g}",
            "template": CHAT_TEMPLATE,
            "details": _details(service),
            "model_info": {
                "general.architecture": _FAMILY,
                "general.basename": service.name,
                "general.parameter_count": service.parameters,
                f"{_FAMILY}.context_length": service.max_model_len,
                f"{_FAMILY}.vision.image_size": service.native_resolution,
            },
            "capabilities": ["completion", "vision"],
            "modified_at": _time(service),
        }


def routes(service: Service) -> list[Route]:
    """The addresses that are asked by GET; they answer while the model loads, too."""

    async def tags(_: Request) -> Response:
        """The list of models, which has one."""
        return JSONResponse({"models": [_entry(service)]})

    async def running(_: Request) -> Response:
        """The models in memory."""
        memory = {
            "expires_at": _time(service, _FOREVER),
            "size_vram": service.size_bytes,
            "context_length": service.max_model_len,
        }
        return JSONResponse({"models": [{**_entry(service), **memory}] if service.state == "ready" else []})

    async def version(_: Request) -> Response:
        """Ollama's version that this server compares to, and its own."""
        return JSONResponse({"version": API_VERSION, "fastvlm_mlx": __version__})

    return [Route("/api/tags", tags), Route("/api/ps", running), Route("/api/version", version)]


def _entry(service: Service) -> dict[str, Any]:
    tag = service.name if ":" in service.name else f"{service.name}:latest"
    return {
        "name": tag,
        "model": tag,
        "modified_at": _time(service),
        "size": service.size_bytes,
        "digest": hashlib.sha256(f"{service.name} {service.fingerprint}".encode()).hexdigest(),
        "details": _details(service),
    }


def _details(service: Service) -> dict[str, Any]:
    bits = 8 * service.size_bytes / service.parameters if service.parameters else 0
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": _FAMILY,
        "families": [_FAMILY],
        "parameter_size": f"{service.parameters / 1e6:.1f}M",
        "quantization_level": f"F{bits:.0f}" if bits > 15 else f"Q{bits:.0f}",
    }


def _time(service: Service, later: timedelta = timedelta()) -> str:
    moment = datetime.fromtimestamp(service.created, timezone.utc) + later
    return moment.isoformat().replace("+00:00", "Z")
