"""What the server answers is what `generate` answers, whatever else it does at the time."""

import asyncio
import base64
import io
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx import generate
from tests.generation.test_engine import random_request
from tests.server.conftest import run

PATH = "/v1/chat/completions"


def as_body(request, rng):
    """The same question as a client asks it."""
    images = [{"type": "image_url", "image_url": {"url": png(pixels), "detail": "high"}} for pixels in request.image]
    content = [{"type": "text", "text": request.prompt}, *images]
    settings = asdict(request.config)
    limit = str(rng.choice(["max_tokens", "max_completion_tokens"]))
    settings[limit] = settings.pop("max_tokens")
    settings["logit_bias"] = dict(request.config.logit_bias)
    if settings["logprobs"] is not None:
        settings |= {"logprobs": True, "top_logprobs": settings["logprobs"]}
    system = [{"role": "system", "content": request.system}] if request.system else []
    return {
        "messages": [*system, {"role": "user", "content": content}],
        "resolution": request.resolution,
        **settings,
        "stream": bool(rng.random() < 0.5),
        "stream_options": {"include_usage": True},
    }


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def seen(response, stream):
    """Text, reason, token counts and probabilities of an answer."""
    *chunks, last = response.events[:-1] if stream else [response.json] * 2
    choices = [chunk["choices"][0] for chunk in chunks]
    text = "".join(choice["delta" if stream else "message"].get("content", "") for choice in choices)
    logprobs = [each["logprob"] for choice in choices for each in (choice["logprobs"] or {"content": []})["content"]]
    usage = last["usage"]
    return text, choices[-1]["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"], logprobs


@pytest.mark.parametrize("max_batch", [2, 8])
def test_every_answer_is_that_of_generate_under_a_random_load(serving, loaded, pytestconfig, max_batch):
    """Each with settings of its own, whole or streamed; some clients go away in the middle."""
    count = pytestconfig.getoption("--requests") // 3
    rng = np.random.default_rng(100 + max_batch)
    requests = [random_request(rng) for _ in range(count)]
    bodies = [as_body(request, rng) for request in requests]
    pauses, leaves = rng.exponential(0.01, count), rng.random(count) < 0.15
    with serving(max_batch=max_batch, model=loaded, max_queue=count) as (client, service):

        async def ask(number):
            await asyncio.sleep(pauses[: number + 1].sum())
            call = client.begin("POST", PATH, bodies[number])
            if leaves[number]:
                await asyncio.sleep(0.02)
                await call.go_away()
                return None
            await call.task
            return call.response

        async def script():
            return await asyncio.gather(*map(ask, range(count)))

        responses = run(script())
        assert service.running == 0
    for request, body, response in zip(requests, bodies, responses, strict=True):
        if response is None:
            continue
        assert response.status == 200, response.body
        expected = generate(
            *loaded,
            request.prompt,
            request.image,
            system=request.system,
            resolution=request.resolution,
            config=request.config,
        )
        *found, logprobs = seen(response, body["stream"])
        assert found == [expected.text, expected.finish_reason, expected.prompt_tokens, expected.generated_tokens]
        np.testing.assert_allclose(logprobs, [each.logprob for each in expected.logprobs], atol=1e-4)  # of batches
