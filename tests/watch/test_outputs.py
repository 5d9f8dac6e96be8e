"""Subtitles, the log and the command that is run at a change."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.watch.outputs import Cue, Hook, Joined, Log, Subtitles, clock, short_clock


def joined(*cues: Cue) -> list[Cue]:
    found: list[Cue] = []
    join = Joined(found.append)
    for cue in cues:
        join.add(cue)
    join.finish()
    return found


def test_one_text_that_goes_on_is_one_cue() -> None:
    assert joined(Cue(0, 1, "a"), Cue(1, 2, "a"), Cue(2.4, 3, "a"), Cue(3, 4, "b")) == [Cue(0, 3, "a"), Cue(3, 4, "b")]


def test_a_text_that_comes_back_is_another_cue() -> None:
    assert joined(Cue(0, 1, "a"), Cue(3, 4, "a")) == [Cue(0, 1, "a"), Cue(3, 4, "a")]


def test_what_is_too_short_to_read_or_has_no_text_is_no_cue() -> None:
    assert joined(Cue(0, 0.1, "a"), Cue(0.1, 3, ""), Cue(3, 4, "b")) == [Cue(3, 4, "b")]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "00:00:00,000"), (3599.9996, "01:00:00,000"), (36001.5, "10:00:01,500")]
)
def test_times_of_subtitles(seconds: float, text: str) -> None:
    assert clock(seconds, ",") == text


def test_times_for_people() -> None:
    assert [short_clock(each) for each in (0, 63.9, 3601)] == ["0:00", "1:03", "1:00:01"]


def test_subtitles_hold_no_line_that_is_none_of_theirs() -> None:
    written: list[str] = []
    Subtitles(written.append, vtt=False).cue(Cue(0, 1.5, "a --> b\n\n2\n"))
    assert written == ["1\n00:00:00,000 --> 00:00:01,500\na -> b\n2\n\n"]
    written.clear()
    Subtitles(written.append, vtt=True).cue(Cue(0, 1.5, "<b> & c"))
    assert written == ["WEBVTT\n\n", "1\n00:00:00.000 --> 00:00:01.500\n&lt;b> &amp; c\n\n"]


def test_a_log_grows_and_keeps_what_was_in_it(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for text in ("one", "two"):
        with Log(path) as log:
            log.add({"text": text})
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["one", "two"]


def test_a_line_that_was_cut_off_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"text": "one"}\n{"te')
    with Log(path) as log:
        log.add({"text": "two"})
    assert path.read_text() == '{"text": "one"}\n{"te\n{"text": "two"}\n'


def test_only_its_owner_can_read_a_new_log(tmp_path: Path) -> None:
    with Log(tmp_path / "log"):
        assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"a film", b'{"image": "x"}\n', b"[1]\n", b"\xff\xd8\xff"])
def test_a_file_that_is_no_log_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "holiday.mp4"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"holiday\.mp4: is not a log of fastvlm watch, and nothing was written"):
        Log(path)
    assert path.read_bytes() == content


def test_a_log_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing/log"):
        Log(tmp_path / "missing" / "log")


SCRIPT = (
    "import os,sys; open(sys.argv[1],'a').write(repr((sys.stdin.read(),os.environ['FASTVLM_TEXT'],sys.argv[2:]))+'\\n')"
)


def test_a_command_gets_the_text_and_no_shell_does(tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = "$(touch injected); `id` 'x' \"y\" && é"
    hook = Hook(f'{sys.executable} -c "{SCRIPT}" {out} $HOME "two words"', print)
    hook.run(text, {"FASTVLM_TIME": "1"})
    assert hook.finish(60)
    assert out.read_text() == repr((text, text, ["$HOME", "two words"])) + "\n"
    assert not Path("injected").exists()


def test_of_what_waits_for_a_command_only_the_newest_is_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    hook = Hook(f"sh -c 'cat >> {out}; while [ ! -e {tmp_path}/go ]; do sleep 0.01; done'", print)
    for text in ("a", "b", "c", "d"):
        hook.run(text, {})
        while text == "a" and not (out.exists() and out.read_text()):
            time.sleep(0.01)
    (tmp_path / "go").touch()
    assert hook.finish(60)
    assert out.read_text() == "ad"


def test_for_a_film_a_command_is_run_for_each(tmp_path: Path) -> None:
    out = tmp_path / "out"
    hook = Hook(f"sh -c 'cat >> {out}'", print)
    for text in "abcd":
        hook.run(text, {}, each=True)
    assert hook.finish(60)
    assert out.read_text() == "abcd"


def test_a_command_that_fails_is_noted_once() -> None:
    notes: list[str] = []
    hook = Hook("sh -c 'exit 7'", notes.append)
    for text in "ab":
        hook.run(text, {}, each=True)
    assert hook.finish(60)
    assert notes == ["--on-change: sh ended with exit code 7"]


def limit_once(is_so: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the time of a command begin when something is so of its text, or it has ended; its start may be held up."""
    communicate = subprocess.Popen.communicate

    def wait(process: Any, text: bytes, limit: float) -> Any:
        process.stdin.write(text)
        process.stdin.close()
        process.stdin = None
        while process.poll() is None and not is_so(text.decode().strip()):
            time.sleep(0.01)
        return communicate(process, None, limit)

    monkeypatch.setattr(subprocess.Popen, "communicate", wait)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def wait_until_ended(process: int) -> None:
    """Waits for a process that was killed: it ends only when it gets a processor; nobody may have reaped it."""
    state, deadline = Path(f"/proc/{process}/stat"), time.monotonic() + 30  # what is not killed sleeps for 60 s
    while time.monotonic() < deadline:
        try:
            if state.read_text().rpartition(")")[2].split()[0] in "ZX":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.01)
    pytest.fail(f"process {process} still runs")


def test_a_command_that_hangs_is_ended_with_what_it_started_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_once(lambda text: read(tmp_path / "started").count("\n") == "abc".index(text) + 1, monkeypatch)
    notes: list[str] = []
    command = f"sh -c 'cat >> {tmp_path}/ran; sleep 60 & echo $! >> {tmp_path}/started; wait'"
    hook = Hook(command, notes.append, limit=0.3)
    for text in "abcdef":
        hook.run(text, {}, each=True)
    assert hook.finish(60)
    assert notes == [
        "--on-change: sh has not ended within 0.3 s, and was ended",
        "--on-change: sh has not ended in time 3 times in a row; it is not run any more",
    ]
    assert (tmp_path / "ran").read_text() == "abc"
    for process in (tmp_path / "started").read_text().split():
        wait_until_ended(int(process))


def test_a_command_that_is_slow_now_and_then_is_not_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_once(lambda text: text != "c" and text in read(tmp_path / "ran"), monkeypatch)
    hook = Hook(f"sh -c 'read x; echo $x >> {tmp_path}/ran; if [ $x != c ]; then sleep 60; fi'", [].append, limit=0.3)
    for text in "abcd":
        hook.run(f"{text}\n", {}, each=True)
    assert hook.finish(60)
    assert (tmp_path / "ran").read_text().split() == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("command", "message"),
    [("", "no such program"), ("no-such-program x", "no-such-program: there is no such"), ("'", "cannot be read")],
)
def test_a_command_that_cannot_be_run_is_refused_at_once(command: str, message: str) -> None:
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else None
    with pytest.raises(ConfigError, match=message):
        Hook(command, print)
    if threads is not None:
        assert len(os.listdir("/proc/self/task")) <= threads  # another test may leave one that ends
