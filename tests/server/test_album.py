"""The album of a server: searched by those who may, shown picture by picture, and never in the way of a question."""

import asyncio
import io
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import jsonschema
import pytest
from PIL import Image

from fastvlm_mlx.album.updating import Updating
from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.server import album as module
from fastvlm_mlx.server import album_routes
from fastvlm_mlx.server.album import ServedAlbum
from tests.server.conftest import SAMPLES, data_url, run

KEY = "a-key-of-24-characters-1"
QUERY = {"query": "a green cross"}
CHAT = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is in the picture?"},
                {"type": "image_url", "image_url": {"url": data_url("sample-2.png")}},
            ],
        }
    ]
}
NAMES = ("sample-1.png", "sample-2.png", "sample-5.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An album of the sample pictures."""
    folder = tmp_path_factory.mktemp("album") / "pictures"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(SAMPLES / name, folder)
    return folder


@pytest.fixture
def album(folder: Path) -> ServedAlbum:
    """The album with an index that the first test makes."""
    return ServedAlbum(folder, folder.parent / "index.sqlite")


@pytest.fixture
def fresh(folder: Path, tmp_path: Path) -> ServedAlbum:
    """The album without an index."""
    return ServedAlbum(folder, tmp_path / "index.sqlite")


async def wait_for(album: ServedAlbum, state: str) -> None:
    deadline = time.monotonic() + 60
    while album.status()["state"] != state:
        assert time.monotonic() < deadline, album.status()
        await asyncio.sleep(0.01)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Updates stop before their first picture until this is set."""
    go_on = threading.Event()
    run_plan = Updating.run

    def run_later(self, plan, engine):
        go_on.wait(60)
        yield from run_plan(self, plan, engine)

    monkeypatch.setattr(Updating, "run", run_later)
    yield go_on
    go_on.set()


def test_a_search_improves_line_by_line_and_ends_with_what_is_true(serving, album) -> None:
    async def ask():
        with serving(album=album) as (client, _):
            await wait_for(album, "ready")
            return await client.post("/album/search", {**QUERY, "threshold": 0.5})

    response = run(ask())
    assert response.status == 200
    assert response.headers["content-type"] == "application/x-ndjson"
    first, *_, last = response.lines
    assert (first["done"], first["asked"]) == (False, 0)
    assert (last["done"], last["asked"], last["total"]) == (True, len(NAMES), len(NAMES))
    said = {hit["name"]: hit["caption"] for hit in last["hits"]}
    assert len(said) == 2
    assert all("green cross" in caption for caption in said.values())
    assert not {"path", "folder"} & set(last["hits"][0])


def test_the_index_is_made_in_the_background_and_its_progress_is_shown(serving, fresh, held) -> None:
    async def ask():
        with serving(album=fresh) as (client, _):
            await wait_for(fresh, "indexing")
            before = (await client.get("/album")).json
            early = await client.post("/album/search", QUERY)
            held.set()
            await wait_for(fresh, "ready")
            return before, early, (await client.get("/album")).json

    before, early, after = run(ask())
    count = len(NAMES)
    assert (before["pictures"], before["done"], before["total"]) == (0, 0, count)
    assert early.lines[-1]["hits"] == []
    assert {name: after[name] for name in ("pictures", "done", "failed")} == {
        "pictures": count,
        "done": count,
        "failed": 0,
    }
    assert after["name"] == "pictures"


def test_questions_are_answered_while_the_index_is_made(serving, fresh, monkeypatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 60.0)
    waited = []
    wait = ServedAlbum._wait_for_others

    def note(self) -> None:
        waited.append(self._is_busy())
        wait(self)
        assert not self._is_busy()

    monkeypatch.setattr(ServedAlbum, "_wait_for_others", note)

    async def ask():
        with serving(album=fresh, max_queue=0, max_batch=2) as (client, _):
            answers = [await client.post("/v1/chat/completions", CHAT) for _ in range(2)]
            await wait_for(fresh, "ready")
            return answers

    assert [answer.status for answer in run(ask())] == [200] * 2
    assert len(waited) >= len(NAMES)


def test_pictures_are_sent_small_and_without_metadata(serving, album, folder) -> None:
    async def ask():
        with serving(album=album) as (client, _):
            await wait_for(album, "ready")
            numbers = [picture.id for picture in album.album.index.pictures()]
            return [await client.get(f"/album/{kind}/{numbers[0]}") for kind in ("thumbnails", "pictures")]

    for response, most in zip(run(ask()), (320, 1536), strict=True):
        assert response.status == 200
        assert response.headers["content-type"] == "image/jpeg"
        assert response.headers["cross-origin-resource-policy"] == "same-origin"
        with Image.open(io.BytesIO(response.body)) as image:
            assert max(image.size) <= most
            assert not image.getexif()


PLACES = (
    *("0", "999", "-1", "1.0", "٣", "x", "", " 1", "9" * 30, str(2**63), "1e0", "../../index.sqlite", "%2e%2e/index"),
    *("..", "sample-1.png", "/etc/passwd", "1/../../../etc/passwd", "..%5c1"),
)


@pytest.mark.parametrize("kind", ["thumbnails", "pictures"])
def test_nothing_but_pictures_of_the_index_is_sent(serving, album, kind) -> None:
    async def ask():
        with serving(album=album) as (client, _):
            await wait_for(album, "ready")
            return [await client.get(f"/album/{kind}/{place}") for place in PLACES]

    for response in run(ask()):
        assert response.status == 404
        assert response.json["error"]["message"].isprintable()


def test_a_picture_that_has_gone_is_404(serving, fresh, folder, tmp_path) -> None:
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    album = ServedAlbum(own, tmp_path / "own.sqlite")

    async def ask():
        with serving(album=album) as (client, _):
            await wait_for(album, "ready")
            number = album.album.index.pictures()[0].id
            shutil.rmtree(own)
            return await client.get(f"/album/thumbnails/{number}"), await client.post("/album/search", QUERY)

    picture, found = run(ask())
    assert picture.status == 404
    assert found.lines[-1]["hits"]
    fresh.close()


@pytest.mark.parametrize("path", ["/album", "/album/search", "/album/thumbnails/1", "/album/pictures/1"])
def test_all_of_it_needs_the_key_and_is_closed_to_other_pages(serving, album, path) -> None:
    method = "POST" if path == "/album/search" else "GET"

    async def ask():
        with serving(album=album, api_keys=(KEY,)) as (client, _):
            await wait_for(album, "ready")
            body = QUERY if method == "POST" else None
            good = {"authorization": f"Bearer {KEY}"}
            return [
                await client.ask(method, path, body),
                await client.ask(method, path, body, authorization="Bearer wrong"),
                await client.ask(method, path, body, **good, origin="https://evil.example"),
                await client.ask(method, path, body, **good),
            ]

    *refused, answered = run(ask())
    assert [response.status for response in refused] == [401, 401, 403]
    assert answered.status == 200
    assert "access-control-allow-origin" not in answered.headers


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[]", "the request: must hold a JSON object, not a list"),
        (b"{", "the request:"),
        ({}, "the query is empty"),
        ({"query": " \n"}, "the query is empty"),
        ({"query": 3}, "query must be a text, not 3"),
        ({"query": "x" * 10_000}, "the query has 10000 characters"),
        ({"query": "x", "top": 501}, "top must be a whole number, from 1 to 500, not 501"),
        ({"query": "x", "top": 0}, "top must be a whole number, from 1 to 500, not 0"),
        ({"query": "x", "threshold": 1.5}, "threshold must be a number from 0 to 1, not 1.5"),
        ({"query": "x", "since": "2026-02-30"}, "since must be a day such as 2026-11-26, not '2026-02-30'"),
        ({"query": "x", "words": "yes"}, "words must be true or false, not 'yes'"),
    ],
)
def test_a_wrong_search_is_refused_with_the_reason(serving, album, body, message) -> None:
    with serving(album=album) as (client, _):
        response = run(client.post("/album/search", body))
    assert response.status == 400
    assert response.json["error"]["message"].startswith(message)


def test_more_searches_at_once_than_there_is_room_for_are_told_to_come_again(serving, album, monkeypatch) -> None:
    monkeypatch.setattr(album_routes, "MOST_SEARCHES", 1)
    go_on = threading.Event()
    search = album.album.search

    def slow(*arguments, **options):
        yield from list(search(*arguments, **options))[:1]
        go_on.wait(60)

    album.album.search = slow

    async def ask():
        with serving(album=album) as (client, _):
            await wait_for(album, "ready")
            first = client.begin("POST", "/album/search", QUERY)
            await first.first_part()
            second = await client.post("/album/search", QUERY)
            go_on.set()
            await first.task
            album.album.search = search
            return second, await client.post("/album/search", QUERY)

    refused, third = run(ask())
    assert (refused.status, refused.json["error"]["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    assert third.status == 200


def test_a_client_that_goes_away_ends_its_search(serving, album) -> None:
    ended = threading.Event()
    search = album.album.search

    def endless(*arguments, **options):
        try:
            results = next(search(*arguments, **options))
            for _ in range(3000):
                yield results
                time.sleep(0.01)
        finally:
            ended.set()

    album.album.search = endless

    async def ask():
        with serving(album=album) as (client, _):
            await wait_for(album, "ready")
            call = client.begin("POST", "/album/search", QUERY)
            await call.first_part()
            await call.go_away()
            await asyncio.to_thread(ended.wait, 60)
            album.album.search = search
            return await client.post("/album/search", QUERY)

    assert run(ask()).status == 200
    assert ended.is_set()


def test_words_are_found_without_the_model(serving, album) -> None:
    async def ask():
        with serving(album=album) as (client, service):
            await wait_for(album, "ready")
            service.state = "loading"
            return [await client.post("/album/search", {**QUERY, "words": words}) for words in (True, False)]

    by_words, asked = run(ask())
    assert by_words.lines[-1]["hits"][0]["probability"] is None
    assert asked.status == 503


def test_a_server_without_an_album_has_no_such_addresses(serving) -> None:
    async def ask():
        with serving() as (client, _):
            (model,) = (await client.get("/v1/models")).json["data"]
            paths = (await client.get("/openapi.json")).json["paths"]
            return model, paths, [await client.get("/album"), await client.post("/album/search", QUERY)]

    model, paths, answers = run(ask())
    assert model["capabilities"]["album"] is False
    assert not [path for path in paths if path.startswith("/album")]
    assert [answer.status for answer in answers] == [404, 404]


def test_the_description_has_the_album(serving, album) -> None:
    async def ask():
        with serving(album=album) as (client, _):
            (model,) = (await client.get("/v1/models")).json["data"]
            return model, (await client.get("/openapi.json")).json, (await client.get("/album")).json

    model, description, status = run(ask())
    assert model["capabilities"]["album"] is True
    schemas = description["components"]["schemas"]
    assert {path for path in description["paths"] if path.startswith("/album")} == {
        *("/album", "/album/search", "/album/thumbnails/{number}", "/album/pictures/{number}")
    }
    jsonschema.validate(status, schemas["AlbumStatus"])
    example = description["paths"]["/album/search"]["post"]["requestBody"]["content"]["application/json"]["example"]
    jsonschema.validate(example, schemas["AlbumSearch"])


def test_closing_ends_an_update_soon(serving, fresh) -> None:
    async def ask():
        with serving(album=fresh):
            await wait_for(fresh, "indexing")
            began = time.monotonic()
        return time.monotonic() - began

    assert run(ask()) < 10


def test_a_folder_that_vanishes_leaves_the_index_as_it_is(serving, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    album = ServedAlbum(own, tmp_path / "own.sqlite")

    async def ask():
        with serving(album=album) as (client, _):
            await wait_for(album, "ready")
            shutil.rmtree(own)
            await wait_for(album, "missing")
            return (await client.get("/album")).json

    assert run(ask())["pictures"] == len(NAMES)


@pytest.mark.parametrize("ask", ["search", "picture"])
def test_an_index_that_is_damaged_while_serving_is_made_anew(serving, fresh, tmp_path, ask) -> None:
    async def found(client):
        if ask == "search":
            return await client.post("/album/search", {**QUERY, "words": True})
        return await client.get("/album/thumbnails/1")

    async def script():
        with serving(album=fresh) as (client, _):
            await wait_for(fresh, "ready")
            with closing(sqlite3.connect(tmp_path / "index.sqlite")) as other:
                other.execute("DROP TABLE captions")
            refused = await found(client)
            status = await client.get("/album")
            await wait_for(fresh, "ready")
            return refused, status, await found(client), await client.post("/album/search", QUERY)

    refused, status, again, search = run(script())
    assert (refused.status, refused.json["error"]["code"], again.status) == (503, "unavailable", 200)
    assert int(refused.headers["retry-after"]) >= 1
    assert str(tmp_path) not in refused.body.decode() + status.body.decode()
    assert status.status == 200
    assert search.lines[-1]["total"] == len(NAMES)


def test_an_index_that_is_damaged_beyond_reading_is_told_and_made_anew(serving, fresh, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "REPAIR_SECONDS", 0.05)

    async def script():
        with serving(album=fresh) as (client, _):
            await wait_for(fresh, "ready")
            size = (tmp_path / "index.sqlite").stat().st_size
            (tmp_path / "index.sqlite").write_bytes(b"x" * size)
            status = await client.get("/album")
            await wait_for(fresh, "ready")
            return status, await client.get("/album")

    status, after = run(script())
    assert (status.status, status.json["pictures"], after.json["pictures"]) == (200, 0, len(NAMES))
    assert (tmp_path / "index.sqlite.damaged").exists()


def test_an_index_that_somebody_removes_is_made_anew(serving, fresh, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)

    async def script():
        with serving(album=fresh) as (client, _):
            await wait_for(fresh, "ready")
            (tmp_path / "index.sqlite").unlink()
            deadline = time.monotonic() + 30
            while not (tmp_path / "index.sqlite").exists():
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            await wait_for(fresh, "ready")
            return await client.post("/album/search", QUERY)

    assert run(script()).lines[-1]["total"] == len(NAMES)


def test_a_refusal_does_not_say_where_the_folder_is(serving, folder, tmp_path) -> None:
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    album = ServedAlbum(own, tmp_path / "own.sqlite")

    async def ask():
        with serving(album=album) as (client, _):
            await wait_for(album, "ready")
            numbers = [picture.id for picture in album.album.index.pictures()]
            shutil.rmtree(own)
            return [await client.get(f"/album/pictures/{number}") for number in (*numbers, 999)]

    for response in run(ask()):
        assert response.status == 404
        assert str(tmp_path) not in response.body.decode()


def test_a_server_that_stops_says_so(serving, album) -> None:
    async def ask():
        with serving(album=album) as (client, service):
            await wait_for(album, "ready")
            service.stop()
            asked = [client.get("/album"), client.get("/album/thumbnails/1"), client.post("/album/search", QUERY)]
            return [await each for each in asked]

    for response in run(ask()):
        assert (response.status, response.json["error"]["code"]) == (503, "unavailable")
        assert response.json["error"]["message"] == "the server is stopping"


def test_a_thousand_clients_at_once_get_pictures_or_are_told_to_come_again(serving, album, monkeypatch) -> None:
    monkeypatch.setattr(album_routes, "MOST_WAITING", 50)

    async def ask():
        with serving(album=album) as (client, _):
            await wait_for(album, "ready")
            number = album.album.index.pictures()[0].id
            calls = [client.get(f"/album/thumbnails/{number}") for _ in range(1000)]
            return await asyncio.gather(*calls), await client.get(f"/album/thumbnails/{number}")

    answers, after = run(ask())
    assert sorted({answer.status for answer in answers}) == [200, 429]
    assert all("retry-after" in answer.headers for answer in answers if answer.status == 429)
    assert [answer.status for answer in answers].count(200) >= 50
    assert after.status == 200


def test_a_client_that_reads_nothing_holds_a_search_for_a_moment_only(serving, album) -> None:
    async def ask():
        with serving(album=album, send_seconds=0.1) as (client, _):
            await wait_for(album, "ready")
            calls = [client.begin("POST", "/album/search", QUERY) for _ in range(album_routes.MOST_SEARCHES)]
            for call in calls:
                call.stop_reading()
            await asyncio.sleep(0.05)
            refused = await client.post("/album/search", QUERY)
            await asyncio.gather(*(call.task for call in calls))
            return refused, await client.post("/album/search", QUERY)

    refused, after = run(ask())
    assert (refused.status, after.status) == (429, 200)


def test_a_new_picture_is_noticed(serving, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(folder / NAMES[0], own)
    album = ServedAlbum(own, tmp_path / "own.sqlite")

    async def ask():
        with serving(album=album) as (client, _):
            await wait_for(album, "ready")
            (own / "broken.png").write_bytes(b"no picture")
            while not (status := (await client.get("/album")).json)["failed"]:
                await asyncio.sleep(0.01)
            return status

    assert run(asyncio.wait_for(ask(), 60))["pictures"] == 1


def test_an_album_has_to_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--album .*nowhere: no such folder$"):
        ServedAlbum(tmp_path / "nowhere")
