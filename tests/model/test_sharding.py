import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastvlm_mlx import ConfigError, Engine, load
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.convert import Quantization, convert_and_quantize
from fastvlm_mlx.model.sharding import Part, check_divisible, part_of
from fastvlm_mlx.resolve import resolve
from tests.checkpoints import SOURCES

RANKS = Path(__file__).parent / "ranks.py"
ROOT = RANKS.parent.parent.parent
SAMPLE = ROOT / "fastvlm_mlx" / "demo_model" / "sample-1.png"


def start(count: int, folder: Path, *command: str) -> "list[subprocess.Popen[str]]":
    """Starts a program in several processes that find one another, as `mlx.launch` does."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{each.getsockname()[1]}"] for each in sockets]
    for each in sockets:
        each.close()
    (folder / "hosts.json").write_text(json.dumps(hosts))
    ranks = []
    for rank in range(count):
        environment = {**os.environ, "MLX_HOSTFILE": str(folder / "hosts.json"), "MLX_RANK": str(rank)}
        environment |= {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "FASTVLM_THREADS": "1"}
        ranks.append(
            subprocess.Popen(
                [sys.executable, *command], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    return ranks


def launch(count: int, folder: Path, *command: str) -> list[subprocess.CompletedProcess[str]]:
    """Runs a program in several processes."""
    done = []
    for process in start(count, folder, *command):
        out, err = process.communicate(timeout=300)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


def untied(source: Path, target: Path) -> Path:
    """A copy of a converted checkpoint whose head is a matrix of its own, of a vocabulary that two cannot share."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    embedding = tensors["language_model.model.embed_tokens.weight"][:-1]
    tensors |= {
        "language_model.model.embed_tokens.weight": embedding,
        "language_model.lm_head.weight": np.ascontiguousarray(embedding[::-1]),
    }
    save_file(tensors, target / "model.safetensors")
    path = target / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= {"tie_word_embeddings": False, "vocab_size": len(embedding)}
    path.write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, converted: Any) -> list[Path]:
    place = tmp_path_factory.mktemp("sharded")
    quantization = Quantization(bits=8, group_size=32)
    convert_and_quantize(SOURCES["apple"], place / "q8", quantization=quantization)
    return [converted("apple"), untied(converted("apple"), place / "untied"), place / "q8"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, folders: list[Path]) -> list[Any]:
    """What each of two processes computed."""
    out = tmp_path_factory.mktemp("ranks")
    done = launch(2, out, str(RANKS), str(out), *map(str, folders))
    assert [each.returncode for each in done] == [0, 0], done
    return [np.load(out / f"{rank}.npz") for rank in range(2)]


