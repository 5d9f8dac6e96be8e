"""The page at `/`: one HTML file that speaks to this server alone, and the headers that hold it to that."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import Response

if TYPE_CHECKING:
    from starlette.requests import Request

_HTML = Path(__file__).with_name("page.html")
_SAMPLES = Path(__file__).parent.parent / "demo_model"


@dataclass(frozen=True, kw_only=True)
class Page:
    """What is sent.

    Attributes:
        html: The document.
        headers: What a browser may do with it, beside the headers that `guard` gives every answer.
    """

    html: bytes
    headers: dict[str, str]


@functools.cache
def render() -> Page:
    """Returns the page with the demo's sample pictures in it, and a policy that allows its own scripts and styles only.

    The policy names both by their hashes, so that nothing that gets into the document could run. The page may connect
    to its own origin and to no other.
    """
    html = re.sub(r"\{\{(sample-\d\.png)\}\}", lambda match: _data_url(match[1]), _HTML.read_text(encoding="utf-8"))
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hashes(html, 'script')}",
            f"style-src {_hashes(html, 'style')}",
            "connect-src 'self'",
            "img-src 'self' blob: data:",
            "media-src blob:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
    headers = {
        "content-security-policy": policy,
        "permissions-policy": "camera=(self), microphone=(), geolocation=()",
        "cross-origin-opener-policy": "same-origin",
    }
    return Page(html=html.encode(), headers=headers)


async def page(request: Request) -> Response:
    """Answers `GET /`."""
    rendered = render()
    return Response(rendered.html, headers=rendered.headers, media_type="text/html")


def _data_url(name: str) -> str:
    return f"data:image/png;base64,{base64.b64encode((_SAMPLES / name).read_bytes()).decode()}"


def _hashes(html: str, tag: str) -> str:
    """The sources of a policy that allow each `<script>` or `<style>` of the document, by its text."""
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)
