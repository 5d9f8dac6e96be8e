"""What Prometheus reads: valid, with vLLM's names, and with numbers that add up."""

from dataclasses import replace

import pytest

from fastvlm_mlx.generation.result import GenerationResult, Timings
from fastvlm_mlx.server.metrics import Histogram, Metrics
from tests.server.conftest import data_url, run

NAMES = (
    "num_requests_running num_requests_waiting kv_cache_usage_perc time_to_first_token_seconds "
    "inter_token_latency_seconds e2e_request_latency_seconds queue_time_seconds vision_seconds prompt_tokens_total "
    "generation_tokens_total image_tokens_total request_success_total requests_refused_total "
    "prefix_cache_queries_total prefix_cache_hits_total"
).split()


def samples(text):
    """The lines by name and labels, but for the model's name."""
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name.replace('model_name="demo",', "").replace('{model_name="demo"}', ""): float(v) for name, v in lines}


def piece(tokens, decode, reason=None, **changes):
    timings = Timings(preprocess=0.1, ttft=0.5, decode=decode, total=0.5 + decode, queue=0.2)
    return GenerationResult(
        text="", token_ids=(), prompt_tokens=30, visual_tokens=16, generated_tokens=tokens, finish_reason=reason,
        timings=timings, **changes,
    )  # fmt: skip


def test_an_answer_counts_once_however_many_pieces_it_has():
    metrics = Metrics("demo")
    pieces = [piece(1, 0.0), piece(2, 0.02), piece(4, 0.06), piece(4, 0.06, "length")]
    for number, each in enumerate(pieces):
        metrics.piece(each, pieces[number - 1] if number else None)
    found = samples(metrics.render())
    assert found["fastvlm_time_to_first_token_seconds_sum"] == 0.5
    assert found["fastvlm_time_to_first_token_seconds_count"] == 1
    assert found["fastvlm_inter_token_latency_seconds_count"] == 3
    assert found["fastvlm_inter_token_latency_seconds_sum"] == pytest.approx(0.06)
    assert found["fastvlm_queue_time_seconds_sum"] == 0.2
    assert found["fastvlm_vision_seconds_sum"] == pytest.approx(0.2)
    assert found["fastvlm_e2e_request_latency_seconds_sum"] == 0.56
    assert found["fastvlm_prompt_tokens_total"] == 30
    assert found["fastvlm_image_tokens_total"] == 16
    assert found["fastvlm_generation_tokens_total"] == 4
    assert found['fastvlm_request_success_total{finished_reason="length"}'] == 1
    assert found['fastvlm_request_success_total{finished_reason="stop"}'] == 0


def test_an_image_that_was_reused_takes_no_vision_time():
    metrics = Metrics("demo")
    metrics.piece(piece(1, 0.0, reused_tokens=20), None)
    metrics.piece(replace(piece(1, 0.0), visual_tokens=0), None)
    found = samples(metrics.render())
    assert found["fastvlm_vision_seconds_count"] == 0
    assert found["fastvlm_prefix_cache_queries_total"] == 60
    assert found["fastvlm_prefix_cache_hits_total"] == 20


def test_a_bucket_holds_what_is_at_most_its_bound():
    histogram = Histogram("x", "x", (1, 2))
    for value in (0.5, 1, 1.5, 2, 3, float("nan")):
        histogram.observe(value)
    assert list(histogram.samples()) == [
        ("_bucket", {"le": "1"}, 2),
        ("_bucket", {"le": "2"}, 4),
        ("_bucket", {"le": "+Inf"}, 5),
        ("_sum", {}, 8.0),
        ("_count", {}, 5),
    ]


def test_prometheus_reads_it():
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")
    metrics = Metrics('a "model"\\with\nsigns')
    metrics.watch("num_requests_running", "Running.", lambda: float("nan"))
    metrics.refused("queue_full")
    metrics.piece(piece(1, 0.0, "stop"), None)
    families = {family.name: family for family in parser.text_string_to_metric_families(metrics.render())}
    assert families["fastvlm_time_to_first_token_seconds"].type == "histogram"
    assert families["fastvlm_request_success"].type == "counter"
    assert families["fastvlm_num_requests_running"].type == "gauge"
    labels = {sample.labels["model_name"] for family in families.values() for sample in family.samples}
    assert labels == {'a "model"\\with\nsigns'}


def test_the_server_counts_what_it_answers_refuses_and_breaks_off(serving):
    body = {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is in the picture?"},
                    {"type": "image_url", "image_url": {"url": data_url()}},
                ],
            }
        ],
        "max_tokens": 8,
    }

    async def ask():
        with serving() as (client, _):
            answers = [await client.post("/v1/chat/completions", {**body, "n": 2}) for _ in range(2)]
            assert (await client.post("/v1/chat/completions", {**body, "max_tokens": "x"})).status == 400
            assert (await client.get("/v1/models", host="evil.example")).status == 403
            call = client.begin("POST", "/v1/chat/completions", {**body, "stream": True, "max_tokens": 500})
            await call.first_part()
            await call.go_away()
            return answers, await client.get("/metrics")

    answers, response = run(ask())
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert all(f"# TYPE fastvlm_{name} " in response.body.decode() for name in NAMES)
    found = samples(response.body.decode())
    usage = [answer.json["usage"] for answer in answers]
    assert found["fastvlm_time_to_first_token_seconds_count"] >= 4
    assert found['fastvlm_request_success_total{finished_reason="abort"}'] == 1
    assert sum(count for name, count in found.items() if "request_success" in name) == 5
    assert found["fastvlm_generation_tokens_total"] >= sum(each["completion_tokens"] for each in usage)
    assert found["fastvlm_prefix_cache_hits_total"] > 0
    assert found['fastvlm_requests_refused_total{reason="host_not_allowed"}'] == 1
    assert found['fastvlm_requests_refused_total{reason="invalid_parameter"}'] == 1
    assert found["fastvlm_num_requests_waiting"] == 0
    assert found["fastvlm_kv_cache_usage_perc"] < 1
