"""The classes of cases, by name."""

from collections.abc import Callable
from random import Random

from tests.fuzz import (
    albums,
    arguments,
    captions,
    checkpoints,
    commands,
    embedding,
    headers,
    pictures,
    prompts,
    questions,
    schemas,
    servers,
    several,
    sources,
)
from tests.fuzz.room import Room

Case = Callable[[Random, Room], None]
"""Does what a seed decides in an empty room; raises what the public functions raise, or `Wrong`."""

CLASSES: dict[str, Case] = {
    case.__name__: case
    for case in (
        *(checkpoints.upstream, checkpoints.converted, checkpoints.cache, checkpoints.archive),
        *(pictures.picture, headers.header, sources.array, sources.source, servers.server),
        *(several.film, several.document, several.name),
        *(prompts.prompt, prompts.messages, prompts.ids),
        *(questions.questions, questions.journal, captions.captions, embedding.embedding),
        albums.album,
        *(arguments.python, commands.command_line, schemas.schema),
    )
}
