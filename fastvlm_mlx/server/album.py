"""The album of a server: its index, brought up to date in the background, behind whoever asks a question."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from fastvlm_mlx.album.album import Album
from fastvlm_mlx.album.asking import Asker
from fastvlm_mlx.album.database import DamagedIndexError
from fastvlm_mlx.album.settings import known_settings, note_settings
from fastvlm_mlx.album.updating import Updating, default_resolution, form_of, known_pictures
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.errors import ConfigError, FastVLMError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.generation.engine import Engine
from fastvlm_mlx.generation.request import Handle, Request
from fastvlm_mlx.inputs.prompts import DEFAULT_PROMPT
from fastvlm_mlx.jobs.task import CAPTION, Task

State: TypeAlias = Literal["waiting", "looking", "indexing", "ready", "elsewhere", "missing", "failed"]

CAPTION_TOKENS = 64
AT_ONCE = 2
"""Pictures that the engine gets at a time, so that a question finds room in its next step."""
ASKED_AT_ONCE = 4
"""Pictures that a search asks about at a time; a question waits for no more than these."""
LOOK_SECONDS = 60.0
"""After which the folder is looked at again."""
REPAIR_SECONDS = 5.0
"""After which an index that was found to be damaged is made anew, again and again if need be."""
PATIENCE = 10.0
"""Seconds that a picture waits at most for those who ask questions, so that the index gets ready under load, too."""

log = logging.getLogger(__name__)


class ServedAlbum:
    """An album that a server searches.

    Args:
        folder: The folder of pictures.
        index: The file of the index; None for one in the cache.

    Attributes:
        album: The album.
        name: What people call it: the last part of the folder's path.

    Raises:
        ConfigError: If the folder is none, or its index cannot be used.
    """

    def __init__(self, folder: Path, index: Path | None = None) -> None:
        if not folder.is_dir():
            raise ConfigError(f"--album {printable(folder)}: no such folder")
        self.album = Album(folder, index)
        self.name = Path(self.album.folder).name or self.album.folder
        self._is_busy: Callable[[], bool] = lambda: False
        self._stopped = threading.Event()
        self._due = threading.Event()
        self._is_damaged = False
        self._thread: threading.Thread | None = None
        self._asker: Asker | None = None
        self._searching = 0
        self._lock = threading.Lock()
        self._state: State = "waiting"
        self._done = self._total = self._failed = 0
        self._error = ""

    def start(self, engine: Engine, model: str, weights: str, *, is_busy: Callable[[], bool] = lambda: False) -> None:
        """Begins to bring the index up to date.

        Args:
            engine: With the model.
            model: Its name.
            weights: Its `checkpoint_fingerprint`.
            is_busy: Whether somebody waits for an answer; the index then waits.
        """
        self._is_busy = is_busy
        known = known_settings(self.album.index)
        task = Task(
            questions={CAPTION: DEFAULT_PROMPT} if known.questions is None else known.questions,
            model=model,
            weights=weights,
            dtype=str(engine.model.dtype).rpartition(".")[2],
            resolution=known.resolution or default_resolution(engine.processor.image_size),
            background=known.background,
            config=GenerationConfig(max_tokens=CAPTION_TOKENS),
        )
        assert isinstance(task.resolution, int)
        form = form_of(weights, task.resolution, task.background)
        self._asker = Asker(engine.model, engine.processor, form, batch=ASKED_AT_ONCE)
        self._thread = threading.Thread(target=self._run, args=(engine, task), name="fastvlm-album", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends what goes on in the background; the engine is needed no more."""
        self._stopped.set()
        self._due.set()
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Ends what goes on in the background, and lets go of the index; nothing can be searched any more."""
        self.stop()
        self.album.close()

    def status(self) -> dict[str, Any]:
        """What the index holds, and how far it is; of one that cannot be read, that it holds nothing."""
        pictures = 0
        try:
            pictures = known_pictures(self.album.index)
        except ConfigError as err:
            self.notice(err)
        return {
            "name": self.name,
            "pictures": pictures,
            "state": self._state,
            "done": self._done,
            "total": self._total,
            "failed": self._failed,
            "error": self._error,
        }

    def notice(self, error: ConfigError) -> None:
        """Takes note that the index could not be read; one that is damaged is made anew soon."""
        log.warning("album: %s", error)
        self._state, self._error = "failed", str(error).removeprefix(f"{printable(self.album.index.path)}: ")
        if isinstance(error, DamagedIndexError) and not self._is_damaged:
            self._is_damaged = True
            self._due.set()

    @contextmanager
    def asking(self) -> Iterator[Asker | None]:
        """What asks the model for a search, None while it loads; the index waits meanwhile."""
        with self._lock:
            self._searching += 1
        try:
            yield self._asker
        finally:
            with self._lock:
                self._searching -= 1

    def _run(self, engine: Engine, task: Task) -> None:
        """Brings the index up to date again and again, until `close`."""
        patient = _Patient(engine, self._wait_for_others)
        while not self._stopped.is_set():
            self._due.clear()
            try:
                self._update(patient, task)
            except FastVLMError as err:
                if self._stopped.is_set() or not engine.is_alive:
                    return
                self.notice(ConfigError(str(err)) if not isinstance(err, ConfigError) else err)
                if self._is_damaged:
                    self._stopped.wait(REPAIR_SECONDS)
                    continue
            self._due.wait(LOOK_SECONDS)

    def _update(self, engine: _Patient, task: Task) -> None:
        index = self.album.index
        with index.updating() as alone:
            if not alone:
                self._state = "elsewhere"
                return
            if self._is_damaged or not index.path.exists():
                log.warning("album: %s: is made anew", printable(index.path))
                self._state = "looking"
                index.rebuild()
                self._is_damaged = False
            if self._state != "ready":
                self._state = "looking"
            updating = Updating(self.album, task)
            plan = updating.plan()
            if plan.vanished:
                self._state = "missing"
                return
            note_settings(index, task)
            self._done, self._total, self._failed, self._error = 0, len(plan.todo), plan.failed, ""
            if plan.todo:
                self._state = "indexing"
            steps = updating.run(plan, lambda: cast(Engine, engine))
            for step in steps:
                self._done += 1
                if step.error is not None:
                    self._failed += 1
                    log.info("album: %s", step.error)
                if self._stopped.is_set():
                    return
            self._state = "ready"

    def _wait_for_others(self) -> None:
        """Lets questions and searches go first."""
        deadline = time.monotonic() + PATIENCE
        while (self._is_busy() or self._searching) and time.monotonic() < deadline:
            if self._stopped.wait(0.05):
                return


class _Patient:
    """An engine that takes few pictures at a time, and these behind all others; as far as `Updating` needs it.

    Args:
        engine: What answers.
        wait: Waits for others.
    """

    def __init__(self, engine: Engine, wait: Callable[[], None]) -> None:
        self.processor = engine.processor
        self._engine = engine
        self._wait = wait
        self._open: deque[Handle] = deque()

    @property
    def model(self) -> Any:
        """The model, for a tower that is shown pictures alone; they wait for others, too."""
        self._wait()
        return self._engine.model

    def submit(self, request: Request) -> Handle:
        """Asks a question, after waiting for room."""
        while len(self._open) >= AT_ONCE:
            self._open.popleft().wait()
        self._wait()
        self._open.append(self._engine.submit(request))
        return self._open[-1]
