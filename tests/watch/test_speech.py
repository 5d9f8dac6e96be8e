"""Programs that speak: in order, the newest first of all, interrupted, missing, failing and hanging."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastvlm_mlx.watch.speech import Speaker, Voice, find_voice

# Takes the place of espeak-ng: lets it write the sound to a file, and lasts as long as the sound.
RECORDER = """#!{python}
import json, os, subprocess, sys, time, wave
log, folder = {log!r}, {folder!r}
text = sys.stdin.read()
def note(what):
    with open(log, "a") as file:
        file.write(json.dumps([what, text, time.time()]) + "\\n")
note("begins")
seconds = {seconds}
if {real!r}:
    name = os.path.join(folder, str(time.time()) + ".wav")
    subprocess.run([{real!r}, *sys.argv[1:], "-w", name], input=text, text=True, check=True)
    with wave.open(name) as sound:
        seconds = sound.getnframes() / sound.getframerate() * (0.2 if len(text) < 80 else 20)
note("sounds")
while {gate!r} and not os.path.exists({gate!r}):
    time.sleep(0.01)
time.sleep(seconds)
note("ends")
"""


class Recorded:
    """A program that records what it is told to speak."""

    def __init__(self, folder: Path, seconds: float, real: str = "", gate: str = "") -> None:
        self.log = folder / "log"
        self.program = folder / "espeak-ng"
        values = {"log": str(self.log), "folder": str(folder), "seconds": seconds, "real": real, "gate": gate}
        self.program.write_text(RECORDER.format(python=sys.executable, **values))
        self.program.chmod(0o755)

    @property
    def ends(self) -> list[tuple[str, str]]:
        return [event for event in self.events if event[0] != "sounds"]

    @property
    def events(self) -> list[tuple[str, str]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(what, text) for what, text, _ in map(json.loads, lines)]

    def wait_for(self, *event: str) -> None:
        deadline = time.monotonic() + 60
        while event not in self.events:
            assert time.monotonic() < deadline, self.events
            time.sleep(0.01)


@pytest.fixture
def notes() -> list[str]:
    return []


Start = Callable[..., tuple[Speaker, Recorded]]


@pytest.fixture
def start(tmp_path: Path, notes: list[str]) -> Iterator[Start]:
    speakers: list[Speaker] = []

    def begin(seconds: float = 0.0, real: str = "", gate: str = "", **options: float) -> tuple[Speaker, Recorded]:
        recorded = Recorded(tmp_path, seconds, real, gate)
        speaker = Speaker(Voice(program="espeak-ng", path=str(recorded.program)), notes.append, **options)
        speakers.append(speaker)
        return speaker, recorded

    yield begin
    for speaker in speakers:
        speaker.close()


def test_sentences_are_spoken_one_after_the_other(start: Start) -> None:
    speaker, recorded = start()
    for sentence in ("One.", "Two.", "Three."):
        speaker.add(sentence)
    assert speaker.wait(60)
    expected = [(what, text) for text in ("One.", "Two.", "Three.") for what in ("begins", "ends")]
    assert recorded.ends == expected


def test_an_interruption_ends_the_sentence_and_what_waits(start: Start, notes: list[str]) -> None:
    speaker, recorded = start(seconds=600)
    speaker.add("Old.")
    speaker.add("Old, too.")
    recorded.wait_for("begins", "Old.")
    speaker.interrupt()
    speaker.add("New.")
    recorded.wait_for("begins", "New.")
    assert recorded.ends == [("begins", "Old."), ("begins", "New.")]
    assert notes == []


def test_what_is_forgotten_is_not_spoken_and_the_sentence_is_ended(start: Start, tmp_path: Path) -> None:
    speaker, recorded = start(gate=str(tmp_path / "go"))
    speaker.add("First.")
    speaker.add("Second.")
    recorded.wait_for("begins", "First.")
    speaker.forget()
    speaker.add("Third.")
    (tmp_path / "go").touch()
    assert speaker.wait(60)
    assert [text for what, text in recorded.events if what == "ends"] == ["First.", "Third."]


def test_the_same_is_not_spoken_twice_unless_somebody_wants_it(start: Start) -> None:
    speaker, recorded = start()
    speaker.add("A red car.")
    speaker.add("The car is red.")
    speaker.add("There is a red car.")
    assert speaker.wait(60)
    speaker.add("A red car.", again=True)
    assert speaker.wait(60)
    spoken = [text for what, text in recorded.events if what == "begins"]
    assert spoken == ["A red car.", "The car is red.", "There is a red car.", "A red car."]
    speaker.add("The red car.")
    assert speaker.wait(60)
    assert len(recorded.ends) == 8


def test_closing_ends_the_program(start: Start) -> None:
    speaker, recorded = start(seconds=600)
    speaker.add("Long.")
    recorded.wait_for("begins", "Long.")
    began = time.monotonic()
    speaker.close()
    assert time.monotonic() - began < 300
    assert recorded.ends == [("begins", "Long.")]


def test_a_program_that_hangs_is_ended(start: Start, notes: list[str]) -> None:
    speaker, recorded = start(seconds=600, patience=-0.5)
    speaker.add("Hi")
    assert speaker.wait(60)
    assert notes[0].startswith("espeak-ng has not ended after ")
    assert ("ends", "Hi") not in recorded.events


@pytest.mark.parametrize("path", ["/missing/espeak-ng", "/bin/false"])
def test_a_program_that_fails_is_given_up(path: str, notes: list[str]) -> None:
    with Speaker(Voice(program="espeak-ng", path=path), notes.append) as speaker:
        for number in range(5):
            speaker.add(f"Number {number}.")
        assert speaker.wait(60)
        assert not speaker.works
    assert len(notes) == 2
    assert "the sentence was not spoken" in notes[0]
    assert "has failed 3 times; descriptions are only shown from now" in notes[1]


def test_no_argument_of_a_program_is_what_the_model_has_said() -> None:
    sentence = "--version; $(reboot)"
    for program in ("say", "espeak-ng"):
        command, text = Voice(program=program, path=program, name="anna", rate=200).command(sentence)
        assert sentence not in command
        assert (text, command[1:5:3]) == (sentence, ["-v", "200"])
    command, text = Voice(program="spd-say", path="spd-say", rate=80).command(sentence)
    assert command == ["spd-say", "--wait", "-r", "-100", "--", sentence]


@pytest.mark.parametrize(("words", "rate"), [(80, "-100"), (175, "0"), (390, "100"), (500, "100")])
def test_words_a_minute_for_speech_dispatcher(words: int, rate: str) -> None:
    command, _ = Voice(program="spd-say", path="spd-say", rate=words).command("x")
    assert command[3] == rate


def test_a_voice_is_that_of_a_program_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_voice("auto") is None
    assert find_voice("espeak-ng") is None
    (tmp_path / "espeak-ng").write_text("#!/bin/sh\n")
    (tmp_path / "espeak-ng").chmod(0o755)
    voice = find_voice("espeak-ng", "en", 200)
    assert voice == Voice(program="espeak-ng", path=os.path.join(tmp_path, "espeak-ng"), name="en", rate=200)


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng is not installed")
def test_espeak_records_what_is_spoken_in_order_and_what_is_interrupted_has_no_end(
    start: Start, tmp_path: Path
) -> None:
    speaker, recorded = start(real=shutil.which("espeak-ng") or "")
    long = "A red circle, a blue square, a green triangle, a yellow star, a white cross and a black ring. " * 3
    speaker.add("One.")
    speaker.add(long)
    speaker.add("This is out of date.")
    recorded.wait_for("sounds", long)
    speaker.interrupt()
    speaker.add("A taxi.")
    assert speaker.wait(60)
    assert recorded.ends == [
        ("begins", "One."),
        ("ends", "One."),
        ("begins", long),
        ("begins", "A taxi."),
        ("ends", "A taxi."),
    ]
    sounds = sorted(tmp_path.glob("*.wav"))
    assert len(sounds) == 3
    assert min(sound.stat().st_size for sound in sounds) > 5_000
