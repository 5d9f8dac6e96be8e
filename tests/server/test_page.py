"""The page at `/`: what is sent, and what a browser lets it do. `browser/` drives it."""

import base64
import hashlib
import re

import pytest

from fastvlm_mlx.server.page import render
from tests.server.conftest import run

POLICY = dict(part.split(" ", 1) for part in render().headers["content-security-policy"].split("; "))
HTML = render().html.decode()


def test_the_page_is_served_with_its_policy(serving) -> None:
    with serving() as (client, _):
        response = run(client.get("/"))
    assert response.status == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["content-security-policy"] == render().headers["content-security-policy"]
    assert response.body == render().html


@pytest.mark.parametrize("tag", ["script", "style"])
def test_the_policy_allows_the_own_text_alone(tag: str) -> None:
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", HTML, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert POLICY[f"{tag}-src"] == f"'sha256-{digest}'"
    assert HTML.count(f"<{tag}") == 1


def test_the_policy_starts_from_nothing() -> None:
    assert POLICY["default-src"] == "'none'"
    assert POLICY["connect-src"] == "'self'"
    assert POLICY["frame-ancestors"] == "'none'"
    assert not re.search(r"unsafe|\*|https?:", render().headers["content-security-policy"])


def test_the_page_names_no_other_address() -> None:
    namespaces = {"http://www.w3.org/2000/svg"}  # a name, not an address that is fetched
    assert set(re.findall(r"https?://[\w.-]+[^\s'\"<>]*", HTML)) <= namespaces
    assert not re.search(r"""(?:src|href)=["'](?!#|data:|\{)""", HTML)


def test_the_sample_pictures_are_inside_the_page() -> None:
    assert HTML.count('<img src="data:image/png;base64,') == 4
    assert "{{" not in HTML


def test_nothing_in_the_page_makes_markup_of_text() -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", HTML)


def test_the_page_learns_the_resolution_of_the_server(serving) -> None:
    with serving(resolution=128) as (client, _):
        (model,) = run(client.get("/v1/models")).json["data"]
    assert (model["default_resolution"], model["image_resolution"]) == (128, 192)
