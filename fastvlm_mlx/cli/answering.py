"""Who answers a question of the command line: the background server, if it holds the model, or this process."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.cli.inputs import load_named
from fastvlm_mlx.cli.terminal import ByteProgress, note, slow_blas
from fastvlm_mlx.errors import FastVLMError, ImageError

if TYPE_CHECKING:
    from fastvlm_mlx import FastVLM, FastVLMProcessor
    from fastvlm_mlx.cli.showing import Showing
    from fastvlm_mlx.inputs.sources import Encoded
    from fastvlm_mlx.warm.client import Holding, Warm
    from fastvlm_mlx.warm.wire import Question


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question as a command line has it.

    Attributes:
        sources: Images, which have yet to be read: names, or the bytes of stdin.
        question: Everything else.
        has_prompt: Whether the prompt is the user's own.
    """

    sources: list[Any]
    question: "Question"
    has_prompt: bool


def answer(asked: Asked, holding: "Holding", showing: "Showing", *, warm: bool) -> None:
    """Answers a question, and shows the answer.

    Raises:
        FastVLMError: If it cannot be answered.
    """
    from fastvlm_mlx.warm.client import find_warm

    server = find_warm(holding) if warm else None
    if server is not None:
        remaining = _answer_warm(server, asked, showing)
        if remaining is None:
            return
        asked = remaining
    _answer_here(asked, holding, showing)


def _answer_warm(server: "Warm", asked: Asked, showing: "Showing") -> Asked | None:
    """Lets the background server answer; returns what this process has to answer instead, None if nothing.

    Raises:
        FastVLMError: If the question cannot be answered, or the server ends when a part of the answer has been shown.
    """
    from fastvlm_mlx.warm.client import OF_THE_QUESTION

    images = _read(asked)
    if images is None:
        return asked
    question = replace(asked.question, images=images)
    showing.begin(len(images), slow=server.slow, server=server.pid)
    try:
        if question.choices:
            showing.choices(server.choose(question, showing))
        else:
            for piece in server.ask(question, showing):
                showing.piece(piece)
    except OF_THE_QUESTION:
        raise
    except FastVLMError:  # the server has gone, or its checkpoint is damaged
        if showing.has_begun:
            raise
        showing.restart()
        return replace(asked, sources=images)
    return None


def _read(asked: Asked) -> "list[Encoded] | None":
    """The images as they are stored; None if another than the first cannot be read, which may not be the first error.

    Raises:
        ImageError: If the first one cannot be read.
    """
    from fastvlm_mlx.inputs.sources import read

    images: list[Encoded] = []
    for source in asked.sources:
        try:
            images.append(load_named(read, source, has_prompt=asked.has_prompt))
        except ImageError:
            if images:
                return None
            raise
    return images


def show_answer(
    network: "FastVLM", processor: "FastVLMProcessor", question: "Question", images: list[Any], showing: "Showing"
) -> None:
    """Shows the answer of a loaded model, piece by piece; its tower is free afterwards."""
    from fastvlm_mlx import choose, stream_generate

    common: Any = {
        "image": images or None,
        "prompt": question.prompt,
        "system": question.system,
        "resolution": question.resolution,
    }
    if question.choices:
        showing.choices(choose(network, processor, question.choices, **common))
        return
    settings: Any = {"config": question.config, "schema": question.schema, "free_tower": True}
    for piece in stream_generate(network, processor, **common, **settings):
        showing.piece(piece)


def _answer_here(asked: Asked, holding: "Holding", showing: "Showing") -> None:
    """Loads the model and lets it answer; a conversion in the cache that turns out to be damaged is made again."""
    from concurrent.futures import ThreadPoolExecutor
    from functools import partial

    from fastvlm_mlx import load
    from fastvlm_mlx.backend import mx
    from fastvlm_mlx.inputs.images import load_turned
    from fastvlm_mlx.resolve import find, is_damaged, remake

    question, model, revision = asked.question, holding.model, holding.revision
    read = partial(load_turned, background=question.background, notify=showing.transparent)
    with ThreadPoolExecutor() as pool:  # images are decoded while weights are read
        loading = [pool.submit(load_named, read, source, has_prompt=asked.has_prompt) for source in asked.sources]

        def announce(message: str) -> None:
            """Notes a slow step, such as a download, once every image is known to be one."""
            for image in loading:
                image.result()
            note(message)

        if find(model, revision=revision) is None:  # the Hub will be asked
            for image in loading:
                image.result()

        def loaded() -> "tuple[FastVLM, FastVLMProcessor]":
            showing.line.wait_for(f"loading {model}")
            with ByteProgress() as progress:
                return load(
                    model, dtype=holding.dtype, revision=revision, notify=announce, progress=progress, lazy=True
                )

        def ask(network: "FastVLM", processor: "FastVLMProcessor") -> None:
            """Shows the answer, piece by piece."""
            images = [image.result() for image in loading]
            showing.begin(len(images), slow=slow_blas())
            showing.seen()
            show_answer(network, processor, question, images, showing)

        network, processor = loaded()
        try:
            ask(network, processor)
        except FastVLMError as error:
            if showing.has_pieces or not is_damaged(model, error, revision=revision):
                raise
            with ByteProgress() as progress:
                remake(model, error, revision=revision, notify=announce, progress=progress)
            ask(*loaded())
    showing.peak_memory = mx.get_peak_memory()
