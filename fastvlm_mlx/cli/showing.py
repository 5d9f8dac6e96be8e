"""How `fastvlm generate` shows an answer: as text that streams, as one JSON object, or as a table of choices."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.cli.terminal import LiveLine, note, show, show_answer, show_json, slow_note
from fastvlm_mlx.formatting import as_text, readable_bytes

if TYPE_CHECKING:
    from fastvlm_mlx import Choice, GenerationResult


class Showing:
    """Shows an answer while it comes, and its statistics at the end.

    Args:
        line: Says what is being done.
        asked: What was asked, for JSON; None shows text.
        verbose: Whether to write statistics.
        max_tokens: The most tokens that the user wants.
        is_json: Whether the answer has to be JSON of a schema.

    Attributes:
        peak_memory: The most bytes that the process which answers has held.
    """

    def __init__(
        self, line: LiveLine, asked: dict[str, Any] | None, *, verbose: bool, max_tokens: int, is_json: bool = False
    ) -> None:
        self.line = line
        self.peak_memory = 0
        self._asked = asked
        self._verbose = verbose
        self._max_tokens = max_tokens
        self._is_json = is_json
        self._pieces: list[GenerationResult] = []
        self._choices: Sequence[Choice] | None = None
        self._slow = ""
        self._server: int | None = None
        self._noted: Counter[str] = Counter()
        self._noted_before: Counter[str] = Counter()

    @property
    def has_pieces(self) -> bool:
        """Whether there is a piece of an answer."""
        return bool(self._pieces)

    @property
    def has_begun(self) -> bool:
        """Whether the user has seen a piece of an answer."""
        return self._asked is None and self.has_pieces

    def begin(self, images: int, *, slow: str, server: int | None = None) -> None:
        """Says that the answer is awaited.

        Args:
            images: How many there are.
            slow: What to do about a slow BLAS; empty if there is none.
            server: The process that answers if it is not this one.
        """
        self._slow, self._server = slow, server
        self.line.wait_for("looking at the image" if images == 1 else "looking at the images" if images else "reading")

    def restart(self) -> None:
        """Begins anew, since another one has to answer; what was noted is not noted again."""
        self._pieces.clear()
        self._server = None
        self._noted_before, self._noted = self._noted, Counter()

    def transparent(self, name: str) -> None:
        """Notes that an image shows the colours that are stored in its transparent pixels."""
        self._note(f"{name}: shows the colours stored in its transparent pixels; --background white shows white there")

    def seen(self) -> None:
        """Notes what there is to note once all images have turned out to be images."""
        if self._slow:
            self._note(slow_note(self._slow))

    def _note(self, message: str) -> None:
        self._noted[message] += 1
        if self._noted[message] > self._noted_before[message]:
            note(message)

    def piece(self, piece: "GenerationResult") -> None:
        """Shows a piece of an answer."""
        self._pieces.append(piece)
        if self._asked is not None:
            self.line.show(f"answering: token {piece.generated_tokens}")
        else:
            self.line.clear()
            show_answer(piece.text)

    def choices(self, choices: "Sequence[Choice]") -> None:
        """Takes the choices of a question."""
        self._choices = choices

    def end(self) -> bool:
        """Shows what can be shown when all is there; returns whether the answer is what it has to be."""
        if self._choices is not None:
            _show_choices(self._choices, self._asked)
            return True
        text, last = "".join(piece.text for piece in self._pieces), self._pieces[-1]
        valid = not self._is_json or (last.finish_reason == "stop" and last.stop_string is None)
        if self._asked is not None:
            parsed = {"parsed": _parsed(text) if valid else None, "valid": valid} if self._is_json else {}
            token_ids = [token for piece in self._pieces for token in piece.token_ids]
            show_json({**self._asked, "text": text, **parsed, "token_ids": token_ids, **self._statistics(last)})
        else:
            if not text.endswith("\n"):
                show_answer("\n")
            if last.finish_reason == "length":
                is_limit = last.generated_tokens >= self._max_tokens
                allowed = "--max-tokens allows more" if is_limit else "the context is full"
                cut = f"the answer was cut after {last.generated_tokens} tokens"
                note(f"{cut}{'' if valid else ', so it is no JSON'}; {allowed}")
            elif not valid:
                note("the answer was cut by a stop string, so it is no JSON")
        if self._verbose:
            self._summarize(last)
        return valid

    def _statistics(self, last: "GenerationResult") -> dict[str, Any]:
        """The statistics of a finished answer: tokens, seconds by part, tokens per second, bytes."""
        return {
            "prompt_tokens": last.prompt_tokens,
            "visual_tokens": last.visual_tokens,
            "generated_tokens": last.generated_tokens,
            "finish_reason": last.finish_reason,
            "timings": asdict(last.timings),
            "tokens_per_second": last.tokens_per_second,
            "peak_memory_bytes": self.peak_memory,
        }

    def _summarize(self, last: "GenerationResult") -> None:
        """Writes the statistics of a finished answer for the reader."""
        if self._server is not None:
            note(f"server: process {self._server}, which keeps the model warm")
        note(f"prompt: {last.prompt_tokens} tokens, {last.visual_tokens} of them visual")
        note(f"answer: {last.generated_tokens} tokens, ended by {last.finish_reason}")
        timings = ", ".join(f"{stage} {seconds:.3f} s" for stage, seconds in asdict(last.timings).items())
        note(f"time:   {timings}; {last.tokens_per_second:.1f} tokens/s")
        note(f"memory: {readable_bytes(self.peak_memory)} at the peak")


def _parsed(text: str) -> Any:
    """The value of a JSON text."""
    import json

    return json.loads(text)


def _show_choices(choices: "Sequence[Choice]", asked: dict[str, Any] | None) -> None:
    """Writes the choices, the most probable first: as JSON behind what was asked, or as a table."""
    ranked = sorted(choices, key=lambda choice: -choice.probability)
    if asked is not None:
        show_json({**asked, "choices": [asdict(choice) for choice in ranked]})
        return
    rows = [(choice.text, f"{choice.probability:.1%}", f"{choice.corrected:.1%}") for choice in ranked]
    show(as_text([("choice", "probability", "length-corrected"), *rows]))
