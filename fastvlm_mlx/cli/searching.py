"""The run of `fastvlm search`: its model, the index brought up to date, and what is found."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import combining, east_asian_width

from fastvlm_mlx.cli.captioning import NAMED, progress_text
from fastvlm_mlx.cli.holders import folder_of, identity
from fastvlm_mlx.cli.options import DEFAULT_PROMPT, DType
from fastvlm_mlx.cli.terminal import LiveLine, is_terminal, note, show_json, warn_of_slow_blas
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.formatting import counted, per_second, printable

if TYPE_CHECKING:
    from fastvlm_mlx.album.album import Album, Hit, Results
    from fastvlm_mlx.album.asking import Asker
    from fastvlm_mlx.album.plan import Plan
    from fastvlm_mlx.album.updating import Updating
    from fastvlm_mlx.generation.engine import Engine
    from fastvlm_mlx.jobs.task import Task

_REPORT_SECONDS = 60.0
"""How often progress is noted where it cannot be shown in place, as in a log."""
_CLEAR_BELOW = "\x1b[J"


class Wanted(NamedTuple):
    """The options that an index depends on; None stands for what it was made with.

    Attributes:
        questions: What is asked about every picture, by field.
        journals: Files of `fastvlm caption` to take in.
    """

    model: str
    revision: str | None
    dtype: DType | None
    resolution: int | None
    background: str | None
    questions: Mapping[str, str] | None
    max_tokens: int
    journals: Sequence[Path]
    batch: int | None
    retry_errors: bool


class Prepared:
    """A model that is known, and loaded when it is needed.

    Attributes:
        task: What is asked about every picture.
        updating: Brings the index up to date.
    """

    def __init__(self, wanted: Wanted, folder: Path, task: "Task", updating: "Updating") -> None:
        self.task = task
        self.updating = updating
        self._wanted = wanted
        self._folder = folder
        self._engine: Engine | None = None

    def engine(self) -> "Engine":
        """The engine with the model."""
        if self._engine is None:
            self._engine = self._load()
        return self._engine

    def _load(self) -> "Engine":
        from fastvlm_mlx.engine.prefix_cache import PrefixCache
        from fastvlm_mlx.generation.engine import Engine
        from fastvlm_mlx.resolve import load

        warn_of_slow_blas()
        with LiveLine() as line:
            line.wait_for(f"loading {self._wanted.model}")
            network, processor = load(self._folder, dtype=self._wanted.dtype.value if self._wanted.dtype else None)
        return Engine(network, processor, max_batch=self._wanted.batch or "auto", prefix_cache=PrefixCache(32 << 20))

    def asker(self, template: str | None) -> "Callable[[], Asker]":
        """Makes what asks about pictures; loads the model when it is called."""
        from fastvlm_mlx.album.asking import Asker

        def make() -> Asker:
            engine = self.engine()
            form = self.updating.form
            return Asker(engine.model, engine.processor, form, template=template, batch=self._wanted.batch)

        return make

    def close(self) -> None:
        """Ends the engine, if there is one."""
        if self._engine is not None:
            self._engine.close()


@contextmanager
def prepare(album: "Album", wanted: Wanted) -> Iterator[Prepared]:
    """Finds the model, and out what the index is made with."""
    from fastvlm_mlx.album.captions import read_journals
    from fastvlm_mlx.album.settings import known_settings
    from fastvlm_mlx.album.updating import Updating, default_resolution
    from fastvlm_mlx.config import ModelConfig
    from fastvlm_mlx.engine.options import GenerationConfig
    from fastvlm_mlx.jobs.task import CAPTION, Task

    texts = read_journals(wanted.journals)
    folder = folder_of(wanted.model, wanted.revision)
    settings, known = known_settings(album.index), identity(folder, wanted.dtype)
    native = ModelConfig.from_path(folder).vision_config.image_size
    questions = wanted.questions
    if questions is None:
        questions = {CAPTION: DEFAULT_PROMPT} if settings.questions is None else settings.questions
    task = Task(
        questions=questions,
        model=wanted.model,
        weights=known["weights"],
        dtype=known["dtype"],
        resolution=wanted.resolution or settings.resolution or default_resolution(native),
        background=wanted.background or settings.background,
        config=GenerationConfig(max_tokens=wanted.max_tokens),
    )
    prepared = Prepared(wanted, folder, task, Updating(album, task, texts, retry_errors=wanted.retry_errors))
    try:
        yield prepared
    finally:
        prepared.close()


def bring_up_to_date(album: "Album", prepared: Prepared) -> int:
    """Looks at what has changed in the folder, and shows the model what is new; returns how many failed."""
    from fastvlm_mlx.album.settings import note_settings

    with album.index.updating() as alone:
        if not alone:
            note("another run is bringing the index up to date; this one searches what it holds")
            return 0
        with LiveLine() as line:
            line.wait_for("looking for pictures")
            plan = prepared.updating.plan()
        if plan.vanished:
            _vanished(album, plan)
            return 0
        for each in plan.unreadable[:NAMED]:
            note(f"{each.path}: {each.reason}; what the index has of it is kept")
        _say_what_changes(album, prepared, plan)
        note_settings(album.index, prepared.task)
        return _run(album, prepared, plan)


def _vanished(album: "Album", plan: "Plan") -> None:
    """Says that a folder has no pictures any more.

    Raises:
        ConfigError: If the index has none, either.
    """
    from fastvlm_mlx.album.updating import known_pictures

    reason = f" ({plan.unreadable[0].reason})" if plan.unreadable else ""
    count = known_pictures(album.index)
    if not count:
        raise ConfigError(f"{printable(album.folder)}: there are no pictures{reason}")
    note(
        f"{printable(album.folder)}: there are no pictures{reason}; the index keeps what it knows of "
        f"{counted(count, 'picture')}, and is searched"
    )


def _say_what_changes(album: "Album", prepared: Prepared, plan: "Plan") -> None:
    total = len(plan.todo) + plan.unchanged
    parts = [counted(total, "picture")]
    if plan.gone:
        parts.append(f"{len(plan.gone)} gone")
    if plan.failed:
        parts.append(f"{plan.failed} unreadable (--retry-errors tries them again)")
    if plan.todo:
        parts.append(f"{len(plan.todo)} to look at")
    others = sum(count for form, count in album.index.forms().items() if form != prepared.updating.form)
    if others:
        note(
            f"the index was made with other weights or settings; {counted(others, 'picture')} will be seen again by "
            f"{prepared.task.model} at {prepared.task.resolution} px"
        )
    if plan.todo or plan.gone or others:
        note(", ".join(parts))


def _run(album: "Album", prepared: Prepared, plan: "Plan") -> int:
    """Shows the model what is new; returns how many pictures failed."""
    done = failed = seen = 0
    began = reported = time.monotonic()
    with LiveLine() as line:
        try:
            for step in prepared.updating.run(plan, prepared.engine):
                done += 1
                seen += step.shown
                if step.error is not None:
                    failed += 1
                    if failed <= NAMED:
                        note(step.error if step.name in step.error else f"{step.name}: {step.error}")
                progress = progress_text(done, len(plan.todo), max(time.monotonic() - began, 1e-9))
                line.show(progress)
                if time.monotonic() - reported >= _REPORT_SECONDS:
                    reported = time.monotonic()
                    if not is_terminal():
                        note(progress)
        except KeyboardInterrupt:
            line.clear()
            note(f"interrupted after {done} of {len(plan.todo)} pictures; the same command continues")
            raise
    if plan.todo:
        seconds = max(time.monotonic() - began, 1e-9)
        parts = [f"{done - failed} indexed in {seconds:.1f} s", f"{per_second(done / seconds)} pictures/s"]
        if done - failed - seen > 0:
            parts.append(f"{done - failed - seen} with known content")
        if failed:
            parts.append(f"{failed} failed")
        note(", ".join(parts))
    return failed


class Show:
    """Prints hits.

    Args:
        folder: As it was typed.
        as_json: Whether to print lines of JSON.
        end: What ends each name in a pipe.
    """

    def __init__(self, folder: Path, *, as_json: bool, end: bytes) -> None:
        self._folder = folder
        self._as_json = as_json
        self._end = end
        self._is_terminal = sys.stdout.isatty() and not as_json and end == b"\n"
        self._drawn = 0

    def path(self, hit: "Hit") -> str:
        """The path of a hit, below the folder as it was typed."""
        return os.path.join(self._folder, hit.name)

    def improve(self, results: "Results") -> None:
        """Shows on a terminal what is known so far, in place of what was shown before."""
        if self._is_terminal and is_terminal() and os.environ.get("TERM") != "dumb":
            most = max(1, shutil.get_terminal_size().lines - 2)
            self._draw([self._line(hit) for hit in results.hits[:most]])

    def final(self, results: "Results") -> None:
        """Prints what was found."""
        self._draw([])
        for hit in results.hits:
            if self._as_json:
                show_json(self._record(hit))
            elif self._is_terminal:
                sys.stdout.write(f"{self._line(hit)}\n")
            else:
                sys.stdout.flush()
                sys.stdout.buffer.write(os.fsencode(self.path(hit)) + self._end)
        sys.stdout.flush()

    def _draw(self, lines: list[str]) -> None:
        if not (lines or self._drawn):
            return
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        sys.stdout.write(f"\r{up}{_CLEAR_BELOW}" + "".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
        self._drawn = len(lines)

    def _line(self, hit: "Hit") -> str:
        width = shutil.get_terminal_size().columns - 1
        score = f"{hit.score:.2f}" if hit.probability is not None else "word"
        line = f"{score}  {printable(self.path(hit))}"
        room = width - len(line) - 2
        return _fitting(f"{line}  {printable(hit.caption)}" if room >= 20 and hit.caption else line, width)

    def _record(self, hit: "Hit") -> dict[str, Any]:
        return {"path": self.path(hit), **hit.record()}

    def open(self, paths: "Sequence[Path]") -> None:
        """Opens files in the programs that the desktop has for them.

        Raises:
            ConfigError: If there is no such desktop.
        """
        program = shutil.which("open" if sys.platform == "darwin" else "xdg-open")
        if program is None:
            raise ConfigError("there is no program that opens pictures (xdg-open); print their names instead")
        for path in paths:
            subprocess.run([program, os.path.abspath(path)], check=False, stdout=subprocess.DEVNULL)


def _fitting(text: str, columns: int) -> str:
    """The beginning of a text that fits into so many columns; ideographs take two."""
    for place, char in enumerate(text):
        columns -= 2 if east_asian_width(char) in "FW" else 0 if combining(char) else 1
        if columns < 0:
            return text[:place]
    return text


def find(
    album: "Album",
    query: str,
    asker: "Callable[[], Asker] | None",
    show: Show,
    *,
    top: int | None,
    threshold: float,
    since: str | None,
    seconds: float | None,
) -> "Results":
    """Searches, shows what is found, and returns it.

    Raises:
        KeyboardInterrupt: After showing what is known, if the user has ended the search.
    """
    options: dict[str, Any] = {"top": top, "threshold": threshold, "since": since}
    results = next(album.search(query, None, **options))
    show.improve(results)
    interrupted: KeyboardInterrupt | None = None
    if asker is not None:
        with LiveLine() as line:
            try:
                for results in album.search(query, asker(), seconds=seconds, **options):
                    show.improve(results)
                    line.show(_progress(results))
            except KeyboardInterrupt as err:
                interrupted = err
    show.final(results)
    _summary(album, results, asked=asker is not None)
    if interrupted is not None:
        raise interrupted
    return results


def _progress(results: "Results") -> str:
    rate = results.asked / max(results.seconds, 1e-9)
    return f"asked {results.asked} of {results.total}, {per_second(rate)} a second, {results.found} found"


def _summary(album: "Album", results: "Results", *, asked: bool) -> None:
    parts = [f"{results.found} found" if results.found else "nothing found"]
    if results.found > len(results.hits):
        parts = [f"{len(results.hits)} of {results.found} shown (--top {results.found} shows all)"]
    if asked and results.total:
        of = "" if results.done else f" of {results.total}"
        rate = results.asked / max(results.seconds, 1e-9)
        parts.append(f"{results.asked}{of} asked in {results.seconds:.1f} s, {per_second(rate)} pictures/s")
    elif asked:
        from fastvlm_mlx.album.settings import known_settings

        model = known_settings(album.index).model or "nothing"
        parts.append(f"the index has nothing to ask this model about (it was made with {model}); leave out --no-update")
    note(", ".join(parts))
