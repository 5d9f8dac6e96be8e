"""`fastvlm generate` in several processes that share a decoder, as `mlx.launch` starts them; one alone speaks."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.cli.answering import Asked, show_answer
from fastvlm_mlx.cli.inputs import load_named
from fastvlm_mlx.cli.terminal import ByteProgress, note, silence, slow_blas
from fastvlm_mlx.errors import ConfigError, FastVLMError
from fastvlm_mlx.formatting import printable

if TYPE_CHECKING:
    from fastvlm_mlx.backend import mx
    from fastvlm_mlx.cli.showing import Showing
    from fastvlm_mlx.warm.client import Holding

_MESSAGE_BYTES = 1024
_PATIENCE = 2.0
"""Seconds that the first process has to say what is wrong, before the end of another one makes the launcher end it."""
_MEETING_SECONDS = 180.0
"""Within which all processes of a launch have to be there."""
_LOST = "connection to a peer was lost"
"""What MLX says when another process has ended."""


def launched() -> bool | None:
    """Whether this process is the first of several that were launched together; None if it is alone.

    The others write nothing from then on.
    """
    from fastvlm_mlx.jobs.shards import launched_shard

    rank = launched_shard()
    if rank is None:
        return None
    if rank.number > 1:
        silence()
    return rank.number == 1


def answer_together(asked: Asked, holding: "Holding", showing: "Showing") -> None:
    """Answers a question in all processes of a launch, which each load a part of the decoder.

    The first one reads the images; the others need not have them.

    Raises:
        FastVLMError: If it cannot be answered; in every process.
    """
    from functools import partial

    from fastvlm_mlx import load
    from fastvlm_mlx.backend import mx
    from fastvlm_mlx.inputs.images import load_image

    question = asked.question
    group = meet()
    images: list[Any] = []
    with _together():
        with _agreed(group):
            read = partial(load_image, background=question.background, notify=showing.transparent)
            images = [load_named(read, source, has_prompt=asked.has_prompt) for source in asked.sources]
        with _agreed(group):
            showing.line.wait_for(f"loading {holding.model}")
            with ByteProgress() as progress:
                network, processor = load(
                    holding.model,
                    dtype=holding.dtype,
                    revision=holding.revision,
                    notify=note,
                    progress=progress,
                    group=group,
                )
        shared = _shared(images, group)
        showing.begin(len(shared), slow=slow_blas())
        showing.seen()
        show_answer(network, processor, question, shared, showing)
        showing.peak_memory = mx.get_peak_memory()
        _wait(group)


def meet(seconds: float = _MEETING_SECONDS) -> "mx.distributed.Group":
    """The group of all processes of a launch, after waiting for them.

    MLX's ring gives up if a process begins half a minute after the others, as on a busy machine. The last rank opens
    the ring, by connecting to the first one, so it can try again; the others wait for it.

    Raises:
        ConfigError: If they do not find one another within `seconds`.
    """
    from fastvlm_mlx.backend import mx
    from fastvlm_mlx.jobs.shards import launched_shard

    rank = launched_shard()
    end = time.monotonic() + seconds
    while True:
        try:
            return mx.distributed.init(strict=True)
        except RuntimeError as err:
            opens = rank is not None and rank.number == rank.total
            if not opens or time.monotonic() > end:
                raise ConfigError(f"the launched processes cannot find one another ({printable(err)})") from err
            time.sleep(0.1)


@contextmanager
def _together() -> Iterator[None]:
    """Says what has happened if another process of the launch ends.

    Raises:
        FastVLMError: If so.
    """
    try:
        yield
    except RuntimeError as err:
        if _LOST not in str(err):
            raise
        raise FastVLMError("another of the launched processes has ended; start them all again") from err


@contextmanager
def _agreed(group: "mx.distributed.Group") -> Iterator[None]:
    """Waits for all processes at the end of a `with` block; if one has an error there, all have it.

    Raises:
        FastVLMError: That of this process, or of the first one that has one.
    """
    import numpy as np

    from fastvlm_mlx.backend import mx
    from fastvlm_mlx.streams import turn

    error: FastVLMError | None = None
    try:
        yield
    except FastVLMError as err:
        error = err
    text = "" if error is None else str(error)
    data = text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    with turn():
        told = bytes(np.array(mx.distributed.all_gather(mx.array(list(data), mx.uint8), group=group)))
    messages = [told[start : start + _MESSAGE_BYTES].rstrip(b"\0") for start in range(0, len(told), _MESSAGE_BYTES)]
    for rank, message in enumerate(messages):
        if message:
            if group.rank() > 0:
                time.sleep(_PATIENCE)
            raise error or FastVLMError(f"rank {rank}: {message.decode(errors='replace')}")


def _wait(group: "mx.distributed.Group") -> None:
    """Waits until all processes have computed what was submitted; none may leave while another one needs it."""
    from fastvlm_mlx.backend import mx
    from fastvlm_mlx.streams import turn

    with turn():
        mx.eval(mx.distributed.all_sum(mx.array(1), group=group))
        mx.synchronize()


def _shared(images: Sequence[Any], group: "mx.distributed.Group") -> list[Any]:
    """The images of the first process, as arrays (H, W, 3), in all of them."""
    import numpy as np

    from fastvlm_mlx.backend import mx
    from fastvlm_mlx.streams import turn

    with turn():
        count = int(mx.distributed.all_sum(mx.array(len(images)), group=group))
        shared = []
        for number in range(count):
            pixels = np.asarray(images[number]) if images else np.zeros((0, 0, 3), np.uint8)
            shape = np.array(mx.distributed.all_sum(mx.array(pixels.shape[:2]), group=group)).tolist()
            whole = mx.array(pixels) if images else mx.zeros((*shape, 3), mx.uint8)
            shared.append(np.array(mx.distributed.all_sum(whole, group=group)))
    return shared