@pytest.mark.parametrize("number", [0, 1, 2], ids=["tied", "untied", "quantized"])
def test_two_processes_compute_the_logits_of_one(shared: list[Any], folders: list[Path], number: int) -> None:
    """Up to the order of sums in float32; and both have the same ones to the bit."""
    from tests.model.ranks import PROMPT

    model = load_model(folders[number], dtype="float32")
    logits, cache = model.prefill(PROMPT)
    after = model.language_model(logits.argmax(axis=-1)[:, None], cache)[:, -1]
    for key, expected in (("prompt", np.array(logits)), ("after", np.array(after))):
        first, second = (rank[f"{number}-{key}"] for rank in shared)
        np.testing.assert_allclose(first, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
        np.testing.assert_array_equal(first, second)


def test_each_process_has_half_of_the_layers(shared: list[Any], folders: list[Path]) -> None:
    model = load_model(folders[1], dtype="float32")
    from mlx.utils import tree_flatten

    sizes = {name: value.nbytes for name, value in tree_flatten(model.language_model.parameters())}
    halved = sum(size for name, size in sizes.items() if "_proj" in name)
    head = model.language_model.lm_head.weight.nbytes
    whole = sum(sizes.values())
    biggest = max(int(rank["1-bytes"]) for rank in shared)
    assert biggest == whole - halved // 2 - head // 2 + model.language_model.lm_head.weight.shape[1] * 4 // 2


def test_generate_answers_in_two_processes_and_only_the_first_one_speaks(tmp_path: Path) -> None:
    """Chance included: tokens that are drawn are the same in both, or one would wait for the other for ever."""
    command = ("-m", "fastvlm_mlx", "generate", str(SAMPLE), "--model", "demo")
    first, second = launch(2, tmp_path, *command, "--temp", "3", "-n", "6", "--json")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert json.loads(first.stdout)["generated_tokens"] > 0
    assert (second.stdout, second.stderr) == ("", "")


def test_what_one_process_cannot_do_ends_all(tmp_path: Path) -> None:
    command = ("-m", "fastvlm_mlx", "generate", str(tmp_path / "nothing.png"), "--model", "demo")
    first, second = launch(2, tmp_path, *command)
    assert (first.returncode, second.returncode) == (1, 1)
    assert first.stderr == f"error: {tmp_path}/nothing.png: no such file\n"
    assert (second.stdout, second.stderr) == ("", "")


@pytest.mark.parametrize("victim", [0, 1])
def test_the_end_of_one_process_ends_the_others_with_a_message(tmp_path: Path, victim: int) -> None:
    """In the middle of an answer, and not by waiting for ever."""
    command = ("-m", "fastvlm_mlx", "generate", str(SAMPLE), "--model", "demo", "--temp", "9", "-n", "4000")
    ranks = start(2, tmp_path, *command)
    assert ranks[0].stdout is not None
    assert ranks[0].stdout.read(1)
    ranks[victim].kill()
    _, err = ranks[1 - victim].communicate(timeout=60)
    ranks[victim].communicate()
    assert ranks[1 - victim].returncode == 1
    if victim == 1:
        assert err.endswith("error: another of the launched processes has ended; start them all again\n")


def test_a_process_that_is_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's ring gives up after some attempts; whether the last rank, which opens the ring, goes on is ours."""
    from fastvlm_mlx.backend import mx
    from fastvlm_mlx.cli.ranks import meet

    attempts: list[str] = []

    def init(strict: bool) -> str:
        attempts.append("")
        if len(attempts) < 3:
            raise RuntimeError("[ring] Couldn't connect (error: 111)")
        return "a group"

    monkeypatch.setattr(mx.distributed, "init", init)
    monkeypatch.setenv("MLX_WORLD_SIZE", "2")
    monkeypatch.setenv("MLX_RANK", "1")
    assert meet() == "a group"  # type: ignore[comparison-overlap]
    attempts.clear()
    with pytest.raises(ConfigError, match=r"cannot find one another \(\[ring\] Couldn't connect"):
        meet(seconds=0)
    monkeypatch.setenv("MLX_RANK", "0")
    attempts.clear()
    with pytest.raises(ConfigError, match="cannot find one another"):
        meet()
    assert len(attempts) == 1


def test_parts_of_a_fused_projection_are_divided_each(converted: Any) -> None:
    """Of 4 heads of 16 channels and 2 for keys and values, the second of two processes has the second halves."""
    text = ModelConfig.from_path(converted("apple")).text_config
    block = "language_model.model.layers.0"
    assert part_of(f"{block}.self_attn.qkv_proj.weight", (128, 64), text, 1, 2) == Part(
        rows=((32, 64), (80, 96), (112, 128))
    )
    assert part_of(f"{block}.self_attn.qkv_proj.bias", (128,), text, 0, 2) == Part(rows=((0, 32), (64, 80), (96, 112)))
    assert part_of(f"{block}.mlp.gate_up_proj.weight", (256, 64), text, 1, 2) == Part(rows=((64, 128), (192, 256)))
    assert part_of(f"{block}.mlp.gate_proj.weight", (128, 64), text, 0, 2) == Part(rows=((0, 64),))
    assert part_of(f"{block}.mlp.down_proj.scales", (64, 2), text, 1, 2) == Part(columns=(1, 2))
    assert part_of(f"{block}.input_layernorm.weight", (64,), text, 1, 2).is_whole
    assert part_of("vision_tower.stem.0.weight", (8, 3, 3, 3), text, 1, 2).is_whole
    with pytest.raises(ConfigError, match=r"down_proj\.scales has 3 columns, which 2 ranks cannot share"):
        part_of(f"{block}.mlp.down_proj.scales", (64, 3), text, 1, 2)


def test_a_number_of_processes_that_cannot_share_the_heads_is_refused(converted: Any) -> None:
    config = ModelConfig.from_path(converted("apple"))
    check_divisible(config, 2)
    with pytest.raises(ConfigError, match="the model has 2 key and value heads, which 3 ranks cannot share; start 2"):
        check_divisible(config, 3)
    text = replace(config.text_config, intermediate_size=129)
    with pytest.raises(ConfigError, match="129 hidden units of its MLPs, which 2 ranks cannot share; start one proc"):
        check_divisible(replace(config, text_config=text), 2)


def test_an_engine_refuses_a_model_in_several_processes() -> None:
    model, processor = load(resolve("demo"))
    model.group = object()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="use generate, not Engine"):
        Engine(model, processor)
