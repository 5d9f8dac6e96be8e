"""The loop of `fastvlm chat`: reads questions and commands, shows answers."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.cli.lines import Interrupted, TerminalLines, program_lines
from fastvlm_mlx.cli.terminal import LiveLine, complain, note, show_answer, show_json, slow_note
from fastvlm_mlx.errors import FastVLMError, PromptError
from fastvlm_mlx.formatting import counted, printable

if TYPE_CHECKING:
    from fastvlm_mlx.chat.commands import Command
    from fastvlm_mlx.chat.dialogue import Dialogue, Reply
    from fastvlm_mlx.chat.session import Keeper
    from fastvlm_mlx.generation.result import GenerationResult


class Leave(Exception):
    """The user has had enough."""


def aside(message: str) -> None:
    """Notes something in a dim colour, where a terminal shows colours and the user wants them."""
    colours = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    if not colours:
        note(message)
        return
    sys.stderr.write("\x1b[2m")
    note(message)
    sys.stderr.write("\x1b[0m")
    sys.stderr.flush()


class Watcher:
    """Is told what happens on the way to an answer, and notes it once.

    Args:
        slow: What to do about a slow BLAS; empty if there is none.

    Attributes:
        peak_memory: The most bytes that the process which answers has held.
    """

    def __init__(self, slow: Callable[[], str]) -> None:
        self.peak_memory = 0
        self._slow = slow
        self._noted: set[str] = set()

    def transparent(self, name: str) -> None:
        """Notes that an image shows the colours that are stored in its transparent pixels."""
        self._note(f"{name}: shows the colours stored in its transparent pixels; /set background=white shows white")

    def seen(self) -> None:
        """Notes that the machine computes slowly."""
        if hint := self._slow():
            self._note(slow_note(hint))

    def _note(self, message: str) -> None:
        if message not in self._noted:
            self._noted.add(message)
            aside(message)


class Chat:
    """A conversation at a terminal, or with a program.

    Args:
        dialogue: The conversation.
        watcher: Is told what happens on the way to an answer.
        keeper: Keeps the conversation for the next time; None does not.
        model: The model's name.
        verbose: Whether to write statistics.
        as_json: Whether a program reads the answers as JSON.
        frames: How many of a film or an animation are shown; None is the default.
    """

    def __init__(
        self,
        dialogue: "Dialogue",
        watcher: Watcher,
        keeper: "Keeper | None",
        *,
        model: str,
        verbose: bool,
        as_json: bool,
        frames: int | None = None,
    ) -> None:
        self._dialogue = dialogue
        self._watcher = watcher
        self._keeper = keeper
        self._model = model
        self._verbose = verbose
        self._as_json = as_json
        self._frames = frames
        self._has_warned = False
        self.failures = 0

    def talk(self, history: Path | None) -> None:
        """Talks with a person until that one leaves.

        Raises:
            KeyboardInterrupt: At a second interrupt in a row.
        """
        from fastvlm_mlx.chat.commands import complete

        interrupts = 0
        with TerminalLines(history, complete) as lines:
            while True:
                try:
                    text = lines.read(self._prompt())
                except Interrupted as err:
                    interrupts += 1
                    if interrupts > 1:
                        raise KeyboardInterrupt from err
                    aside("Ctrl-C again, Ctrl-D or /quit leaves")
                    continue
                except UnicodeDecodeError:
                    complain("the line is not UTF-8; check the encoding of the terminal")
                    continue
                if text is None:
                    return
                try:
                    is_stopped = self._take(text, self._show_piece, self._end_answer)
                except Leave:
                    return
                except FastVLMError as error:
                    complain(str(error))
                    is_stopped = False
                interrupts = int(is_stopped)

    def serve(self) -> None:
        """Answers a program: one question a line, one answer a line."""
        from fastvlm_mlx.chat.commands import is_command

        for text in program_lines():
            try:
                if isinstance(text, UnicodeDecodeError):
                    raise PromptError(f"stdin: byte {text.object[text.start]:#x} is not UTF-8; a question is text")
                if self._take(text, lambda _: None, self._write_line):
                    raise KeyboardInterrupt
            except Leave:
                return
            except FastVLMError as error:
                self.failures += 1
                is_question = isinstance(text, UnicodeDecodeError) or not is_command(text)
                if self._as_json and is_question:
                    show_json({"error": {"type": type(error).__name__, "message": str(error)}})
                    continue
                complain(str(error))
                if is_question:
                    show_answer("\n")

    def _prompt(self) -> str:
        share = self._dialogue.fullness
        return f"{share:.0%} > " if share >= 0.005 else "> "

    def _take(self, text: str, show: Callable[["GenerationResult"], None], end: Callable[["Reply"], None]) -> bool:
        """Does what a line says; returns whether the user has stopped the answer.

        Raises:
            FastVLMError: If it cannot be done.
            Leave: If the user has had enough.
        """
        from fastvlm_mlx.chat.commands import parse_command
        from fastvlm_mlx.chat.pictures import split_line

        if (command := parse_command(text.strip())) is not None:
            again = self._obey(command)
            return False if again is None else self._ask(again, show, end)
        question, names = split_line(text)
        self.add(names)
        if not question:
            return False
        return self._ask(question, show, end)

    def _ask(self, text: str, show: Callable[["GenerationResult"], None], end: Callable[["Reply"], None]) -> bool:
        pictures = len(self._dialogue.conversation.pending)
        with LiveLine() as line:

            def shown(piece: "GenerationResult") -> None:
                line.clear()
                show(piece)

            line.wait_for("looking at the picture" if pictures else "reading")
            reply = self._dialogue.ask(text, self._watcher, shown)
        end(reply)
        if self._verbose and reply.last is not None:
            self._summarize(reply.last)
        self.keep()
        return reply.is_stopped

    def add(self, names: list[str]) -> None:
        """Shows pictures with the next question, and confirms them by name and size.

        Raises:
            FastVLMError: If one cannot be read; then none is added.
        """
        pending = self._dialogue.conversation.pending
        before = list(pending)
        try:
            added = [picture for name in names for picture in self._dialogue.add(name, frames=self._frames)]
        except FastVLMError:
            pending[:] = before
            raise
        for picture in added:
            aside(f"picture: {picture}")
        if added and len(self._dialogue.conversation.pictures) > 1 and not self._has_warned:
            self._has_warned = True
            aside("FastVLM learned from conversations about one picture; /reset forgets the earlier ones")

    def keep(self) -> None:
        """Keeps the conversation for the next time."""
        if self._keeper is not None:
            self._keeper.keep(self._dialogue.conversation, self._dialogue.settings, self._model)

    def _show_piece(self, piece: "GenerationResult") -> None:
        show_answer(piece.text)

    def _end_answer(self, reply: "Reply") -> None:
        """Ends an answer for a person."""
        if not reply.text.endswith("\n"):
            show_answer("\n")
        last = reply.last
        if reply.is_stopped:
            aside("stopped; /retry asks again" if reply.text else "stopped")
        elif last is not None and last.finish_reason == "length":
            aside(f"the answer was cut after {last.generated_tokens} tokens; /set max_tokens allows more")

    def _write_line(self, reply: "Reply") -> None:
        """Writes an answer for a program."""
        if not self._as_json:
            show_answer(" ".join(reply.text.split("\n")).strip() + "\n")
            return
        record: dict[str, Any] = {
            "text": reply.text,
            "images": [printable(picture.name) for picture in reply.pictures],
            "forgotten": reply.forgotten,
        }
        if (last := reply.last) is not None:
            record |= {
                "prompt_tokens": last.prompt_tokens,
                "visual_tokens": last.visual_tokens,
                "reused_tokens": last.reused_tokens,
                "generated_tokens": last.generated_tokens,
                "context_length": self._dialogue.context_length,
                "finish_reason": last.finish_reason,
                "timings": asdict(last.timings),
                "tokens_per_second": last.tokens_per_second,
            }
        show_json(record)

    def _summarize(self, last: "GenerationResult") -> None:
        note(
            f"first token after {last.timings.ttft:.3f} s, {last.tokens_per_second:.1f} tokens/s; "
            f"{last.reused_tokens} of {last.prompt_tokens} prompt tokens were known"
        )

    def _obey(self, command: "Command") -> str | None:
        """Does what a command says; returns a question that is to be asked, if there is one."""
        name, rest = command
        if name == "/quit":
            raise Leave
        if name == "/retry":
            question = self._dialogue.last_question()
            if question is None:
                raise PromptError("there is no question to ask again")
            return question
        {
            "/image": self._image,
            "/images": self._images,
            "/undo": self._undo,
            "/reset": self._reset,
            "/system": self._system,
            "/set": self._set,
            "/tokens": self._tokens,
            "/save": self._save,
            "/load": self._load,
            "/help": self._help,
        }[name](rest)
        return None

    def _image(self, rest: str) -> None:
        from fastvlm_mlx.chat.pictures import is_url, words

        names = [rest] if is_url(rest) or os.path.isfile(os.path.expanduser(rest)) else words(rest)
        if not names:
            raise PromptError("/image needs a path or a URL")
        self.add(names)

    def _images(self, _: str) -> None:
        talk = self._dialogue.conversation
        for number, picture in enumerate(talk.pictures, 1):
            waits = number > len(talk.pictures) - len(talk.pending)
            aside(f"{number}: {picture}{', for the next question' if waits else ''}")
        if not talk.pictures:
            aside("no pictures yet; drop one here, or /image PATH")

    def _undo(self, _: str) -> None:
        question = self._dialogue.undo()
        if question is None:
            raise PromptError("there is nothing to take back")
        aside(f"took back: {printable(question, 60)}")
        self.keep()

    def _reset(self, _: str) -> None:
        self._dialogue.reset()
        aside("forgot everything but the settings")

    def _system(self, rest: str) -> None:
        if rest:
            text = rest[1:-1] if len(rest) > 1 and rest[0] == rest[-1] and rest[0] in "'\"" else rest
            self._dialogue.set_system(text or None)
        system = self._dialogue.conversation.system
        aside("system: the default" if system is None else f"system: {system}")

    def _set(self, rest: str) -> None:
        settings = self._dialogue.settings
        if rest:
            for name, text in _assignments(rest):
                settings = settings.with_text(name, text)
            self._dialogue.change(settings)
        changed = settings.changed
        aside(", ".join(f"{name}={value}" for name, value in changed.items()) or "all settings are the defaults")

    def _tokens(self, _: str) -> None:
        size = self._dialogue.size()
        if size is None:
            aside("the context is empty")
            return
        left = size.context_length - size.prompt_tokens
        pictures = counted(len(self._dialogue.conversation.images), "picture")
        aside(
            f"{size.prompt_tokens} of {size.context_length} tokens are taken: {size.visual_tokens} by {pictures}, "
            f"{size.prompt_tokens - size.visual_tokens} by text; {left} are left"
        )

    def _save(self, rest: str) -> None:
        from fastvlm_mlx.chat.session import save

        path = _path(rest, "/save")
        if path.exists() and not _is_conversation(path):
            raise PromptError(f"{printable(path)}: is there already, and no conversation; choose another name")
        save(path, self._dialogue.conversation, self._dialogue.settings, self._model)
        aside(f"saved {counted(len(self._dialogue.conversation.turns), 'question')} in {path}")

    def _load(self, rest: str) -> None:
        self.load(_path(rest, "/load"))

    def load(self, path: Path) -> None:
        """Goes on with a conversation from a file.

        Raises:
            FastVLMError: If it cannot be read; then nothing changes.
        """
        from fastvlm_mlx.chat.session import load

        conversation, settings, model = load(path, self._dialogue.settings)
        self._dialogue.replace(conversation, settings)
        other = f", which {printable(model)} answered" if model and model != self._model else ""
        turns, pictures = counted(len(conversation.turns), "question"), counted(len(conversation.pictures), "picture")
        aside(f"going on after {turns} about {pictures}{other}")

    def _help(self, _: str) -> None:
        from fastvlm_mlx.chat.commands import help_lines

        for line in help_lines(shutil.get_terminal_size().columns):
            note(line)
        note('a line that ends with \\, or begins with """, goes on')


def _assignments(text: str) -> list[tuple[str, str]]:
    """The names and values in `temperature=0.7 stop="two words"`; one name and a value may have a blank between."""
    from fastvlm_mlx.chat.pictures import words

    parts = words(text)
    if "=" not in text and len(parts) == 2:
        return [(parts[0], parts[1])]
    pairs = [part.partition("=") for part in parts]
    for name, equals, _ in pairs:
        if not equals:
            raise PromptError(f"/set takes NAME=VALUE, such as temperature=0.7, not {printable(name, 60)}")
    return [(name, value) for name, _, value in pairs]


def _path(rest: str, command: str) -> Path:
    from fastvlm_mlx.chat.pictures import words

    parts = [rest] if os.path.exists(os.path.expanduser(rest)) else words(rest)
    if len(parts) != 1 or not parts[0]:
        raise PromptError(f"{command} needs the name of one file")
    return Path(os.path.expanduser(parts[0]))


def _is_conversation(path: Path) -> bool:
    from fastvlm_mlx.chat.session import LARGEST
    from fastvlm_mlx.schema import parse_object, read_small_file

    try:
        data = read_small_file(path, LARGEST)
        return data is not None and "messages" in parse_object(data, str(path), most=LARGEST)
    except FastVLMError:
        return False
