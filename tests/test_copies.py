"""Models, processors and prefix caches can be copied and sent to other processes; forked ones get a clear error."""

import copy
import os
import pickle
import subprocess
import sys

import pytest

from fastvlm_mlx import GenerationConfig, ImageError, PrefixCache, generate, load
from tests.checkpoints import APPLE

IMAGE = APPLE / "images" / "landscape.png"


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
@pytest.mark.parametrize("used", [False, True])
def test_a_copy_answers_as_the_original_does(converted, copied, used):
    model, processor = load(converted("apple"), lazy=True)
    if used:
        generate(model, processor, image=IMAGE, max_tokens=2)
    copies = copied(model), copied(processor)
    assert type(copies[0].tower) is type(model.tower)
    answer = generate(*copies, image=IMAGE, max_tokens=12)
    assert answer.token_ids == generate(model, processor, image=IMAGE, max_tokens=12).token_ids


def test_a_copy_shares_no_weights_and_keeps_no_copy_of_the_arranged_ones(converted):
    model, processor = load(converted("apple"))
    generate(model, processor, image=IMAGE, max_tokens=2)
    weights = sum(value.nbytes for value in _arrays(model))
    assert weights < len(pickle.dumps(model)) < 1.1 * weights
    twin = copy.deepcopy(model)
    twin.free_vision_tower()
    assert "stem" in model.vision_tower
    assert "stem" not in pickled(twin).vision_tower


def _arrays(model):
    from mlx.utils import tree_flatten

    return [value for _, value in tree_flatten(model.parameters())]


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
def test_a_copy_of_a_prefix_cache_is_empty(loaded, copied):
    cache = PrefixCache(max_bytes=1 << 20)
    generate(*loaded, image=IMAGE, max_tokens=2, prefix_cache=cache)
    twin = copied(cache)
    assert (len(cache), len(twin), twin.max_bytes) == (1, 0, 1 << 20)
    assert generate(*loaded, image=IMAGE, max_tokens=2, prefix_cache=twin).reused_tokens == 0


def test_results_configs_and_errors_can_be_pickled(loaded):
    answer = generate(*loaded, image=IMAGE, max_tokens=2)
    config = GenerationConfig(max_tokens=2, stop=["a"], seed=1)
    assert pickled(answer) == answer
    assert pickled(config) == config
    assert str(pickled(ImageError("no such file"))) == "no such file"


def test_a_tokenizer_is_found_from_another_working_folder(converted, monkeypatch, tmp_path):
    folder = converted("apple")
    monkeypatch.chdir(folder.parent)
    model, processor = load(folder.name, lazy=True)
    monkeypatch.chdir(tmp_path)
    assert generate(model, processor, prompt="Hi.", max_tokens=2).generated_tokens == 2


FORKS = """
import os, sys
from fastvlm_mlx import FastVLMError, generate, load
model, processor = load({folder!r})
calls = {{
    "load": lambda: load({folder!r}),
    "generate": lambda: generate(model, processor, prompt="Hi.", max_tokens=2),
    "batch": lambda: model.generate([[5, 6], [7, 8]], max_tokens=2),
    "embed": lambda: model.embed([[5, 6]]),
}}
def in_child(name):
    if (pid := os.fork()) == 0:
        try:
            calls[name]()
        except FastVLMError as error:
            print(name, error, flush=True)
            os._exit(7)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print({{name: in_child(name) for name in calls}})
child = os.fork()
if child == 0:
    print(processor(None, "Hi.")["input_ids"].shape, flush=True)  # needs no MLX
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_gets_an_error_at_once(converted):
    code = FORKS.format(folder=str(converted("apple")))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "{'load': 7, 'generate': 7, 'batch': 7, 'embed': 7}" in done.stdout
    assert done.stdout.count("was forked from one that has used a model") == 4
    assert done.stdout.count("multiprocessing.get_context('spawn')") == 4
    assert done.stdout.endswith("(1, 25)\n")
