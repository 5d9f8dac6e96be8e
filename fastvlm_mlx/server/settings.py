"""What a server allows, and where it listens."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.resolution import Resolution

DEFAULT_PORT = 8000
LOW_RESOLUTION = 512
"""Pixels per side of an image with `detail: low`, 64 visual tokens."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server allows, and where it listens.

    Attributes:
        host: The address that it listens on.
        port: The port; 0 takes a free one.
        unix_socket: A socket file to listen on, instead of an address.
        api_keys: Keys of which a request must have one; without any, none is needed.
        no_auth: Whether any host may be listened on without a key.
        allowed_hosts: What the Host header may name beside the address itself; `*` allows every host.
        allow_origins: Web pages that may use the server, by origin; `*` allows all.
        allow_image_urls: Whether http and https URLs of images are fetched, of public hosts only.
        media_root: The folder below which images may be named by path; None allows no path.
        max_body_bytes: The most bytes of a request.
        max_pixels: The most pixels of an image.
        max_images: The most images of a request.
        max_resolution: The most pixels per side that a request may ask for; twice as many take four times the memory.
        max_tokens: The longest answer, also where a request sets no limit.
        max_choices: The most answers to one request.
        max_queue: The most requests that wait behind those being answered.
        max_queue_bytes: The most bytes of all requests that are being read, wait or are answered.
        max_connections: The most connections; a new one ends the one that has been idle for the longest time.
        head_seconds: Within which the headers of a request must have arrived.
        body_seconds: Within which its body must.
        queue_seconds: That a request may wait for its first token.
        answer_seconds: After which an answer is cut.
        send_seconds: That a client may take for a part of its answer.
        drain_seconds: That answers may go on after the server was told to stop.
        resolution: Pixels per side that images are resized to where a request does not say; None for the model's own.
        temperature: Where a request gives none.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    unix_socket: Path | None = None
    api_keys: tuple[str, ...] = ()
    no_auth: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    allow_image_urls: bool = False
    media_root: Path | None = None
    max_body_bytes: int = 32_000_000
    max_pixels: int = 100_000_000
    max_images: int = 16
    max_resolution: int = 1536
    max_tokens: int = 2048
    max_choices: int = 16
    max_queue: int = 64
    max_queue_bytes: int = 256_000_000
    max_connections: int = 512
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    queue_seconds: float = 120.0
    answer_seconds: float = 600.0
    send_seconds: float = 60.0
    drain_seconds: float = 30.0
    resolution: Resolution = None
    temperature: float = 0.0

    def __post_init__(self) -> None:
        """Refuses what would open the server without saying so, and what cannot be."""
        if self.unix_socket is None and not (self.api_keys or self.no_auth or is_loopback(self.host)):
            raise ConfigError(
                f"--host {printable(self.host)} can be reached by others: give a key with --api-key-file or "
                "FASTVLM_API_KEY, or say --no-auth"
            )
        if self.media_root is not None and not self.media_root.is_dir():
            raise ConfigError(f"--media-root {printable(self.media_root)}: no such folder")
        if self.max_queue_bytes < self.max_body_bytes:
            raise ConfigError("--max-queue-body must be at least --max-body, or no request would fit")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's own loopback address, which no other machine can reach."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
