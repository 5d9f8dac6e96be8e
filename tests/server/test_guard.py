"""The door: what is refused and how, and what an answer that passes carries."""

import asyncio
import json
import logging

import pytest

from fastvlm_mlx.server.api import ApiError, openai_error
from fastvlm_mlx.server.guard import Guard
from fastvlm_mlx.server.metrics import Metrics
from fastvlm_mlx.server.settings import Settings

KEY = "a-key-of-24-characters-1"


class Answer:
    """What came back."""

    def __init__(self, parts):
        self.status = parts[0]["status"]
        self.headers = {name.decode().lower(): value.decode() for name, value in parts[0]["headers"]}
        self.body = b"".join(part.get("body", b"") for part in parts[1:])

    @property
    def error(self):
        return json.loads(self.body)["error"]


async def echo(scope, receive, send):
    """Answers with the body that came."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": body})


def guard(settings=None, app=echo, **options):
    return Guard(app, settings or Settings(), error=lambda path, error: openai_error(error), **options)


def parts(*bodies):
    """A `receive` that gives these parts of a body, then the end of the connection."""
    messages = [
        {"type": "http.request", "body": body, "more_body": number < len(bodies)}
        for number, body in enumerate(bodies, 1)
    ]

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    return receive


def ask(door, *bodies, method="POST", path="/v1/chat/completions", receive=None, **headers):
    sent = []

    async def send(message):
        sent.append(message)

    names = {name.replace("_", "-").encode(): str(value).encode("latin-1") for name, value in headers.items()}
    names = {b"host": b"localhost:8000", **names}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name, value) for name, value in names.items() if value != b"None"],
        "client": ("127.0.0.1", 50_000),
    }
    asyncio.run(door(scope, receive or parts(*(bodies or (b"",))), send))
    return Answer(sent) if sent else None


def test_a_plain_request_passes_and_its_answer_has_the_security_headers():
    answer = ask(guard(), b"a", b"b")
    assert (answer.status, answer.body) == (200, b"ab")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in answer.headers


def test_a_policy_of_the_answer_itself_is_kept():
    async def page(scope, receive, send):
        headers = [(b"Content-Security-Policy", b"default-src 'self'")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    assert ask(guard(app=page)).headers["content-security-policy"] == "default-src 'self'"


def test_another_host_is_refused_with_what_to_do():
    answer = ask(guard(), host="evil.example")
    assert answer.status == 403
    assert answer.error["code"] == "host_not_allowed"
    assert answer.error["message"] == (
        "the Host header names evil.example, which is not this server; if it is, start the server with "
        "--allow-host evil.example"
    )


def test_a_request_without_a_host_is_refused():
    assert ask(guard(), host=None).status == 400


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:9000", "chrome-extension://abc", "ftp://localhost:8000"]
)
def test_another_origin_is_refused(origin):
    answer = ask(guard(), origin=origin)
    assert answer.status == 403
    assert answer.error["code"] == "origin_not_allowed"
    assert f"--allow-origin {origin}" in answer.error["message"]
    assert "access-control-allow-origin" not in answer.headers


def test_the_own_page_may_ask():
    assert ask(guard(), origin="http://localhost:8000").status == 200
    assert ask(guard(), origin="https://LOCALHOST:8000").status == 200


def test_a_page_of_an_allowed_origin_may_ask_and_read():
    door = guard(Settings(allow_origins=("http://app.example/",)))
    answer = ask(door, origin="http://app.example")
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "http://app.example")
    assert answer.headers["vary"] == "Origin"
    assert ask(door, origin="http://evil.example").status == 403
    assert ask(guard(Settings(allow_origins=("*",))), origin="http://evil.example").status == 200


def preflight(door, **headers):
    return ask(door, method="OPTIONS", access_control_request_method="POST", **headers)


def test_a_preflight_of_an_allowed_origin_lists_the_headers_that_the_client_sends():
    door = guard(Settings(allow_origins=("http://app.example",), api_keys=(KEY,)))
    asked = "authorization,content-type,x-stainless-arch,x-stainless-runtime-version"
    answer = preflight(
        door,
        origin="http://app.example",
        access_control_request_headers=asked + ",bad header",
        access_control_request_private_network="true",
    )
    assert answer.status == 204
    assert answer.headers["access-control-allow-headers"] == asked.replace(",", ", ")
    assert answer.headers["access-control-allow-origin"] == "http://app.example"
    assert answer.headers["access-control-allow-private-network"] == "true"
    assert "content-length" not in answer.headers


def test_a_preflight_of_another_origin_is_refused():
    assert preflight(guard(), origin="http://evil.example").status == 403


def test_a_key_is_needed_when_there_is_one():
    door = guard(Settings(api_keys=(KEY, "a-key-of-24-characters-2")))
    answer = ask(door)
    assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.error["message"].startswith("a key is needed; send it as 'Authorization: Bearer KEY'")
    answer = ask(door, authorization="Bearer " + KEY[:-1])
    assert answer.error["message"].startswith("the key is not one of this server's")
    assert answer.error["code"] == "invalid_api_key"
    for headers in ({"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {KEY}"}, {"x_api_key": KEY}):
        assert ask(door, **headers).status == 200
    assert ask(door, authorization=f"Basic {KEY}").status == 401
    assert ask(door, authorization="Bearer \xff").status == 401


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/", "GET", 200),
        ("/health", "GET", 200),
        ("/ready", "HEAD", 200),
        ("/", "POST", 401),
        ("/metrics", "GET", 401),
        ("/v1/models", "GET", 401),
        ("/health/", "GET", 401),
    ],
)
def test_page_and_health_need_no_key(path, method, status):
    assert ask(guard(Settings(api_keys=(KEY,))), path=path, method=method).status == status


def test_a_body_that_announces_too_much_is_not_read():
    async def receive():
        raise AssertionError("read")

    answer = ask(guard(Settings(max_body_bytes=1000)), receive=receive, content_length=1001)
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert answer.error["message"] == "the body has more than 1.00 kB"


def test_a_body_that_announces_nothing_is_read_up_to_the_limit():
    door = guard(Settings(max_body_bytes=10))
    assert ask(door, b"12345", b"67890").body == b"1234567890"
    assert ask(door, b"12345", b"678901").status == 413
    assert ask(door, b"12345678901", content_length=3).status == 413


def test_a_slow_body_ends_at_its_deadline_however_steadily_it_comes():
    async def receive():
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    answer = ask(guard(Settings(body_seconds=0.1)), receive=receive)
    assert (answer.status, answer.error["message"]) == (408, "the body was not complete after 0.1 s")


def test_an_answer_may_take_longer_than_a_body():
    async def app(scope, receive, send):
        assert not (await receive())["more_body"]
        assert (await receive())["type"] == "http.disconnect"
        await echo(scope, parts(b"late"), send)

    messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await asyncio.sleep(0.1)
        return {"type": "http.disconnect"}

    assert ask(guard(Settings(body_seconds=0.02), app=app), receive=receive).body == b"late"


def test_the_bytes_of_all_open_requests_are_bounded_and_given_back():
    statuses = []

    async def slow(scope, receive, send):
        await receive()
        statuses.append(await asyncio.to_thread(ask, door, b"12345") if not statuses else None)
        await echo(scope, parts(b""), send)

    door = guard(Settings(max_queue_bytes=8, max_body_bytes=8), app=slow, retry_after=lambda: 7.4)
    statuses.append(None)
    assert ask(door, b"12345").status == 200
    statuses.clear()
    assert ask(door, b"12345").status == 200
    refused = statuses[0]
    assert (refused.status, refused.headers["retry-after"], refused.error["code"]) == (429, "8", "too_many_bytes")
    assert ask(door, b"12345678").status == 200


def test_an_error_of_the_body_can_be_answered_by_the_api_itself():
    async def app(scope, receive, send):
        try:
            await receive()
        except ApiError as error:
            await send({"type": "http.response.start", "status": error.status, "headers": []})
            await send({"type": "http.response.body", "body": b"in the shape of the API"})

    answer = ask(guard(Settings(max_body_bytes=1), app=app), b"12")
    assert (answer.status, answer.body) == (413, b"in the shape of the API")


def test_a_connection_that_ends_in_the_body_is_passed_on():
    assert ask(guard(), receive=parts()) is None


def test_large_headers_are_refused():
    assert ask(guard(), x_long="a" * 70_000).status == 431


def test_a_header_that_decides_may_be_there_once():
    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"host", b"evil.example")]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers, "client": None}
    asyncio.run(guard()(scope, parts(b""), send))
    assert (sent[0]["status"], json.loads(sent[1]["body"])["error"]["message"]) == (400, "there are 2 host headers")


def test_each_refusal_is_one_line_with_its_reason_and_without_the_key(caplog):
    door = guard(Settings(api_keys=(KEY,)), metrics=(metrics := Metrics()))
    with caplog.at_level(logging.WARNING, "fastvlm_mlx.server"):
        ask(door, path="/v1/chat\ncompletions\x1b[31m" + "a" * 9000, authorization="Bearer not-the-key-at-all")
    (record,) = caplog.records
    line = record.getMessage()
    assert line.startswith("refused 401 POST /v1/chat\\ncompletions\\x1b[31maaa")
    assert line.endswith(
        "the key is not one of this server's; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
    )
    assert len(line) < 600
    assert line.isprintable()
    assert "not-the-key" not in line
    assert 'fastvlm_requests_refused_total{model_name="",reason="invalid_api_key"} 1' in metrics.render()


def test_an_error_has_the_shape_of_the_api_that_was_called():
    door = Guard(echo, Settings(api_keys=(KEY,)), error=lambda path, error: {"error": f"{path}: {error.status}"})
    assert json.loads(ask(door, path="/api/chat").body) == {"error": "/api/chat: 401"}


def test_what_is_no_request_is_passed_on_or_left():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    door = guard(app=app)
    asyncio.run(door({"type": "lifespan"}, parts(), None))
    asyncio.run(door({"type": "websocket"}, parts(), None))
    assert seen == ["lifespan"]
