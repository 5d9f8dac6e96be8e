import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx.chat.conversation import Conversation, Turn
from fastvlm_mlx.chat.pictures import Picture
from fastvlm_mlx.chat.session import Keeper, load, save
from fastvlm_mlx.chat.settings import Settings
from fastvlm_mlx.errors import FastVLMError, PromptError
from tests.warm.background import DEMO


@pytest.fixture
def picture(tmp_path: Path) -> Picture:
    path = tmp_path / "ä picture%.png"
    shutil.copy(DEMO / "sample-1.png", path)
    return Picture.of(str(path))


@pytest.fixture
def conversation(picture: Picture) -> Conversation:
    talk = Conversation("Be brief.")
    talk.turns += [
        Turn(text="What is it?", pictures=(picture,), answer="A shape.\n猫"),
        Turn(text="Sure?", answer=""),
    ]
    return talk


SETTINGS = Settings().with_text("temp", "0.7").with_text("stop", "END").with_text("resolution", "512")


def test_a_conversation_is_loaded_as_it_was_saved(tmp_path: Path, conversation: Conversation) -> None:
    file = tmp_path / "talk.json"
    save(file, conversation, SETTINGS, "demo")
    loaded, settings, model = load(file, Settings())
    assert model == "demo"
    assert settings == SETTINGS
    assert loaded.system == "Be brief."
    assert [(turn.text, turn.answer) for turn in loaded.turns] == [("What is it?", "A shape.\n猫"), ("Sure?", "")]
    assert loaded.images == conversation.images


def test_a_file_is_the_body_of_a_request_to_chat_completions(tmp_path: Path, conversation: Conversation) -> None:
    file = tmp_path / "talk.json"
    save(file, conversation, SETTINGS, "demo")
    record = json.loads(file.read_text())
    assert record["messages"][0] == {"role": "system", "content": "Be brief."}
    url = record["messages"][1]["content"][0]["image_url"]["url"]
    assert url == f"file://{tmp_path}/%C3%A4%20picture%25.png"
    assert (record["model"], record["temperature"], record["stop"]) == ("demo", 0.7, ["END"])


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_picture_that_has_changed_goes_into_the_file(
    tmp_path: Path, conversation: Conversation, picture: Picture, change: str
) -> None:
    if change == "removed":
        Path(picture.source).unlink()
    else:
        shutil.copy(DEMO / "sample-2.png", picture.source)
    save(tmp_path / "talk.json", conversation, Settings(), "demo")
    loaded, _, _ = load(tmp_path / "talk.json", Settings())
    assert loaded.images[0].data == (DEMO / "sample-1.png").read_bytes()


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"[]", "must hold a JSON object"),
        ({}, "messages must be a list"),
        ({"messages": "a"}, "messages must be a list"),
        ({"messages": [1]}, "a message must be an object"),
        ({"messages": [USER]}, "the last question has no answer"),
        ({"messages": [ASSISTANT, USER]}, "message 1 is of the role 'assistant', expected user"),
        ({"messages": [USER, USER]}, "message 2 is of the role 'user', expected assistant"),
        ({"messages": [{"role": "system", "content": 1}]}, "message 1 (system): the content must be text"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2 (assistant): the content must be"),
        ({"messages": [{**USER, "content": 5}, ASSISTANT]}, "the content must be a list"),
        ({"messages": [{**USER, "content": [{"type": "audio"}]}, ASSISTANT]}, "has an unknown part"),
        (
            {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "/gone.png"}}]}, ASSISTANT]},
            "message 1 (user): /gone.png: no such file",
        ),
        ({"messages": [], "temperature": -1}, "temperature must be at least 0"),
        ({"messages": [], "seed": "x"}, "seed must be"),
        ({"messages": [], "resolution": 100}, "resolution must be a multiple of 64"),
        ({"messages": [], "stop": 5}, "stop must be strings"),
        (b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", "levels deep"),
        (b'{"messages": [], "x": NaN}', "cannot be read as JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "cannot be read as JSON"),
    ],
)
def test_a_file_that_is_no_conversation_is_named(tmp_path: Path, record: Any, message: str) -> None:
    file = tmp_path / "talk.json"
    file.write_bytes(record if isinstance(record, bytes) else json.dumps(record).encode())
    with pytest.raises(FastVLMError) as caught:
        load(file, Settings())
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_what_is_not_there_or_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no such file"):
        load(tmp_path / "missing.json", Settings())
    with pytest.raises(FastVLMError, match="Is a directory"):
        load(tmp_path, Settings())


def test_the_last_conversation_is_kept_for_its_owner_alone(tmp_path: Path, conversation: Conversation) -> None:
    keeper = Keeper(tmp_path / "cache" / "chat", lambda _: None)
    keeper.keep(Conversation(), SETTINGS, "demo")
    assert not keeper.path.exists()
    keeper.keep(conversation, SETTINGS, "demo")
    keeper.keep(conversation, SETTINGS, "demo")
    assert stat.S_IMODE(keeper.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(keeper.path.parent.stat().st_mode) == 0o700
    assert [file.name for file in keeper.path.parent.iterdir()] == ["last.json"]


def test_a_place_that_cannot_be_written_is_noted_once(tmp_path: Path, conversation: Conversation) -> None:
    (tmp_path / "chat").write_text("in the way")
    notes: list[str] = []
    keeper = Keeper(tmp_path / "chat", notes.append)
    keeper.keep(conversation, SETTINGS, "demo")
    keeper.keep(conversation, SETTINGS, "demo")
    assert len(notes) == 1
    assert notes[0].startswith("the conversation is not kept for --continue")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("colour", "red", "there is no setting colour; there are max_tokens"),
        ("temperature", "warm", "temperature must be at least 0, not 'warm'"),
        ("top_p", "2", "top_p must be above 0 and at most 1"),
        ("max_tokens", "1.5", "max_tokens must be at least 1"),
        ("resolution", "100", "multiple of 64"),
        ("background", "whit", "must be a colour"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(name: str, text: str, message: str) -> None:
    with pytest.raises(FastVLMError) as caught:
        Settings().with_text(name, text)
    assert message in str(caught.value)


def test_a_setting_is_taken_back_by_its_default() -> None:
    changed = Settings().with_text("top-k", "5").with_text("seed", "7").with_text("resolution", "auto")
    assert changed.changed == {"top_k": 5, "seed": 7, "resolution": "auto"}
    for name in ("top_k", "seed", "resolution"):
        changed = changed.with_text(name, "default")
    assert changed == Settings()
