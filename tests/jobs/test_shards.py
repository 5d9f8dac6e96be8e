"""Shards: which part of the pictures is whose."""

import json
from collections import Counter
from pathlib import Path

import pytest

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.jobs.shards import Shard, journal_of, launched_shard, shard_of

NAMES = [f"2024/{month:02}/IMG_{number:04}.jpg" for month in range(1, 13) for number in range(250)]


def test_each_picture_is_in_one_part_and_the_parts_are_alike() -> None:
    counts = Counter(shard_of(name, 8) for name in NAMES)
    assert set(counts) == set(range(1, 9))
    assert all(325 <= count <= 425 for count in counts.values())  # 375 with a deviation of 18
    shards = [Shard(index, 8) for index in range(1, 9)]
    assert all(sum(shard.holds(name) for shard in shards) == 1 for name in NAMES)


def test_the_part_of_a_name_never_changes() -> None:
    assert [shard_of(name, 8) for name in ("1.jpg", "2.jpg", "a/b.png", "\udcff.jpg")] == [2, 5, 4, 1]


def test_a_name_whose_accents_are_apart_is_in_the_same_part() -> None:
    assert {shard_of(f"{name}.jpg", 10**6) for name in ("caf\u00e9", "cafe\u0301")} == {shard_of("café.jpg", 10**6)}


@pytest.mark.parametrize("text", ["", "0/8", "9/8", "1", "1/0", "-1/8", "1/8/2", "a/b", "1/99999999", "١/٨"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not like 2/8"):
        Shard.parse(text)
    assert Shard.parse(" 2/8 ") == (2, 8)


def test_the_rank_of_a_launcher_is_a_shard(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(json.dumps([["10.0.0.1:32323"], ["10.0.0.2:32324"], ["10.0.0.3:32325"]]))
    assert launched_shard({}) is None
    assert launched_shard({"MLX_RANK": "1", "MLX_HOSTFILE": str(hosts)}) == (2, 3)
    assert launched_shard({"MLX_RANK": "0", "MLX_IBV_DEVICES": str(hosts)}) == (1, 3)
    assert launched_shard({"MLX_RANK": "3", "MLX_WORLD_SIZE": "4"}) == (4, 4)
    assert launched_shard({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}) == (1, 2)
    hosts.write_text("")  # of `mlx.launch` with one host
    assert launched_shard({"MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)}) is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MLX_RANK": "1"}, "MLX_RANK is 1, but neither MLX_HOSTFILE nor MLX_WORLD_SIZE says of how many"),
        ({"MLX_RANK": "4", "MLX_WORLD_SIZE": "4"}, "rank 4 of 4: ranks are counted from 0"),
        ({"MLX_RANK": "x", "MLX_WORLD_SIZE": "4"}, "rank x of 4 are no numbers"),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": "/nowhere"}, "MLX_HOSTFILE names /nowhere, which cannot be read"),
    ],
)
def test_a_rank_that_means_nothing_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        launched_shard(variables)
    assert message in str(error.value)


def test_each_rank_has_a_journal_of_its_own() -> None:
    assert journal_of(Path("a/captions.jsonl"), Shard(2, 16)) == Path("a/captions.02-of-16.jsonl")
    assert journal_of(Path("captions"), Shard(2, 3)) == Path("captions.2-of-3")
