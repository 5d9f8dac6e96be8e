"""What a command line names as images and prompt: stdin, names, `data:` URLs."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import typer

from fastvlm_mlx.errors import ImageError, PromptError
from fastvlm_mlx.formatting import printable

_Loaded = TypeVar("_Loaded")


def read_stdin(images: list[str], prompt: str) -> tuple[list[str | bytes], str]:
    """The images and the prompt with `-` replaced by what stdin holds; only one of them can have it."""
    if images.count("-") + (prompt == "-") > 1:
        raise typer.BadParameter("- can stand for one image or for the prompt, once", param_hint="IMAGE")
    sources = [_stdin() if name == "-" else name for name in images]
    if prompt != "-":
        return sources, prompt
    try:
        return sources, _stdin().decode("utf-8-sig").strip()
    except UnicodeDecodeError as err:
        raise PromptError(
            f"stdin: byte {err.object[err.start]:#x} at {err.start} is not UTF-8; the prompt has to be text in UTF-8"
        ) from err


def _stdin() -> bytes:
    """All of stdin.

    Raises:
        PromptError: If there is nothing, or it cannot be read.
    """
    try:
        data = sys.stdin.buffer.read()
    except OSError as err:
        raise PromptError(f"stdin: cannot be read ({err.strerror or err})") from err
    if not data:
        raise PromptError("stdin was empty; pipe an image or a prompt into it")
    return data


def load_named(load_image: Callable[[Any], _Loaded], source: Any, *, has_prompt: bool) -> _Loaded:
    """An image; the error of one that looks like a question says how to ask it.

    Raises:
        ImageError: If it cannot be read or is not an image.
    """
    try:
        return load_image(source)
    except ImageError as err:
        missing = isinstance(err.__cause__, FileNotFoundError)
        if missing and not has_prompt and isinstance(source, str) and {" ", "?"} & set(source):
            raise ImageError(f"{err}; if it is the question, put --prompt before it") from err
        raise


def shortened(name: str) -> str:
    """The name of an image without the content of a `data:` URL."""
    head, comma, content = name.partition(",")
    is_data = comma and head[:5].lower() == "data:"
    return f"{printable(head)},… ({len(content)} characters)" if is_data else name
