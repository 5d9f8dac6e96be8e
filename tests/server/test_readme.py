"""The server's README names what there is."""

import re
from pathlib import Path

import fastvlm_mlx
from tests.server.conftest import run

TEXT = (Path(fastvlm_mlx.__file__).parent / "server/README.md").read_text(encoding="utf-8")


def test_it_lists_the_addresses_that_are_served(serving):
    table = TEXT.partition("## Addresses")[2].partition("## Images")[0]
    named = set(re.findall(r"`(/[a-z0-9/_.]*)`", table))
    with serving() as (client, _):
        described = set(run(client.get("/openapi.json")).json["paths"])
    assert {path for path in described if "{" not in path} <= named | {"/openapi.json", "/"}
    optional = {"/album", "/album/search"}
    assert named - {"/openapi.json", "/"} - optional <= described


def test_its_metrics_are_written(serving):
    paragraph = TEXT.partition("## Metrics")[2].partition("##")[0]
    named = set(re.findall(r"`([a-z][a-z0-9_]+)(?:\{\w+\})?`", paragraph)) - {"fastvlm_"}
    with serving() as (client, _):
        written = run(client.get("/metrics")).body.decode()
    assert len(named) > 8
    assert {name for name in named if f"# TYPE fastvlm_{name} " not in written} == set()
