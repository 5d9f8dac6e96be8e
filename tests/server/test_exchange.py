"""One request over HTTP: what happens when there is no room, no time, or no client any more."""

import asyncio
import threading
import time

import pytest

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.server.app import make_app
from fastvlm_mlx.server.service import Service
from fastvlm_mlx.server.settings import Settings
from tests.server.client import Client
from tests.server.conftest import SLOW, data_url, run

PATH = "/v1/chat/completions"


def asking(text="Go on.", **more):
    """A question without a picture."""
    return {"messages": [{"role": "user", "content": text}], **more}


ENDLESS = asking(ignore_eos=True, max_tokens=1900)
SHORT = asking(max_tokens=1)


async def until(condition, seconds=60):
    """Waits for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row_at_the_next_step(serving, stream):
    with serving(max_batch=1, step_seconds=SLOW) as (client, service):

        async def script():
            call = client.begin("POST", PATH, {**ENDLESS, "stream": stream})
            await until(lambda: service.engine.step_seconds > 0 or call.response.parts)
            await call.go_away()
            assert service.running == 0
            rows = service.engine._worker._rows
            await until(lambda: not rows, 30)  # the whole answer takes twice as long
            assert (await client.post(PATH, SHORT)).status == 200

        run(script())


def test_a_client_that_goes_away_in_the_queue_leaves_it(serving):
    with serving(max_batch=1, step_seconds=SLOW) as (client, service):

        async def script():
            first = client.begin("POST", PATH, {**ENDLESS, "stream": True})
            await first.first_part()
            second = client.begin("POST", PATH, ENDLESS)
            await until(lambda: service.running == 2)
            await second.go_away()
            assert service.running == 1
            await first.go_away()

        run(script())


def test_a_client_that_goes_away_while_it_sends_is_no_error(serving, caplog):
    with serving() as (client, service):

        async def script():
            call = client.begin("POST", PATH, b'{"messages": [', cut=True)
            await asyncio.sleep(0.01)
            await call.go_away()
            assert call.response.status == 0
            assert service.running == 0

        run(script())
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")]


def test_a_full_queue_says_when_to_come_back(serving):
    with serving(max_batch=1, max_queue=1, step_seconds=SLOW) as (client, service):

        async def script():
            calls = [client.begin("POST", PATH, {**ENDLESS, "stream": True}) for _ in range(2)]
            await until(lambda: service.running == 2)
            refused = await client.post(PATH, SHORT)
            assert refused.status == 429
            assert refused.json["error"]["type"] == "rate_limit_error"
            assert 1 <= int(refused.headers["retry-after"]) <= 120
            await calls[0].go_away()
            await until(lambda: calls[1].response.parts)
            await calls[1].go_away()
            assert (await client.post(PATH, SHORT)).status == 200

        run(script())


def test_more_answers_than_there_is_room_for_are_refused_for_good(serving):
    with serving(max_batch=1, max_queue=1) as (client, _):
        assert run(client.post(PATH, {**SHORT, "n": 2})).status == 200
        assert run(client.post(PATH, {**SHORT, "n": 3})).status == 400


def test_while_the_model_loads_clients_are_told_to_wait():
    service = Service("demo", Settings())
    client = Client(make_app(service, Settings()))
    response = run(client.post(PATH, SHORT))
    assert response.status == 503
    assert response.json["error"]["message"] == "the model is still loading"
    assert int(response.headers["retry-after"]) == 5
    assert run(client.get("/health")).status == 200
    assert run(client.get("/ready")).status == 503
    assert run(client.get("/v1/models")).json["data"][0]["id"] == "demo"


def test_a_request_that_waits_too_long_is_given_up(serving):
    with serving(max_batch=1, step_seconds=SLOW) as (client, service):

        async def script():
            first = client.begin("POST", PATH, {**ENDLESS, "stream": True})
            await first.first_part()
            object.__setattr__(service.settings, "queue_seconds", 0.1)  # not for the first one, which may be slow
            late = await client.post(PATH, SHORT)
            assert late.status == 503
            assert late.json["error"]["code"] == "queue_timeout"
            assert "retry-after" in late.headers
            assert not first.task.done()
            await first.go_away()
            assert service.running == 0

        run(script())


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_takes_too_long_is_cut(serving, stream):
    with serving(step_seconds=SLOW) as (client, service):

        async def script():
            call = client.begin("POST", PATH, {**ENDLESS, "stream": stream})
            await until(lambda: service._open)
            (answering,) = service._open
            await until(lambda: len(answering.handles[0].since(0)[0]) > 2)
            answering.cut(service.late(1.0))
            await call.task
            return call.response

        response = run(script())
        choice = (response.events[-2] if stream else response.json)["choices"][0]
        assert choice["finish_reason"] == "length"
        if not stream:
            assert 1 < response.json["usage"]["completion_tokens"] < 1900
            assert choice["message"]["content"]


def test_a_request_without_a_token_in_all_its_time_is_given_up(serving, monkeypatch):
    hold = threading.Event()
    with serving(answer_seconds=0.1) as (client, service):
        monkeypatch.setattr(service.engine._worker, "_step", lambda: hold.wait(0.5))
        error = run(client.post(PATH, SHORT)).json["error"]
        assert error["message"] == "the request waited longer than 0.1 s; ask again later"
        hold.set()


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(serving):
    with serving(step_seconds=SLOW) as (client, service):

        async def script():
            call = client.begin("POST", PATH, {**ENDLESS, "stream": True})
            await call.first_part()
            service.stop()
            service.cancel_all()
            await call.task
            assert call.response.status == 200
            assert call.response.events[-1]["error"]["message"] == "the server is stopping"
            assert "choices" in call.response.events[-2]

        run(script())


def test_an_engine_that_fails_fails_the_server_and_not_the_process(serving, monkeypatch, caplog):
    """A bug in the engine: those who ask get one error, and `/health` tells."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # the thread ends with the error
    with serving() as (client, service):
        monkeypatch.setattr(service.engine._worker, "_step", lambda: 1 / 0)
        response = run(client.post(PATH, SHORT))
        assert response.status == 500
        assert response.json["error"]["message"] == "ZeroDivisionError; the server's log says where"
        assert "ZeroDivisionError" in caplog.text
        assert run(client.post(PATH, SHORT)).status == 503
        assert run(client.get("/health")).status == 503
        assert run(client.get("/ready")).status == 503


