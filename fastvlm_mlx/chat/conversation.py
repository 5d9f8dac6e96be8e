"""A conversation: questions with their pictures, and the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastvlm_mlx.chat.pictures import Picture
from fastvlm_mlx.inputs.sources import Encoded


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question and its answer.

    Attributes:
        text: The question.
        pictures: That it shows.
        answer: None as long as there is none.
    """

    text: str
    pictures: tuple[Picture, ...] = ()
    answer: str | None = None


class Conversation:
    """The turns of a conversation.

    Attributes:
        system: Replaces the default system text; None for that.
        turns: From the oldest on; only the last one may lack its answer.
        pending: Pictures for the next question.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: list[Turn] = []
        self.pending: list[Picture] = []

    @property
    def pictures(self) -> list[Picture]:
        """All pictures, those for the next question too."""
        return [*(picture for turn in self.turns for picture in turn.pictures), *self.pending]

    @property
    def images(self) -> list[Encoded]:
        """The images of the turns, in the order of their places."""
        return [picture.encoded for turn in self.turns for picture in turn.pictures]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The turns as OpenAI's messages, in which `{"type": "image"}` is the place of an image."""
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            places = [{"type": "image"} for _ in turn.pictures]
            messages.append({"role": "user", "content": [*places, {"type": "text", "text": turn.text}]})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def ask(self, text: str) -> None:
        """Adds a question, with the pictures that wait for one."""
        self.turns.append(Turn(text=text, pictures=tuple(self.pending)))
        self.pending.clear()

    def answer(self, text: str) -> None:
        """Adds the answer to the last question."""
        self.turns[-1] = replace(self.turns[-1], answer=text)

    def withdraw(self) -> Turn | None:
        """Removes the last question with its answer, if there is one, and returns it."""
        return self.turns.pop() if self.turns else None

    def forget_oldest(self) -> Turn:
        """Removes the oldest turn; its pictures stay, with the next one."""
        oldest, following, *others = self.turns
        self.turns = [replace(following, pictures=oldest.pictures + following.pictures), *others]
        return oldest

    def reset(self) -> None:
        """Removes all turns and pictures."""
        self.turns.clear()
        self.pending.clear()

    def replace_with(self, system: str | None, turns: Sequence[Turn]) -> None:
        """Becomes another conversation."""
        self.reset()
        self.system = system
        self.turns.extend(turns)
