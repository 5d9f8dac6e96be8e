"""What is tried: the public functions and commands, and how their results and messages are judged."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from fastvlm_mlx import FastVLM, FastVLMError, FastVLMProcessor, generate
from fastvlm_mlx.backend import mx
from fastvlm_mlx.checkpoint.folder import is_complete
from fastvlm_mlx.cli.app import app
from fastvlm_mlx.convert import convert_checkpoint
from fastvlm_mlx.inputs.images import load_image, preprocess
from fastvlm_mlx.resolve import load

MESSAGE_LENGTH = 1000
"""Characters that a message may have: a few names of at most 200 each and a sentence about them."""

PICTURE = np.arange(64 * 48 * 3, dtype=np.uint8).reshape(48, 64, 3)


class Wrong(Exception):
    """A result that is not right, with the reason."""


class Refused(Exception):
    """A command that ended with an error or a usage error, with its message."""


def check_message(text: str) -> None:
    """Raises `Wrong` for what is not one short printable line."""
    if not text.strip():
        raise Wrong("message: it is empty")
    if not text.isprintable():
        raise Wrong(f"message: not one printable line: {text[:300]!r}")
    if len(text) > MESSAGE_LENGTH:
        raise Wrong(f"message: {len(text)} characters: {text[:200]!r}")


def check_error(error: FastVLMError) -> None:
    """Raises `Wrong` for an error that is not a child of FastVLMError with a good message."""
    if type(error) is FastVLMError:
        raise Wrong(f"message: not a child of FastVLMError: {str(error)[:300]!r}")
    check_message(str(error))


def ask(loaded: tuple[FastVLM, FastVLMProcessor], resolution: int = 64) -> str:
    """A short answer of a model about a picture; raises `Wrong` if a logit is not finite."""
    model, processor = loaded
    answer = generate(model, processor, image=PICTURE, prompt="What is it?", max_tokens=2, resolution=resolution)
    logits, _ = model.prefill(**processor(PICTURE, "What is it?", resolution=resolution))
    if not np.isfinite(np.array(logits.astype(mx.float32))).all():
        raise Wrong("not finite: an answer was given although a logit is no number")
    return answer.text


def usable(folder: Path) -> None:
    """Raises `Wrong` if a folder that was just written cannot be loaded."""
    try:
        loaded = load(folder)
    except FastVLMError as error:
        raise Wrong(f"unusable: written without an error, but: {str(error)[:300]!r}") from error
    ask(loaded)


def command(arguments: Sequence[str], stdin: bytes = b"") -> str:
    """The standard output of a command that ends well.

    Raises:
        Refused: If it ends with an error of its user.
        Wrong: If the exit code and what it writes do not agree.
    """
    result = CliRunner().invoke(app, list(arguments), input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    lines, code = result.stderr.splitlines(), result.exit_code
    for line in lines:
        check_message(line)
    errors = [line for line in lines if line.startswith("error: ")]
    if code in (0, 3):
        if code == 0 and errors:
            raise Wrong(f"command: exit code 0 with {errors[0][:300]!r}")
        return result.stdout
    if code not in (1, 2) or len(errors) != 1 or lines[-1] != errors[0]:
        raise Wrong(f"command: exit code {code} with {result.stderr[-300:]!r}")
    raise Refused(lines[-1])


def look_at(source: Any, **options: Any) -> None:
    """Loads and prepares an image; raises `Wrong` if the result is not RGB of the size that its file has."""
    image = load_image(source, **options)
    width, height = image.size
    if image.mode != "RGB" or not width or not height:
        raise Wrong(f"picture: {image.mode}, {image.size}")
    if isinstance(source, bytes) and (size := _stated_size(source)) not in (image.size, image.size[::-1], None):
        raise Wrong(f"picture: its header says {size}, the result has {image.size}")
    if max(width, height) <= 20_000:
        pixels = preprocess(image, 64)
        if pixels.shape != (64, 64, 3) or pixels.dtype != np.uint8:
            raise Wrong(f"picture: prepared as {pixels.dtype} {pixels.shape}")


def _stated_size(data: bytes) -> tuple[int, int] | None:
    """The size in the header of a file; None if Pillow refuses the file itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Image.open(io.BytesIO(data)).size
        except (OSError, ValueError):
            return None


__all__ = [
    "PICTURE",
    "FastVLM",
    "FastVLMError",
    "FastVLMProcessor",
    "Refused",
    "Wrong",
    "app",
    "ask",
    "check_error",
    "check_message",
    "command",
    "convert_checkpoint",
    "is_complete",
    "load",
    "look_at",
    "usable",
]
