"""Questions and answers one after the other, within the room that the context has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from fastvlm_mlx.chat.answerers import Answerer
from fastvlm_mlx.chat.conversation import Conversation
from fastvlm_mlx.chat.pictures import Picture
from fastvlm_mlx.chat.settings import Settings
from fastvlm_mlx.errors import FastVLMError, PromptError
from fastvlm_mlx.formatting import counted, printable
from fastvlm_mlx.generation.result import GenerationResult
from fastvlm_mlx.warm.client import Listener
from fastvlm_mlx.warm.wire import Question, Size

_MARKUP = 24
"""The most tokens that a turn takes besides its text."""
_QUARTER = 4


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer.

    Attributes:
        text: As far as it was given.
        last: The last piece; None if it was stopped before the first one.
        pictures: That the question showed.
        forgotten: How many turns were forgotten to make room for it.
        is_stopped: Whether the user has stopped it.
    """

    text: str
    last: GenerationResult | None
    pictures: tuple[Picture, ...]
    forgotten: int
    is_stopped: bool


class Dialogue:
    """A conversation with what answers in it.

    Args:
        answerer: Answers.
        settings: How.
        notify: Is told what the user should know.

    Attributes:
        conversation: So far.
        settings: How answers are chosen; set it with `change`.
        context_length: The most positions; 0 until that is known.
    """

    def __init__(self, answerer: Answerer, settings: Settings, notify: Callable[[str], None]) -> None:
        self.conversation = Conversation()
        self.settings = settings
        self.context_length = 0
        self._answerer = answerer
        self._notify = notify
        self._used: int | None = None
        self._failed = ""

    def change(self, settings: Settings) -> None:
        """Takes other settings."""
        self.settings = settings
        self._used = None

    def replace(self, conversation: Conversation, settings: Settings) -> None:
        """Goes on with another conversation."""
        self.conversation = conversation
        self.change(settings)

    def set_system(self, text: str | None) -> None:
        """Replaces the system prompt; None stands for the default one."""
        self.conversation.system = text
        self._used = None

    def undo(self) -> str | None:
        """Takes back the last question and its answer; returns the question, None if there is none."""
        turn = self.conversation.withdraw()
        self._used = None
        return None if turn is None else turn.text

    def reset(self) -> None:
        """Forgets all turns and pictures."""
        self.conversation.reset()
        self._used = None

    def last_question(self) -> str | None:
        """The question to ask again: the one that failed, or the last one, which is taken back with its pictures."""
        if self._failed:
            return self._failed
        turn = self.conversation.withdraw()
        self._used = None
        if turn is None:
            return None
        self.conversation.pending[:0] = turn.pictures
        return turn.text

    def add(self, name: str, *, frames: int | None = None) -> list[Picture]:
        """Shows a picture with the next question, or several for a film or a PDF; returns them.

        Args:
            name: As the user gives it.
            frames: Of a film or an animation; None is the default.

        Raises:
            ImageError: If it cannot be read or is no image.
        """
        pictures = Picture.all_of(name, frames=frames, notify=self._notify)
        self.conversation.pending += pictures
        return pictures

    def ask(self, text: str, listener: Listener, show: Callable[[GenerationResult], None]) -> Reply:
        """Asks a question and shows the answer piece by piece; an interrupt stops it, and what was given is kept.

        Raises:
            FastVLMError: If it cannot be answered; the conversation is then as it was.
        """
        talk, before = self.conversation, list(self.conversation.turns)
        pending = list(talk.pending)
        talk.ask(text)
        pieces: list[GenerationResult] = []
        is_stopped = False
        self._failed = ""
        try:
            forgotten = self._make_room(len(text.encode("utf-8", "replace")), bool(pending))
            with closing(self._answerer.ask(self._question(), listener)) as answer:  # type: ignore[type-var]
                for piece in answer:
                    pieces.append(piece)
                    show(piece)
        except KeyboardInterrupt:
            is_stopped = True
            forgotten = len(before) + 1 - len(talk.turns)
        except FastVLMError:
            talk.turns, talk.pending = before, pending
            self._failed = text
            raise
        given = "".join(piece.text for piece in pieces)
        pictures = talk.turns[-1].pictures
        if given:
            talk.answer(given)
            last = pieces[-1]
            self._used = last.prompt_tokens + last.generated_tokens
        else:
            talk.withdraw()
            talk.pending = pending
            self._failed, self._used = text, None
        last_piece = pieces[-1] if pieces else None
        return Reply(text=given, last=last_piece, pictures=pictures, forgotten=forgotten, is_stopped=is_stopped)

    def _question(self, messages: list[dict[str, Any]] | None = None) -> Question:
        settings, talk = self.settings, self.conversation
        return Question(
            images=talk.images,
            prompt=talk.messages if messages is None else messages,
            system=talk.system,
            resolution=settings.resolution,
            background=settings.background,
            config=settings.config,
        )

    def _make_room(self, text_bytes: int, has_pictures: bool) -> int:
        """Forgets the oldest turns until there is room for an answer; returns how many.

        Raises:
            PromptError: If the question alone takes the whole context.
        """
        wanted = self.settings.config.max_tokens
        room = min(wanted, self.context_length // _QUARTER)
        if self._used is not None and not has_pictures:
            most = self._used + text_bytes + _MARKUP  # a token has at least one byte
            if most + room <= self.context_length:
                return 0
        forgotten = 0
        while True:
            size = self._answerer.measure(self._question())
            self.context_length = size.context_length
            room = min(wanted, size.context_length // _QUARTER)
            if size.prompt_tokens + room <= size.context_length:
                return forgotten
            if len(self.conversation.turns) == 1:
                if size.prompt_tokens < size.context_length:
                    return forgotten
                raise PromptError(
                    f"the question and its pictures take {size.prompt_tokens} of {size.context_length} positions; "
                    "shorten it, /set resolution=512 or less, or /reset"
                )
            oldest = self.conversation.forget_oldest()
            forgotten += 1
            kept = f"; {counted(len(oldest.pictures), 'picture')} of it kept" if oldest.pictures else ""
            self._notify(f"the context is full: forgot the oldest question ({printable(oldest.text, 40)}){kept}")

    def size(self) -> Size | None:
        """The room that the conversation takes; None before the first question."""
        talk = self.conversation
        if not talk.turns:
            return None
        question = self._question([*talk.messages, {"role": "user", "content": "?"}])
        size = self._answerer.measure(question)
        self.context_length, self._used = size.context_length, size.prompt_tokens
        return size

    @property
    def fullness(self) -> float:
        """The share of the context that is taken, as far as that is known."""
        return (self._used or 0) / self.context_length if self.context_length else 0.0
