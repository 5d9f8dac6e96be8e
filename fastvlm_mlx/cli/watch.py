"""`fastvlm watch`: tells what a camera, a screen or a film shows."""

import sys
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm_mlx.cli.keys import HELP as KEYS
from fastvlm_mlx.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_PROMPT,
    LoadDType,
    Model,
    Resolution,
    Revision,
    choices,
    refuse,
    user_path,
)
from fastvlm_mlx.cli.terminal import ByteProgress, LiveLine, note, show, warn_of_slow_blas
from fastvlm_mlx.cli.usage import is_given
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.formatting import counted

if TYPE_CHECKING:
    from fastvlm_mlx.cli.watching import Teller
    from fastvlm_mlx.generation.engine import Engine
    from fastvlm_mlx.inputs.frames import Stream
    from fastvlm_mlx.watch.speech import Speaker
    from fastvlm_mlx.watch.tasks import Task

_LOOKS = 10.0
"""Frames a second that are looked at."""
_LIVE_RESOLUTION = 512
"""Pixels per side for live pictures: 64 visual tokens rather than 256, so that words come sooner."""
_LIVE_KEPT = 64_000_000
"""Bytes of earlier prompts that are kept, for a question about the picture that was described; of films none are."""
_FILM_ROWS = 4
"""Scenes of a film that are answered together."""


class TaskName(Enum):
    """What to tell."""

    describe = "describe"
    read = "read"
    people = "people"
    hazards = "hazards"
    find = "find"


class Form(str, Enum):
    """How to write it."""

    text = "text"
    jsonl = "jsonl"
    srt = "srt"
    vtt = "vtt"


class Speak(str, Enum):
    """Who speaks."""

    auto = "auto"
    say = "say"
    spd_say = "spd-say"
    espeak_ng = "espeak-ng"
    none = "none"


def watch(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="@camera, @camera:1, @screen, @window:TITLE, a film file, or a URL (http, rtsp). [default: @camera]",
            show_default=False,
        ),
    ] = "@camera",
    task: Annotated[
        TaskName,
        typer.Option(
            metavar=choices(TaskName),
            help="What to tell: the scene, the text in it, the people, what is dangerous to somebody who walks, or "
            "whether --find is there.",
        ),
    ] = TaskName.describe,
    find: Annotated[
        str | None, typer.Option(metavar="THING", help="Say whether this is to be seen, such as 'a set of keys'.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Your own question instead of the task's.")
    ] = None,
    speak: Annotated[
        Speak,
        typer.Option(
            metavar=choices(Speak),
            envvar="FASTVLM_SPEAK",
            help="The program that speaks. auto speaks what is live where stdout is a terminal; with a screen reader, "
            "choose none.",
        ),
    ] = Speak.auto,
    voice: Annotated[
        str | None, typer.Option(metavar="NAME", envvar="FASTVLM_VOICE", help="A voice, as that program calls it.")
    ] = None,
    rate: Annotated[
        int | None,
        typer.Option(metavar="N", min=80, max=500, envvar="FASTVLM_SPEECH_RATE", help="Words a minute."),
    ] = None,
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    form: Annotated[
        Form, typer.Option("--format", metavar=choices(Form), help="Lines, JSON lines, or subtitles.")
    ] = Form.text,
    log: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=user_path, help="Add every answer to this file of JSON lines."),
    ] = None,
    on_change: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Run this, without a shell, whenever something new is told; it gets the text on stdin and as "
            "$FASTVLM_TEXT, and has 60 s.",
        ),
    ] = None,
    every: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0.0, max=86400.0, help="At most one description in so many seconds; 0 sets no limit."
        ),
    ] = 0.0,
    heartbeat: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.0,
            max=86400.0,
            help="Look again after so many seconds though nothing seems to have changed; 0 never does.",
        ),
    ] = 30.0,
    change: Annotated[
        float,
        typer.Option(
            metavar="LEVELS",
            min=1.0,
            max=255.0,
            help="How much the smallest part of the picture must change, of 255 levels; lower notices more.",
        ),
    ] = 16.0,
    max_fps: Annotated[
        float, typer.Option(metavar="N", min=0.1, max=120.0, help="Look at no more frames a second than this.")
    ] = _LOOKS,
    live: Annotated[bool, typer.Option("--live", help="Watch a film by the clock, as a camera is watched.")] = False,
    resolution: Resolution = None,
    dtype: LoadDType = None,
    list_sources: Annotated[
        bool, typer.Option("--list-sources", help="List cameras, screens and windows, and exit.")
    ] = False,
) -> None:
    """Say what a camera, a screen or a film shows, and again whenever that has changed.

    Without options it watches the camera and speaks. Nothing is recorded or sent anywhere. While it runs, press space
    for a description now, r to repeat the last one, p to pause, ? to ask a question of your own, q or Ctrl-C to end.

    A film is described scene by scene, as fast as it can be: `fastvlm watch film.mp4 --format srt > film.srt` writes
    subtitles for people who cannot see it.

    Descriptions can be wrong. Do not rely on them to cross a street, or for anything else that your safety depends on.
    """
    if list_sources:
        from fastvlm_mlx.inputs.video import list_sources as found

        show("\n".join(f"{each.name}  {each.title}" for each in found()))
        return
    if find is not None and task is not TaskName.find:
        refuse({"--task": is_given(context, "task")}, "with --find")
        task = TaskName.find
    if task is TaskName.find and not (find or "").strip():
        raise typer.BadParameter("say what to find with --find, such as --find 'a red cup'", param_hint="--task")
    if prompt is not None:
        refuse({"--find": find}, "with --prompt")
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("the question is empty", param_hint="--prompt")

    from fastvlm_mlx.checkpoint.released import DEMO
    from fastvlm_mlx.inputs.video import open_stream
    from fastvlm_mlx.watch.outputs import Hook, Log
    from fastvlm_mlx.watch.tasks import task_of

    if prompt is None and task is TaskName.describe and model == DEMO:
        prompt = DEFAULT_PROMPT  # the demo model knows few words, and these are the ones
    asked = task_of(task.value, thing=find, prompt=prompt)
    with ExitStack() as stack:
        lines = stack.enter_context(Log(log)) if log is not None else None
        hook = Hook(on_change, note) if on_change is not None else None
        stream = stack.enter_context(open_stream(source, rate=max_fps, notify=note))
        is_live = stream.live or live
        if not is_live:
            given = [f"--{name}" for name in ("voice", "rate", "speak") if is_given(context, name)]
            refuse([] if speak is Speak.none else given, "for a film by its own time; add --live")
        speaker = _speaker(speak, voice, rate, stack) if is_live else None
        engine = stack.enter_context(_load(model, revision, dtype, rows=1 if is_live else _FILM_ROWS))
        if resolution is None and is_live and task is not TaskName.read:
            resolution = min(engine.processor.image_size, _LIVE_RESOLUTION)

        from fastvlm_mlx.cli.watching import Teller

        facts = {"source": source, "model": model, "task": task.value, "prompt": asked.prompt}
        teller = Teller(form.value, facts, log=lines, hook=hook, speaker=speaker)
        settings = {"every": every, "heartbeat": heartbeat, "least": change}
        try:
            if is_live:
                has_ended = _watch_live(stream, engine, asked, teller, resolution, settings)
                if has_ended and speaker is not None:
                    speaker.wait(60)
            else:
                _watch_film(stream, engine, asked, teller, resolution, settings)
        except FastVLMError as error:
            if speaker is not None:
                speaker.interrupt()
                speaker.add(f"The watching has ended. {error}")
                speaker.wait(15)
            raise
        finally:
            stream.close()  # the camera first
            teller.finish()
        if hook is not None and not hook.finish(10):
            note("--on-change: still runs, and is left alone")


