"""What is not a conversation is refused with the message at fault and what is known."""

import pytest

from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.inputs.prompts import conversation

IMAGE = {"type": "image", "image": "a.png"}


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", r"the prompt is empty; say what to do, such as 'Describe the image\.'"),
        (" \n\t", "the prompt is empty"),
        ([user("")], "the prompt is empty"),
        ([user([])], "the prompt is empty"),
        ([user([IMAGE])], "the prompt is empty"),
        ([user("Hi"), {"role": "assistant", "content": "Hi"}, user(" ")], "the prompt is empty"),
        ("half \ud83d", r"the prompt is not valid Unicode: half a character \(U\+D83D\) at position 5"),
        ([user("a"), user("\udcff")], r"message 2 \(user\) is not valid Unicode: half a character \(U\+DCFF\)"),
        (None, "must be a string or a list of messages, not NoneType"),
        (3, "not int"),
        (user("Hi"), "not dict"),
        ([], "not an empty one"),
        (["Hi"], r'message 1 must have the form \{"role": …, "content": …\}, not \'Hi\'; one question alone is a str'),
        ([{"role": "user"}], "message 1 must have the form"),
        ([{"content": "Hi"}], "message 1 must have the form"),
        ([{"role": "tool", "content": "Hi"}], "unknown role 'tool'; known are system, user, assistant"),
        ([{"role": None, "content": "Hi"}], "unknown role None"),
        ([{"role": ["user"], "content": "Hi"}], r"unknown role \['user'\]"),
        ([user(None)], r"message 1 \(user\): the content must be a string or a list of parts, not NoneType"),
        ([user({"type": "text", "text": "Hi"})], "not dict"),
        ([user(["Hi"])], r"message 1 \(user\) has an unknown part 'Hi'; known are"),
        ([user([{"type": "audio", "audio": "a.wav"}])], "unknown part .*'audio'.*image_url"),
        ([user([{"type": "text"}])], "unknown part"),
        ([user([{"type": "text", "text": 3}])], r"message 1 \(user\) must be text, not int"),
        ([user([{"type": "image_url"}])], "unknown part"),
        ([user([{"type": "image_url", "image_url": {"url": 3}}])], "unknown part"),
        ([user([{"text": "Hi"}])], "unknown part"),
        ([user([{"type": "image", "source": "a.png"}])], "unknown part"),
        ([user([{"type": "image", "base64": b"data"}])], "unknown part"),
        ([user([{"type": "text", "text": "a", "style": "bold"}])], r"unknown part .*'style'.*other keys are not"),
        ([user([{"type": "image", "image": "a.png", "url": "b.png"}])], "unknown part .*'url'"),
        ([user([{"type": "image_url", "image_url": {"url": "a", "size": 3}}])], "unknown part"),
        (
            [{**user("a"), "images": ["a.png"]}],
            "message 1 has the unknown key 'images'; images are parts of the content",
        ),
        (b"Hi", "must be a string or a list of messages, not bytes"),
        ([user(b"Hi")], r"message 1 \(user\): the content must be a string or a list of parts, not bytes"),
        (
            [user("Hi"), {"role": "assistant", "content": "Yes"}],
            "the last message must be the user's, not the assistant's",
        ),
        ([{"role": "system", "content": "Be terse."}], "the last message must be the user's, not the system's"),
        ([user("Hi"), {"role": "system", "content": "x"}, user("a")], "a system message can only be the first one"),
        ([{"role": "assistant", "content": [IMAGE]}, user("a")], r"\(assistant\): images can only be shown in user"),
        ([{"role": "system", "content": [IMAGE]}, user("a")], r"\(system\): images can only be shown in user"),
        ([user([{"type": "image"}, {"type": "text", "text": "a"}])], r"0 images for 1 .* must agree"),
    ],
)
def test_bad_prompt_is_refused(prompt, message):
    with pytest.raises(PromptError, match=message):
        conversation(prompt)


def test_an_image_without_a_place_is_refused():
    with pytest.raises(PromptError, match=r'1 image for 0 \{"type": "image"\} in the messages'):
        conversation([user([IMAGE, {"type": "text", "text": "Hi"}])], ["a.png"])


def test_two_system_texts_are_refused():
    with pytest.raises(PromptError, match="a system text and a system message; give one of them"):
        conversation([{"role": "system", "content": "a"}, user("Hi")], (), "b")


@pytest.mark.parametrize(("system", "message"), [(3, "the system text must be text, not int"), ("\ud800", "U[+]D800")])
def test_bad_system_text_is_refused(system, message):
    with pytest.raises(PromptError, match=message):
        conversation("Hi", (), system)


def test_keys_without_a_value_and_those_of_other_clients_count_as_absent():
    text = {"type": "text", "text": "a", "image_url": None}
    picture = {"type": "image_url", "image_url": {"url": "https://a.example/b.png", "detail": "low"}, "text": None}
    message = {**user([text, picture]), "name": "me", "refusal": None, "tool_calls": []}
    (_, turn) = conversation([message])
    assert (turn.text, [image.source for image in turn.images]) == ("a", ["https://a.example/b.png"])
