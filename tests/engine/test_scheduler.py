"""Rows that join and leave, and what happens when a step fails."""

import numpy as np
import pytest

from fastvlm_mlx.backend import mx
from fastvlm_mlx.engine import scheduler as module
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.engine.prefix_cache import PrefixCache
from fastvlm_mlx.engine.row import Row
from fastvlm_mlx.engine.scheduler import Scheduler
from fastvlm_mlx.errors import ConfigError


def make_rows(count, *, tokens=8, **options):
    """Rows with prompts of different lengths and an image each."""
    rng = np.random.default_rng(0)
    return [
        Row(
            [5, -200, *rng.integers(0, 380, 3 + number % 4).tolist()],
            rng.integers(0, 256, (1, 64, 64, 3), np.uint8),
            GenerationConfig(seed=number, **options),
            max_tokens=tokens + number % 3,
        )
        for number in range(count)
    ]


def finish(scheduler):
    """Steps until all rows have ended; returns the number of steps."""
    steps = 0
    while scheduler.is_busy:
        scheduler.step()
        steps += 1
    return steps


def answers(model, rows, **settings):
    """The tokens of rows that were decoded together."""
    scheduler = Scheduler(model, **settings)
    scheduler.add(rows)
    finish(scheduler)
    return [row.tokens for row in rows]


def test_rows_of_any_number_give_the_same_tokens(loaded):
    model, _ = loaded
    expected = [answers(model, [row], max_rows=1)[0] for row in make_rows(7, temperature=1.0)]
    for max_rows in (1, 2, 5, 7):
        assert answers(model, make_rows(7, temperature=1.0), max_rows=max_rows) == expected


@pytest.mark.parametrize(("pixels", "positions", "most"), [(2 * 64**2, 2048, 2), (1024**2, 8, 1), (1024**2, 2048, 6)])
def test_those_that_are_decoded_wait_for_few_that_join(loaded, monkeypatch, pixels, positions, most):
    """An idle scheduler takes all at once."""
    monkeypatch.setattr(module, "TOWER_PIXELS", {"cpu": pixels, "gpu": pixels})
    monkeypatch.setattr(module, "PREFILL_POSITIONS", positions)
    scheduler = Scheduler(loaded[0], max_rows=8)
    (first,), others = make_rows(1, tokens=12), make_rows(6, tokens=30)
    scheduler.add([first])
    scheduler.step()
    scheduler.add(others)
    joined = []
    while not first.ended:
        rows = scheduler.step()
        assert first in rows
        joined.append(sum(row in rows for row in others))
    assert joined[0] == most
    assert max(np.diff(joined), default=0) <= most
    idle = Scheduler(loaded[0], max_rows=8)
    idle.add(make_rows(6, tokens=30))
    assert len(idle.step()) == 6


SAMPLED = {
    "temperature": 1.0,
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.7,
    "presence_penalty": 0.5,
    "logprobs": 2,
}


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_short_memory_halves_the_batch_and_loses_nothing(loaded, monkeypatch, options):
    model, _ = loaded
    expected = answers(model, make_rows(8, **options), max_rows=8)
    forward, sizes = Scheduler._forward, []

    def limited(self, tokens):
        sizes.append(len(tokens))
        if len(tokens) > 3 and len(sizes) > 4:
            raise RuntimeError("[malloc_or_wait] Unable to allocate 4096 bytes.")
        return forward(self, tokens)

    monkeypatch.setattr(Scheduler, "_forward", limited)
    scheduler, rows = Scheduler(model, max_rows=8, prefix_cache=PrefixCache()), make_rows(8, **options)
    scheduler.add(rows)
    finish(scheduler)
    assert [row.tokens for row in rows] == expected
    assert [[each.token_id for each in row.logprobs] for row in rows] == [row * bool(options) for row in expected]
    assert sizes[:6] == [8, 8, 8, 8, 8, 4]
    assert scheduler.max_rows == 2


def test_a_request_that_does_not_fit_alone_is_told_so(loaded, monkeypatch):
    def short(*_):
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(Scheduler, "_forward", short)
    rows = make_rows(3)
    answers(loaded[0], rows, max_rows=4)
    assert all(isinstance(row.error, ConfigError) for row in rows)
    assert "there is not enough memory for this request (std::bad_alloc)" in str(rows[0].error)


def test_rows_join_only_while_their_keys_and_values_fit(loaded):
    """The fifth row is too long for the limit, so it is decoded alone; the others need 19 positions each at most."""
    model, _ = loaded

    def rows():
        short = make_rows(6)
        return [*short[:4], Row(list(range(60)), short[0].pixel_values[:0], short[0].config, max_tokens=4), *short[4:]]

    expected = [answers(model, [row], max_rows=1)[0] for row in rows()]
    scheduler, together = Scheduler(model, max_rows=6, max_positions=3 * 19), rows()
    scheduler.add(together)
    active = []
    while scheduler.is_busy:
        active.append([together.index(row) for row in scheduler.step()])
    assert [row.tokens for row in together] == expected
    assert max(map(len, active)) == 3
    assert all(len(numbers) == 1 for numbers in active if 4 in numbers)


def test_an_error_in_a_step_fails_only_the_row_that_causes_it(loaded, monkeypatch):
    model, _ = loaded
    expected = answers(model, make_rows(5), max_rows=5)
    rows = make_rows(5)
    sample = module.sample

    def failing(logits, samplers):
        if any(sampler._config.seed == 3 for sampler in samplers):
            raise RuntimeError("a fault of row 3")
        return sample(logits, samplers)

    monkeypatch.setattr(module, "sample", failing)
    answers(model, rows, max_rows=5)
    assert [str(row.error) if row.error else row.tokens for row in rows] == [
        *expected[:3],
        "MLX cannot compute this request (a fault of row 3); ask about fewer or smaller images",
        expected[4],
    ]


def test_memory_does_not_grow_with_the_steps(loaded):
    """Rows join, leave and are cancelled at random; what a step leaves behind would add up."""
    model, _ = loaded
    scheduler, rng, live, held = (
        Scheduler(model, max_rows=6, prefix_cache=PrefixCache(1 << 20)),
        np.random.default_rng(0),
        [],
        [],
    )
    for _ in range(200):
        if rng.random() < 0.3:
            new = make_rows(1, tokens=int(rng.integers(1, 30)))
            scheduler.add(new)
            live += new
        if live and rng.random() < 0.05:
            live.pop(int(rng.integers(len(live)))).cancelled = True
        scheduler.step()
        live = [row for row in live if not row.ended]
        held.append(mx.get_active_memory())
    assert max(held[150:]) <= 1.1 * max(held[50:100])
