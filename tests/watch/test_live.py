"""What is told of a live picture, and when: each test plays a script of frames and answers."""

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from types import SimpleNamespace
from typing import Any

import pytest

from fastvlm_mlx.errors import ImageError, PromptError
from fastvlm_mlx.generation.request import Request
from fastvlm_mlx.inputs.frames import Frame
from fastvlm_mlx.watch import live as module
from fastvlm_mlx.watch.audience import Description, Told
from fastvlm_mlx.watch.live import Live
from fastvlm_mlx.watch.newest import Arrived
from fastvlm_mlx.watch.outputs import Cue
from tests.watch.pictures import BLACK, FakeEngine, Pixels, piece, scene, with_spot

A, B, C = scene(0), scene(1), scene(2)
NO_FRAME: Pixels = BLACK[:0]
Script = Iterator[Pixels]


class Play:
    """A script, and everybody in it. The clock goes on by 0.1 s with every frame."""

    def __init__(self, script: Callable[["Play"], Script], monkeypatch: pytest.MonkeyPatch, **settings: float) -> None:
        self.now = 100.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.engine = FakeEngine()
        self.told: list[str] = []
        self.sentences: list[Told] = []
        self.descriptions: list[Description] = []
        self.cues: list[Cue] = []
        self.notes: list[str] = []
        self.gone_calls: list[bool] = []
        self.count = self.dropped = 0
        self.ended = False
        self._script = script(self)
        self._bell: Callable[[], None] = lambda: None
        settings = {"heartbeat": 0.0, **settings}
        self.live = Live(self._newest, self.engine, self._request, clean=str, audience=self, **settings)

    def run(self) -> "Play":
        self.has_ended = self.live.run()
        return self

    def _newest(self, bell: Callable[[], None]) -> Any:
        self._bell = bell
        return self

    def _request(self, pixels: Any, question: str | None) -> Request:
        return Request(image=pixels, prompt=question or "Describe the image.")

    # The newest frame

    def start(self) -> None:
        self._bell()

    def take(self) -> Arrived | None:
        pixels = next(self._script, None)
        self._bell()
        if pixels is NO_FRAME:
            self.now += 0.1
            return None
        if pixels is None:
            self.ended = True
            if self.engine.handles:
                self.engine.handles[-1].end(CancelledError())
            return None
        self.count += 1
        self.now += 0.1
        return Arrived(Frame(pixels, self.count / 10), self.now)

    # The audience

    def sentence(self, told: Told) -> None:
        self.told.append(told.text)
        self.sentences.append(told)

    def description(self, description: Description) -> None:
        self.descriptions.append(description)

    def cue(self, cue: Cue) -> None:
        self.cues.append(cue)

    def gone(self, *, cut: bool) -> None:
        self.gone_calls.append(cut)

    def note(self, message: str) -> None:
        self.notes.append(message)

    @property
    def asked(self) -> list[Any]:
        return [handle.request.image for handle in self.engine.handles]

    def of(self, *pictures: Pixels) -> bool:
        """Whether the model was asked about just these."""
        return len(self.asked) == len(pictures) and all(
            (one == other).all() for one, other in zip(self.asked, pictures, strict=True)
        )


def many(pixels: Pixels, count: int = 5) -> Script:
    for _ in range(count):
        yield pixels


def moving(count: int, start: int = 50) -> Script:
    for number in range(count):
        yield scene(start + number)


def test_a_sentence_is_told_before_the_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        play.engine.say("A red ball. It")
        yield from many(A)
        assert play.told == ["A red ball."]
        play.engine.end(" lies there.")
        yield from many(A)

    assert Play(script, monkeypatch).run().told == ["A red ball.", "It lies there."]


def test_another_scene_cancels_the_answer_and_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        play.engine.say("A red")
        yield from many(B)
        assert play.engine.handles[0].cancelled
        play.engine.end("A blue ball.")
        yield from many(B)

    play = Play(script, monkeypatch).run()
    assert play.of(A, B)
    assert play.told == ["A blue ball."]


def test_a_sentence_that_comes_with_the_first_frame_of_another_scene_is_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        play.engine.end("A red ball.")
        yield from many(B)
        play.engine.end("A blue ball.")
        yield from many(B)

    assert Play(script, monkeypatch).run().told == ["A blue ball."]


