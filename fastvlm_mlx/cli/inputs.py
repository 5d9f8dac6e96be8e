"""What a command line names as images and prompt: stdin, names, `data:` URLs."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from fastvlm_mlx.cli.terminal import note
from fastvlm_mlx.errors import FastVLMError, ImageError, PromptError
from fastvlm_mlx.formatting import printable

if TYPE_CHECKING:
    from fastvlm_mlx.inputs.resolution import Resolution

ANY_OBJECT = "json"
"""Stands for a schema that any JSON object fulfils."""

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


def read_schema(name: str) -> Any:
    """The JSON schema that a file holds, or `ANY_OBJECT`; one that answers can be made to follow.

    Raises:
        typer.BadParameter: If it cannot be read, or is no such schema.
    """
    from fastvlm_mlx.cli.options import user_path
    from fastvlm_mlx.schema import LARGEST_JSON, parse_object, read_small_file
    from fastvlm_mlx.structured.schemas import Schema

    schema: Any = name
    try:
        if name != ANY_OBJECT:
            data = read_small_file(user_path(name), LARGEST_JSON)
            if data is None:
                raise typer.BadParameter(f"{printable(name)}: no such file", param_hint="--schema")
            schema = parse_object(data, printable(name), unique=True)
        Schema.of(schema)
    except FastVLMError as err:
        raise typer.BadParameter(str(err).removesuffix("; fetch it again"), param_hint="--schema") from err
    return schema


def expand(sources: list[Any], *, frames: int | None, resolution: "Resolution") -> list[tuple[Any, str]]:
    """The pictures that sources stand for, and their names: several for a film or a PDF, and what a device shows now.

    The name of a frame or page says which one it is.

    Args:
        sources: Names, or the bytes of stdin.
        frames: Of a film or an animation; None is the default.
        resolution: At which the model will look.

    Raises:
        ImageError: If one that holds several pictures cannot be read, or is a device that shows nothing.
    """
    from fastvlm_mlx.inputs.named import is_plain, meant

    found: list[tuple[Any, str]] = []
    for source in sources:
        name = "<stdin>" if isinstance(source, bytes) else shortened(source)
        if is_plain(source, animations=frames is not None):
            if isinstance(source, str) and (near := meant(source)):
                raise ImageError(f"{printable(source)}: no such source; did you mean {printable(near)}?")
            found.append((source, name))
            continue
        from fastvlm_mlx.inputs.views import MOST_TOGETHER, Choice, views

        side = resolution if isinstance(resolution, int) else None
        choice = Choice(frames=frames, resolution=side, most=MOST_TOGETHER)
        for view in views(source, choice, notify=note, name=name):
            found.append((view.source, shortened(view.name)))
    return found


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
