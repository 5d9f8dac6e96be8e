"""LangChain's OpenAI chat model against a real server."""

import pytest

langchain_openai = pytest.importorskip(
    "langchain_openai", reason="the client packages are not installed; `make test-clients` installs them"
)

DESCRIBE = "Describe the shapes from left to right."
DESCRIPTION = "A green triangle, a black cross and a green cross."


@pytest.fixture(scope="module")
def chat(server):
    return langchain_openai.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key=server.key, model="demo", max_tokens=64, temperature=0, max_retries=0
    )


@pytest.fixture
def messages(image_url):
    from langchain_core.messages import HumanMessage, SystemMessage

    content = [{"type": "text", "text": DESCRIBE}, {"type": "image_url", "image_url": {"url": image_url}}]
    return [SystemMessage("You are a helpful assistant."), HumanMessage(content)]


def test_invoke(chat, messages):
    answer = chat.invoke(messages)
    assert answer.content == DESCRIPTION
    assert answer.usage_metadata["output_tokens"] > 5
    assert answer.response_metadata["finish_reason"] == "stop"


def test_stream(chat, messages):
    chunks = list(chat.stream(messages))
    assert chunks
    assert "".join(chunk.content for chunk in chunks) == DESCRIPTION


def test_batch(chat, messages):
    assert [answer.content for answer in chat.batch([messages] * 3)] == [DESCRIPTION] * 3