def test_a_sentence_waits_while_something_passes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        play.engine.end("A red ball.")
        for pixels in moving(3):
            yield pixels
            assert play.told == []
        yield from many(A)
        assert play.told == ["A red ball."]

    assert Play(script, monkeypatch).run().of(A)


def test_a_sentence_waits_for_a_frame_that_shows_what_is_there_now(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        yield from many(NO_FRAME, 4)
        play.engine.end("A red ball.")
        yield from many(NO_FRAME, 10)
        assert play.told == []
        yield A
        yield NO_FRAME
        assert play.told == ["A red ball."]

    Play(script, monkeypatch).run()


def test_after_a_sleep_of_the_machine_nothing_is_told_of_what_was_there_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        play.now += 3600
        play.engine.end("A red ball.")
        yield from many(NO_FRAME, 3)
        yield from many(B)
        play.engine.end("A blue ball.")
        yield from many(B)

    play = Play(script, monkeypatch).run()
    assert (play.told, play.live.outdated) == (["A blue ball."], 1)
    assert [each.outdated for each in play.descriptions] == [1]


def test_a_source_that_sends_only_what_is_new_is_told_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        play.engine.end("A red ball.")
        yield from many(NO_FRAME, 30)
        assert play.told == ["A red ball."]

    Play(script, monkeypatch).run()


def test_looks_that_are_rare_show_that_a_scene_is_gone_although_nothing_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        for number in range(4):  # no two looks at the same scene
            play.now += 2
            play.count += 20
            yield scene(50 + number)
        play.engine.handles[0].add([piece("A red ball.", "stop")])
        yield scene(60)

    play = Play(script, monkeypatch).run()
    assert play.told == []
    assert play.engine.handles[0].cancelled


def test_what_moves_is_not_described_by_a_frame_that_is_long_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from moving(20)
        play.now += 5
        play.engine.end("A ball that rolls.")
        yield from moving(20, 80)
        play.engine.end("A ball at rest.")
        yield from moving(3, 110)

    play = Play(script, monkeypatch).run()
    assert (play.told, play.live.outdated) == (["A ball at rest."], 1)


def test_a_cue_ends_soon_after_the_last_look_at_its_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        play.engine.end("A red ball.")
        yield from many(A)
        play.count += 50  # frames that nobody had the time to look at
        yield from many(B)

    [cue] = Play(script, monkeypatch).run().cues
    assert cue.end == pytest.approx(1.0 + 0.2)


def test_a_picture_that_comes_to_rest_counts_as_one_that_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from moving(12)
        yield from many(play.asked[-1], 8)
        play.now += 5  # its description is old, and still true
        play.engine.end("A ball at rest.")
        yield from many(play.asked[-1], 8)
        yield from moving(8, 80)
        yield from many(B)

    play = Play(script, monkeypatch).run()
    assert play.told == ["A ball at rest."]
    assert play.cues[0].end == pytest.approx(2.9)


def test_speech_of_a_scene_that_is_gone_ends_and_an_answer_to_a_person_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def script(play: Play) -> Script:
        for pixels, what in ((A, ""), (B, "now"), (C, "repeat"), (A, "")):
            yield from many(pixels)
            play.engine.end(f"Ball {play.count}.")
            yield from many(pixels)
            if what:
                play.live.order(what)
                yield from many(pixels)
                if what == "now":
                    play.engine.end("A ball.")
                    yield from many(pixels)

    assert Play(script, monkeypatch).run().gone_calls == [True, False, False]


def test_of_a_picture_that_moves_all_the_time_something_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        for number, pixels in enumerate(moving(60)):
            if play.engine.handles and not play.engine.handles[-1].done:
                play.engine.end(f"A ball at place {number}.")
            yield pixels

    assert len(Play(script, monkeypatch).run().told) >= 3


def test_when_scenes_are_shorter_than_answers_that_is_said_and_nothing_of_what_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def script(play: Play) -> Script:
        for number in range(30):
            yield from many(scene(number), 4)

    play = Play(script, monkeypatch).run()
    assert (play.told, play.notes) == ([], ["the picture changes faster than it can be described"])


def test_what_was_told_of_an_answer_that_is_cancelled_is_recorded_and_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        play.engine.say("A red ball. It")
        yield from many(A)
        yield from many(B)
        play.engine.end("A red ball. A cup.")
        yield from many(B)

    play = Play(script, monkeypatch).run()
    assert play.told == ["A red ball.", "A cup."]
    assert [(each.text, each.shown) for each in play.descriptions] == [("A red ball.", True), ("A cup.", True)]
    assert [each.text for each in play.cues] == ["A red ball.", "A red ball. A cup."]


def test_a_clock_that_ticks_faster_than_answers_come_does_not_keep_them_all_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def script(play: Play) -> Script:
        for number in range(8):
            yield from many(with_spot(A, 8 * (number % 6)), 5)
            if number == 5:
                play.engine.end("A desk with a clock.")

    play = Play(script, monkeypatch).run()
    assert play.told == ["A desk with a clock."]
    assert play.engine.handles[0].cancelled
    assert not play.engine.handles[1].cancelled


def test_a_change_that_says_the_same_is_not_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        for pixels in (A, B, C):
            yield from many(pixels)
            play.engine.end("A red ball is here." if pixels is B else "A red ball.")
            yield from many(pixels)

    play = Play(script, monkeypatch).run()
    assert play.told == ["A red ball."]
    assert [each.shown for each in play.descriptions] == [True, False, False]


def test_that_nothing_has_changed_is_neither_told_nor_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        for pixels, text in ((A, "A red ball."), (B, "The scene is unchanged."), (C, "A red ball.")):
            yield from many(pixels)
            play.engine.end(text)
            yield from many(pixels)

    assert Play(script, monkeypatch).run().told == ["A red ball."]


def test_of_an_answer_only_what_is_new_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        for pixels, text in ((A, "A desk. A red cup."), (B, "A desk. A blue cup."), (A, "A desk. A blue cup.")):
            yield from many(pixels)
            play.engine.end(text)
            yield from many(pixels)

    assert Play(script, monkeypatch).run().told == ["A desk.", "A red cup.", "A blue cup."]


def test_a_new_scene_is_urgent_and_a_small_thing_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        for pixels, text in ((A, "One."), (with_spot(A), "Two."), (B, "Three. Four.")):
            yield from many(pixels)
            play.engine.end(text)
            yield from many(pixels)

    play = Play(script, monkeypatch).run()
    assert [(each.text, each.first, each.urgent) for each in play.sentences] == [
        ("One.", True, True),
        ("Two.", True, False),
        ("Three.", True, True),
        ("Four.", False, False),
    ]


def test_black_is_not_asked_about_and_ends_what_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(BLACK)
        yield from many(A)
        play.engine.end("A red ball.")
        yield from many(A)
        yield from many(BLACK)

    play = Play(script, monkeypatch).run()
    assert play.of(A)
    assert play.cues == [Cue(1.1, 1.6, "A red ball.")]
    assert play.gone_calls == [True]


def test_a_cue_lasts_from_when_it_is_told_until_the_scene_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A, 10)
        play.engine.end("A red ball.")
        yield from many(A, 10)
        yield from moving(3)
        yield from many(B, 10)
        play.engine.end("A blue ball.")
        yield from many(B, 5)

    play = Play(script, monkeypatch).run()
    assert [each.text for each in play.cues] == ["A red ball.", "A blue ball."]
    assert play.cues[0].start == pytest.approx(1.1)
    assert play.cues[0].end == pytest.approx(2.1)
    assert play.cues[1].start == pytest.approx(3.4)
    assert play.cues[1].end == pytest.approx(3.8)