def test_a_step_that_never_ends_is_no_health(serving, monkeypatch):
    with serving() as (client, service):
        monkeypatch.setattr(type(service.engine), "step_seconds", 301.0)
        response = run(client.get("/health"))
        assert (response.status, response.json["step_seconds"]) == (503, 301.0)


def test_nothing_waits_for_the_engine_but_answers(serving, monkeypatch):
    """The engine's thread holds its step; what only tells about it is there at once."""
    hold = threading.Event()
    with serving(max_batch=1) as (client, service):
        step = service.engine._worker._step
        monkeypatch.setattr(service.engine._worker, "_step", lambda: hold.wait(60) and step())

        async def script():
            call = client.begin("POST", PATH, SHORT)
            await until(lambda: service.engine.step_seconds > 0)
            for path in ("/health", "/ready", "/v1/models", "/metrics"):
                assert (await asyncio.wait_for(client.get(path), 30)).status == 200
            hold.set()
            await call.task

        run(script())


def test_a_client_that_does_not_read_is_dropped(serving):
    with serving(send_seconds=0.1) as (client, service):

        async def script():
            call = client.begin("POST", PATH, {**ENDLESS, "stream": True})
            call.stop_reading()
            await asyncio.wait_for(call.task, 60)
            assert service.running == 0

        run(script())


def test_a_body_may_come_in_pieces(serving):
    with serving() as (client, _):
        assert run(client.post(PATH, SHORT, chunk=3)).status == 200


def test_unknown_addresses_and_methods_are_errors_of_openais_shape(serving):
    with serving() as (client, _):
        for response, status in ((run(client.get("/nothing")), 404), (run(client.get(PATH)), 405)):
            assert response.status == status
            assert set(response.json["error"]) == {"message", "type", "param", "code"}
        assert run(client.get("/v1/models/gpt-4o")).status == 404


def test_a_bug_is_an_error_of_one_line(serving, monkeypatch):
    from fastvlm_mlx.server import openai_chat

    monkeypatch.setattr(openai_chat, "usage", lambda results: 1 / 0)
    with serving() as (client, service):

        async def script():
            call = client.begin("POST", PATH, SHORT)
            with pytest.raises(ZeroDivisionError):  # for the log
                await call.task
            return call.response

        response = run(script())
        assert response.status == 500
        assert response.json["error"]["message"] == "ZeroDivisionError in the server; its log says where"
        assert service.running == 0


def test_every_response_has_a_date_and_a_number(serving):
    with serving() as (client, _):
        first, second = (run(client.post(PATH, SHORT)).headers for _ in range(2))
    assert first["x-request-id"] != second["x-request-id"]
    assert first["date"].endswith(" GMT")
    assert first["server"].startswith("fastvlm-mlx/")


def test_errors_of_the_users_making_are_never_5xx(serving, monkeypatch):
    from fastvlm_mlx.server import openai_chat

    def fail(*_: object) -> None:
        raise FastVLMError("not this way")

    monkeypatch.setattr(openai_chat, "read_messages", fail)
    with serving() as (client, _):
        response = run(client.post(PATH, SHORT))
        assert (response.status, response.json["error"]["message"]) == (400, "not this way")


def test_requests_at_once_are_answered_together(serving):
    """Sixteen questions need far fewer steps than one after the other."""
    with serving(max_batch=16) as (client, service):
        steps, worker = [], service.engine._worker
        step = worker._step

        def step_with_all():
            while len(worker._rows) + len(worker._arrived) < 16 and not steps:
                time.sleep(0.005)
            steps.append(1)
            step()

        worker._step = step_with_all

        async def script():
            body = asking(ignore_eos=True, max_tokens=20)
            picture = {"type": "image_url", "image_url": {"url": data_url()}}
            body["messages"][0]["content"] = [picture, {"type": "text", "text": "What?"}]
            return await asyncio.gather(*(client.post(PATH, body) for _ in range(16)))

        assert {response.json["usage"]["completion_tokens"] for response in run(script())} == {20}
        assert len(steps) < 16 * 20 / 3


def test_a_question_that_comes_as_the_engine_ends_is_told_to_wait(serving, monkeypatch):
    with serving() as (client, service):
        monkeypatch.setattr(type(service.engine), "is_alive", True)
        service.engine.close()
        assert run(client.post(PATH, SHORT)).status == 503
