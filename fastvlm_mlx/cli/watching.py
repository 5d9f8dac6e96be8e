"""Who is told what `fastvlm watch` sees: the terminal or a pipe, a voice, the log and a command."""

import shutil
import sys
import textwrap
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.cli.terminal import note, show, show_json

if TYPE_CHECKING:
    from fastvlm_mlx.watch.audience import Description, Told
    from fastvlm_mlx.watch.outputs import Cue, Hook, Log
    from fastvlm_mlx.watch.speech import Speaker


def show_line(text: str) -> None:
    """Writes a text to stdout, as a line or, on a narrow terminal, as lines that are broken between words."""
    if sys.stdout.isatty():
        width = max(shutil.get_terminal_size().columns, 10)
        text = "\n".join(textwrap.wrap(text, width, break_on_hyphens=False)) or text
    show(text)


class Teller:
    """Tells descriptions in every way that was chosen.

    Args:
        form: One of `FORMATS`.
        facts: What each record begins with: the source, the model and the task.
        log: Gets every answer, those that say nothing new too.
        hook: Is run for what is told.
        speaker: Speaks what is told.
    """

    def __init__(
        self, form: str, facts: dict[str, Any], *, log: "Log | None", hook: "Hook | None", speaker: "Speaker | None"
    ) -> None:
        from fastvlm_mlx.watch.outputs import Joined, Subtitles

        self._form = form
        self._facts = facts
        self._log = log
        self._hook = hook
        self._speaker = speaker
        self._is_subtitle = form in ("srt", "vtt")
        self._cues = Joined(Subtitles(self._write, vtt=form == "vtt").cue) if self._is_subtitle else None

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def finish(self) -> None:
        """Writes what waits for something that might follow."""
        if self._cues is not None:
            self._cues.finish()

    def sentence(self, told: "Told") -> None:
        """Shows and speaks a sentence."""
        if self._form == "text":
            show_line(told.text)
        if self._speaker is None:
            return
        if told.urgent:
            self._speaker.interrupt()
        elif told.first:
            self._speaker.forget()
        self._speaker.add(told.text, again=told.again)

    def description(self, description: "Description") -> None:
        """Writes an answer as a record, and runs the command."""
        result = description.result
        record = {
            **self._facts,
            "time": round(description.time, 3),
            "at": datetime.now().astimezone().isoformat(timespec="milliseconds"),
            "text": description.text,
            "kind": description.kind,
            **({"question": description.question} if description.question is not None else {}),
            "shown": description.shown,
            "change": round(description.change, 1),
            "age": round(description.age, 3),
            "ttft": round(result.timings.ttft, 3),
            "seconds": round(result.timings.total, 3),
            "generated_tokens": result.generated_tokens,
            "finish_reason": result.finish_reason,
            "frames": description.frames,
            "dropped": description.dropped,
            "outdated": description.outdated,
        }
        if self._log is not None:
            self._log.add(record)
        if description.shown:
            if self._form == "jsonl":
                show_json(record)
            self._run(description.text, description.time)

    def cue(self, cue: "Cue") -> None:
        """Writes a subtitle."""
        if self._cues is not None:
            self._cues.add(cue)

    def scene(self, cue: "Cue") -> None:
        """Tells a scene of a film."""
        from fastvlm_mlx.watch.outputs import short_clock

        record = {**self._facts, "time": round(cue.start, 3), "end": round(cue.end, 3), "text": cue.text}
        if self._log is not None:
            self._log.add(record)
        if self._cues is not None:
            self._cues.add(cue)
        elif self._form == "jsonl":
            show_json(record)
        else:
            show_line(f"{short_clock(cue.start)}  {cue.text}")
        self._run(cue.text, cue.start, each=True)

    def _run(self, text: str, time: float, *, each: bool = False) -> None:
        if self._hook is not None:
            values = {"FASTVLM_TIME": f"{time:.3f}", "FASTVLM_SOURCE": str(self._facts["source"])}
            self._hook.run(text, values, each=each)

    def gone(self, *, cut: bool) -> None:
        """Leaves unspoken what is out of date; falls silent if another scene is there."""
        if self._speaker is None:
            return
        if cut:
            self._speaker.interrupt()
        else:
            self._speaker.forget()

    def note(self, message: str, spoken: str | None = None) -> None:
        """Says something about the watching; speaks the first part of it, or what is given instead."""
        note(message)
        if self._speaker is not None:
            self._speaker.interrupt()
            self._speaker.add(message.partition(";")[0] if spoken is None else spoken, again=True)