def test_a_cue_ends_when_the_picture_begins_to_move_and_never_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A, 10)
        play.engine.end("A red ball.")
        yield from many(A, 10)
        yield from moving(15)
        play.engine.end("A ball that rolls.")
        yield from moving(5, 80)

    play = Play(script, monkeypatch).run()
    assert [each.text for each in play.cues] == ["A red ball.", "A ball that rolls."]
    assert play.cues[0].end == pytest.approx(2.1)
    assert play.cues[1].start == pytest.approx(3.6)


def test_a_heartbeat_asks_again_and_tells_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        for text in ("A ball.", "A ball.", "A cup."):
            yield from many(A, 15)
            play.engine.end(text)
            yield from many(A, 1)

    play = Play(script, monkeypatch, heartbeat=1.0).run()
    assert play.told == ["A ball.", "A cup."]
    assert [each.kind for each in play.descriptions] == ["change", "heartbeat", "heartbeat"]


def test_no_more_is_asked_than_every_so_many_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        for number in range(10):
            yield from many(scene(number), 5)
            if not play.engine.handles[-1].done:
                play.engine.end(f"Ball {number}.")

    assert len(Play(script, monkeypatch, every=2.0).run().asked) == 3


def test_whoever_asks_is_told_even_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        play.engine.end("A red ball.")
        yield from many(A)
        play.live.order("now")
        yield from many(A)
        play.engine.end("A red ball.")
        yield from many(A)
        play.live.order("repeat")
        yield from many(A)

    play = Play(script, monkeypatch).run()
    assert play.told == ["A red ball."] * 3
    assert [(each.again, each.urgent) for each in play.sentences] == [(False, True), (True, True), (True, True)]
    assert [each.kind for each in play.descriptions] == ["change", "now"]


