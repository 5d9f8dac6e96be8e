"""Any thread may use a model, several at once, with and without a shared prefix cache."""

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastvlm_mlx import PrefixCache, Question, evaluate, generate, load, stream_generate
from fastvlm_mlx.convert import convert_checkpoint, quantize_checkpoint, verify
from fastvlm_mlx.convert.quantize.scheme import Quantization
from tests.checkpoints import APPLE, SOURCES

IMAGES = [APPLE / "images" / f"{name}.png" for name in ("landscape", "portrait", "square")]
QUESTIONS = [
    {"image": image, "prompt": prompt, "max_tokens": 6, **more}
    for image in (*IMAGES, None)
    for prompt in ("What is it?", "Where?")
    for more in ({}, {"resolution": 192}, {"temperature": 1.0, "seed": 5})
]


@pytest.fixture(scope="module")
def expected(loaded):
    return [generate(*loaded, **question).token_ids for question in QUESTIONS]


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "prefix cache"])
@pytest.mark.parametrize("lazy", [False, True], ids=["read", "lazy"])
def test_threads_get_the_answers_that_one_thread_gets(converted, expected, shared, lazy):
    """At two resolutions, sampled and greedy, with and without images."""
    model, processor = load(converted("apple"), lazy=lazy)
    cache = PrefixCache() if shared else None
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(QUESTIONS)), 2)).tolist()

    def ask(number):
        return generate(model, processor, **QUESTIONS[number], prefix_cache=cache).token_ids

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, order)) == [expected[number] for number in order]


def test_a_stream_may_go_on_in_another_thread(loaded, expected):
    stream = stream_generate(*loaded, **QUESTIONS[0])
    pieces = [next(stream)]
    with ThreadPoolExecutor(1) as pool:
        pieces += pool.submit(list, stream).result()
    assert tuple(token for piece in pieces for token in piece.token_ids) == expected[0]


def test_arrays_of_one_thread_can_be_used_by_another(loaded):
    model, processor = loaded
    inputs = processor(IMAGES[0], "What is it?")
    here = np.array(model.prefill(**inputs)[0])
    with ThreadPoolExecutor(1) as pool:
        visual_tokens = pool.submit(model.encode_image, inputs["pixel_values"]).result()
        logits, _ = pool.submit(model.prefill, **inputs).result()
    np.testing.assert_array_equal(np.array(logits), here)
    np.testing.assert_array_equal(np.array(model.prefill(inputs["input_ids"], visual_tokens=visual_tokens)[0]), here)


def test_asyncio_may_ask_in_threads(loaded, expected):
    async def ask_all():
        return await asyncio.gather(*(asyncio.to_thread(generate, *loaded, **question) for question in QUESTIONS[:6]))

    assert [answer.token_ids for answer in asyncio.run(ask_all())] == expected[:6]


def test_asyncio_may_call_everything_in_threads(converted, loaded):
    async def call_all():
        model, processor = await asyncio.to_thread(load, converted("apple"), lazy=True)
        inputs = await asyncio.to_thread(processor, IMAGES[:2], ["What is it?", "Where?"], resolution=128)
        rows = await asyncio.to_thread(model.generate, **inputs, max_tokens=4)
        texts = await asyncio.to_thread(processor.batch_decode, rows)
        features = await asyncio.to_thread(model.vision_features, inputs["pixel_values"])
        visual_tokens = await asyncio.to_thread(model.project, features)
        embedded = await asyncio.to_thread(
            model.embed, inputs["input_ids"], attention_mask=inputs["attention_mask"], visual_tokens=visual_tokens
        )
        question = Question(line=1, image=IMAGES[0], question="What is it?", answers=("x",))
        report = await asyncio.to_thread(evaluate, model, processor, [question], resolution=128, max_tokens=2)
        await asyncio.to_thread(model.free_vision_tower)
        return rows, texts, np.asarray(embedded), report.failed

    model, processor = loaded
    inputs = processor(IMAGES[:2], ["What is it?", "Where?"], resolution=128)
    rows, texts, embedded, failed = asyncio.run(call_all())
    assert rows == model.generate(**inputs, max_tokens=4)
    assert texts == processor.batch_decode(rows)
    np.testing.assert_array_equal(embedded, np.asarray(model.embed(**inputs)))
    assert not failed


@pytest.mark.parametrize("work", ["ask", "convert", "quantize", "verify"])
def test_work_in_a_thread_leaves_no_native_thread_behind(converted, tmp_path, work):
    """MLX never frees the stream that a thread's first operation would make, which is a native thread on a CPU."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    folder, round_ = converted("apple"), iter(range(100))
    works = {
        "ask": lambda: generate(*load(folder), **QUESTIONS[0]),
        "convert": lambda: convert_checkpoint(SOURCES["apple"], tmp_path / f"{next(round_)}"),
        "quantize": lambda: quantize_checkpoint(folder, tmp_path / f"{next(round_)}", Quantization(group_size=32)),
        "verify": lambda: verify(folder, folder),
    }

    def threads_after(rounds):
        for _ in range(rounds):
            worker = threading.Thread(target=works[work])
            worker.start()
            worker.join()
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))

    before = threads_after(2)
    assert threads_after(5) <= before + 1  # a thread that has ended is counted for a moment


@pytest.mark.parametrize("first", ["load(folder)", "pool.submit(load, folder).result()"], ids=["main", "another"])
def test_a_process_whose_threads_used_a_model_ends_well(converted, first):
    """Whichever thread used MLX first. MLX aborts in a third of the cases if a thread is left to clear its streams."""
    code = f"""
from concurrent.futures import ThreadPoolExecutor
from fastvlm_mlx import generate, load
folder = {str(converted("apple"))!r}
with ThreadPoolExecutor(3) as pool:
    model, processor = {first}
    done = [pool.submit(generate, model, processor, image={str(IMAGES[0])!r}, max_tokens=2) for _ in range(3)]
print(len({{future.result().text for future in done}}))
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_a_process_ends_while_what_it_has_submitted_is_computed():
    """OpenBLAS waits for ever for a thread of its own that computes when the process ends."""
    code = """
from fastvlm_mlx.backend import mx
from fastvlm_mlx.streams import turn
with turn():
    product = matrix = mx.full((1024, 1024), 1e-3)
    for _ in range(20):
        product = product @ matrix
    mx.async_eval(product)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_any_thread_may_quantize(converted, tmp_path):
    request = Quantization(bits=8, group_size=32)
    quantize_checkpoint(converted("apple"), tmp_path / "here", request)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(quantize_checkpoint, converted("apple"), tmp_path / "there", request).result()
    here, there = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("here", "there"))
    assert here == there