def _speaker(speak: Speak, voice: str | None, rate: int | None, stack: ExitStack) -> "Speaker | None":
    """What speaks; None for nothing."""
    from fastvlm_mlx.watch.speech import Speaker, find_voice

    if speak is Speak.none or (speak is Speak.auto and not sys.stdout.isatty()):
        return None
    found = find_voice(speak.value, voice, rate)
    if found is None:
        what = "spd-say or espeak-ng" if speak is Speak.auto else speak.value
        note(f"nothing is spoken: {what} was not found on $PATH; descriptions are shown")
        return None
    return stack.enter_context(Speaker(found, note))


def _load(model: str, revision: str | None, dtype: Any, *, rows: int) -> "Engine":
    from fastvlm_mlx.engine.prefix_cache import PrefixCache
    from fastvlm_mlx.generation.engine import Engine
    from fastvlm_mlx.resolve import load

    with LiveLine() as line, ByteProgress() as progress:
        line.wait_for(f"loading {model}")
        network, processor = load(
            model, dtype=dtype.value if dtype else None, revision=revision, notify=note, progress=progress
        )
    warn_of_slow_blas()
    return Engine(network, processor, max_batch=rows, prefix_cache=PrefixCache(_LIVE_KEPT if rows == 1 else 0))


def _watch_live(
    stream: "Stream", engine: "Engine", task: "Task", teller: "Teller", resolution: Any, settings: dict[str, float]
) -> bool:
    """Watches by the clock, with keys where there is a terminal; returns whether the stream has ended."""
    from fastvlm_mlx.cli.keys import Keys
    from fastvlm_mlx.watch.live import Live
    from fastvlm_mlx.watch.newest import Newest, paced
    from fastvlm_mlx.watch.tasks import request_of

    frames = iter(stream) if stream.live else paced(stream)
    watcher = Live(
        lambda bell: Newest(frames, bell),
        engine,
        lambda pixels, question: request_of(task, pixels, resolution=resolution, question=question),
        clean=task.clean,
        audience=teller,
        **settings,
    )
    with Keys(watcher.order) as keys:
        width, height = stream.size
        teller.note(f"watching {stream.name}, {width}×{height}{f'; {KEYS}' if keys.works else ''}", "watching")
        try:
            return watcher.run()
        finally:
            stream.close()
            watcher.newest.join(2)
            if watcher.outdated:
                note(f"{counted(watcher.outdated, 'description')} not told: what they were about was gone")


def _watch_film(
    stream: "Stream", engine: "Engine", task: "Task", teller: "Teller", resolution: Any, settings: dict[str, float]
) -> None:
    """Describes a film scene by scene."""
    from fastvlm_mlx.watch.film import Film
    from fastvlm_mlx.watch.outputs import short_clock
    from fastvlm_mlx.watch.tasks import request_of

    length = f" of {short_clock(stream.duration)}" if stream.duration else ""
    with LiveLine() as line:
        film = Film(
            stream,
            engine,
            lambda pixels: request_of(task, pixels, resolution=resolution),
            clean=task.clean,
            progress=lambda time: line.wait_for(f"watching, {short_clock(time)}{length}"),
            **settings,
        )
        for cue in film.cues():
            line.clear()
            teller.scene(cue)