def test_before_a_description_there_is_nothing_to_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        play.live.order("repeat")
        yield from many(A, 1)

    play = Play(script, monkeypatch).run()
    assert (play.told, play.notes) == ([], ["nothing has been described yet"])


def test_a_pause_cancels_the_answer_and_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        play.live.order("pause")
        yield from many(B, 20)
        assert play.engine.handles[0].cancelled
        assert play.of(A)
        play.live.order("pause")
        yield from many(B)
        assert play.of(A, B)

    play = Play(script, monkeypatch).run()
    assert play.notes == ["paused; p goes on", "watching again"]


def test_a_question_is_about_the_picture_at_which_it_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        play.engine.end("A red ball.")
        yield from many(A)
        play.live.order("hold")
        yield from many(A, 1)
        yield from many(B, 10)
        play.live.order("ask", "How many?")
        yield from many(B)
        assert play.engine.handles[-1].request.prompt == "How many?"
        play.engine.end("Three. The scene is unchanged.")
        yield from many(B)
        play.engine.end("A red ball.")
        yield from many(B)

    play = Play(script, monkeypatch).run()
    assert play.of(A, A, B)
    assert play.told == ["A red ball.", "Three."]  # and what was told before the question is still known
    assert play.descriptions[1].question == "How many?"


def test_no_question_goes_on_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        play.live.order("hold")
        yield from many(A)
        play.live.order("ask", None)
        yield from many(B)
        assert play.of(A, B)

    Play(script, monkeypatch).run()


def test_leaving_ends_at_once_and_cancels_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        play.live.order("leave")
        yield from many(A, 100)

    play = Play(script, monkeypatch).run()
    assert play.count < 10
    assert not play.has_ended
    assert play.engine.handles[0].cancelled


def test_an_answer_that_fails_ends_the_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        play.engine.end(error=PromptError("too long"))
        yield from many(A)

    with pytest.raises(PromptError, match="too long"):
        Play(script, monkeypatch).run()


def test_an_answer_that_was_cancelled_elsewhere_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        play.engine.end(error=CancelledError())
        yield from many(A)

    assert Play(script, monkeypatch).run().told == []


def test_what_a_camera_that_is_unplugged_showed_is_a_whole_cue(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        play.engine.end("A red ball.")
        yield from many(A)
        raise ImageError("@camera: no more frames")

    play = Play(script, monkeypatch)
    with pytest.raises(ImageError, match="no more frames"):
        play.run()
    assert [each.text for each in play.cues] == ["A red ball."]


def test_a_stream_that_ends_within_a_change_ends_the_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        play.engine.end("A red ball.")
        yield B

    play = Play(script, monkeypatch).run()
    assert play.told == []


def test_a_description_has_its_age_and_the_frames_that_were_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(play: Play) -> Script:
        yield from many(A)
        play.dropped = 7
        play.engine.end("A red ball.")
        yield from many(A, 1)

    [description] = Play(script, monkeypatch).run().descriptions
    assert (description.time, description.dropped, description.shown) == (0.2, 7, True)
    assert description.age == pytest.approx(0.4)
