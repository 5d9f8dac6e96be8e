"""A checkpoint that cannot be converted is an error that says what is wrong with it, and leaves nothing behind."""

import errno
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastvlm_mlx.convert import convert_checkpoint, plan
from fastvlm_mlx.convert.write.shards import ShardWriter
from fastvlm_mlx.errors import CheckpointError, ConfigError, ConversionError, FastVLMError
from tests.checkpoints import SOURCES, Tensors, changed, tensors

APPLE, TRAIN, QUANTIZED = SOURCES["apple"], SOURCES["apple-train"], SOURCES["mlx-vlm-q8"]
LAYER = "model.layers.0.mlp.up_proj.weight"
TOWER = "model.vision_tower.vision_tower.model."
NORM = f"{TOWER}network.0.0.convffn.conv.bn"
PACKED = "language_model.model.layers.0.mlp.up_proj"

Edit = Callable[[Tensors], None]


def without(name: str) -> Edit:
    def remove(values: Tensors) -> None:
        del values[name]

    return remove


def put(name: str, change: Callable[[Any], Any]) -> Edit:
    return lambda values: values.update({name: np.ascontiguousarray(change(values.get(name)))})


def filled(name: str, value: float) -> Edit:
    def fill(values: Tensors) -> None:
        values[name].flat[-1] = value

    return fill


TENSORS: dict[str, tuple[Path, Edit, str]] = {
    "missing weight": (APPLE, without(LAYER), f"lacks {LAYER} .*incomplete"),
    "missing layer": (APPLE, without("model.layers.1.input_layernorm.weight"), "lacks model.layers.1.input_layernorm"),
    "missing statistics": (TRAIN, without(f"{NORM}.running_var"), f"lacks {NORM}.running_var"),
    "missing branch": (TRAIN, without(f"{TOWER}patch_embed.2.rbr_skip.bias"), "lacks .*patch_embed.2.rbr_skip.bias"),
    "unknown tensor": (APPLE, put("model.image_newline", lambda _: np.ones(4)), "no rule knows: model.image_newline"),
    "half folded": (APPLE, put(f"{TOWER}network.6.pe.bias", lambda _: np.ones(64)), "lacks .*rbr_conv"),
    "wrong width": (
        APPLE,
        put(LAYER, lambda old: old[:, :-1]),
        rf"{LAYER} has shape \[128, 63\], expected \[128, 64\]",
    ),
    "wrong kernel": (
        APPLE,
        put(f"{TOWER}network.6.reparam_conv.weight", lambda old: old[..., :5, :5]),
        r"network.6.reparam_conv.weight has shape \[64, 1, 5, 5\], expected \[64, 1, 7, 7\]",
    ),
    "channels last": (
        APPLE,
        put(f"{TOWER}patch_embed.0.reparam_conv.weight", lambda old: np.moveaxis(old, 1, -1)[:, :2]),
        r"patch_embed.0.reparam_conv.weight has shape \[8, 2, 3, 3\], expected \[8, 3, 3, 3\]",
    ),
    "not twice as wide": (
        APPLE,
        put(f"{TOWER}network.2.0.convffn.fc2.bias", lambda old: old[:-1]),
        "each stage is twice as wide",
    ),
    "integers": (APPLE, put(LAYER, lambda old: old.astype(np.int32)), f"{LAYER} is I32; expected F32, F16 or BF16"),
    "NaN": (APPLE, filled(LAYER, np.nan), f"model.safetensors: tensor {LAYER} holds NaN or infinite values"),
    "infinite": (TRAIN, filled(f"{NORM}.bias", np.inf), f"{NORM}.bias holds NaN or infinite values"),
    "negative variance": (TRAIN, filled(f"{NORM}.running_var", -1), f"folding gives NaN .*{NORM}.running_var"),
    "scales without weight": (
        APPLE,
        put("model.norm.scales", lambda _: np.ones(64)),
        "model.norm.weight .*cannot hold",
    ),
    "packed without scales": (QUANTIZED, without(f"{PACKED}.scales"), f"no rule knows: {PACKED}.biases"),
    "packed without biases": (
        QUANTIZED,
        without(f"{PACKED}.biases"),
        f"{PACKED}.weight has no biases for mode 'affine'",
    ),
    "packed too short": (QUANTIZED, put(f"{PACKED}.weight", lambda old: old[:, :-1]), f"{PACKED}.weight .*cannot hold"),
    "packed otherwise": (
        QUANTIZED,
        put(f"{PACKED}.weight", lambda old: old[:, ::2]),
        f"{PACKED}.weight is quantized with bits 4, config.json says 8",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_bad_tensors(case: str, tmp_path: Path) -> None:
    source, edit, message = TENSORS[case]
    folder = changed(source, tmp_path / "source", edit=edit)
    with pytest.raises(FastVLMError, match=message):
        convert_checkpoint(folder, tmp_path / "out", dtype="float32")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another width": ({"hidden_size": 96}, "config.json says hidden_size 96, the tensors have 64"),
    "another depth": ({"num_hidden_layers": 3}, "config.json says num_hidden_layers 3, the tensors have 2"),
    "another mlp": ({"intermediate_size": 99}, "config.json says intermediate_size 99, the tensors have 128"),
    "larger vocabulary": ({"vocab_size": 400}, "config.json says vocab_size 400, the tensors have 384"),
    "other heads": ({"num_key_value_heads": 4}, "4 key/value heads of 16 channels, but k_proj has 32 outputs"),
    "no heads": ({"num_attention_heads": None}, "num_attention_heads is missing"),
    "head size": ({"num_attention_heads": 6}, "hidden_size 64 is not divisible by num_attention_heads 6"),
    "other projector": (
        {"mm_projector_type": "linear"},
        "mm_projector_type is 'linear'; only 'mlp2x_gelu' is supported",
    ),
    "other activation": ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
    "sliding window": ({"use_sliding_window": True}, "use_sliding_window is on"),
    "other rope": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn' are not supported"),
    "mixed layers": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has other layers"),
    "image tiles": ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'; only 'pad' is supported"),
    "image markers": ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True; only False is supported"),
    "other tower": ({"mm_vision_tower": "openai/clip-vit-large"}, "expected mobileclip_l_<resolution>"),
    "other resolution": ({"mm_vision_tower": "mobileclip_l_1000"}, "image_size 1000 is not a multiple of 64"),
    "other model": ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl'"),
    "other timm": ({"vision_config": {"architecture": "vit"}}, "only 'fastvit_mci3' is supported"),
    "future format": ({"fastvlm_format": 99}, "fastvlm_format 99 was written by another version"),
    "context": ({"tokenizer_model_max_length": "8k"}, "tokenizer_model_max_length must be a whole number"),
    "an end of text": (
        {"eos_token_id": "<|im_end|>"},
        "eos_token_id must be an integer of at least 0, not '<|im_end|>'",
    ),
    "ends of lists": ({"eos_token_id": [[369]]}, "eos_token_id must be an integer of at least 0, not [369]"),
    "an end of 30 digits": ({"eos_token_id": 10**30}, "eos_token_id must be at most 2147483647"),
    "a list of sizes": ({"vocab_size": [384]}, "config.json: vocab_size must be a positive integer, not [384]"),
    "a huge size": ({"hidden_size": 10**400}, "hidden_size must be at most 2147483647, not an integer of 1329 bits"),
    "rope of text": ({"rope_scaling": "yarn"}, "rope_parameters must be an object, not 'yarn'"),
    "theta of text": ({"rope_theta": "1e6x"}, "rope_theta must be a number from 1 to 1e+12, not '1e6x'"),
    "theta of nothing": ({"rope_theta": 1e-320}, "rope_theta must be a number from 1 to 1e+12"),
    "negative epsilon": ({"rms_norm_eps": -1}, "rms_norm_eps must be a number from 1e-12 to 0.1, not -1"),
    "no epsilon": ({"rms_norm_eps": None}, "rms_norm_eps must be a number from 1e-12 to 0.1, not None"),
    "heads of text": ({"num_attention_heads": "4"}, "num_attention_heads must be a positive integer, not '4'"),
    "heads of truth": ({"num_key_value_heads": True}, "num_key_value_heads must be a positive integer, not True"),
    "layers of a number": ({"layer_types": 5}, "layer_types must be a list, not 5"),
    "a decoder of a number": ({"text_config": 5}, "text_config must be an object, not 5"),
    "a tower of a list": ({"vision_config": [1]}, "vision_config must be an object, not [1]"),
    "a tower of digits": ({"mm_vision_tower": "mobileclip_l_" + "9" * 5000}, "expected mobileclip_l_<resolution>"),
    "a tower too large": ({"mm_vision_tower": "mobileclip_l_64000"}, "image_size must be at most 16384, not 64000"),
    "tied as text": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, not 'yes'"),
    "a context too large": ({"tokenizer_model_max_length": 10**30}, "max_length must be at most 2147483647"),
    "long lists": ({"mm_projector_type": ["x" * 10**6]}, "only 'mlp2x_gelu' is supported"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_of_something_else(case: str, tmp_path: Path) -> None:
    values, message = CONFIGS[case]
    folder = changed(APPLE, tmp_path / "source", config=values)
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(message)) as error:
        plan(folder)
    assert len(str(error.value)) < 300


def test_a_transformers_config_of_something_else(tmp_path: Path) -> None:
    folder = changed(SOURCES["transformers"], tmp_path / "source", config={"vision_feature_select_strategy": "default"})
    with pytest.raises(ConfigError, match="vision_feature_select_strategy is 'default'; only 'full' is supported"):
        plan(folder)


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites the header of a safetensors file; the data stays where it is."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:end])
    change(entries)
    text = json.dumps(entries, separators=(",", ":")).encode()
    assert len(text) <= end - 8
    path.write_bytes(data[:8] + text.ljust(end - 8) + data[end:])


def lengthen(entries: dict[str, Any]) -> None:
    entries[LAYER]["data_offsets"][1] += 4


def overlap(entries: dict[str, Any]) -> None:
    names = sorted((name for name in entries if name != "__metadata__"), key=lambda name: entries[name]["data_offsets"])
    before, after = (entries[name]["data_offsets"] for name in names[-2:])
    size = after[1] - after[0]
    after[:] = before[1] - 4, before[1] - 4 + size


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no .safetensors file"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]"), "must hold a JSON object, not a list"),
    "no tokenizer": (
        lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "merges.txt")],
        "has no tokenizer",
    ),
    "empty weights": (lambda folder: truncate(folder / "model.safetensors", 0), "0 bytes is too short"),
    "truncated header": (
        lambda folder: truncate(folder / "model.safetensors", 500),
        "is truncated or not a safetensors",
    ),
    "truncated data": (
        lambda folder: truncate(folder / "model.safetensors", 10**6),
        "is truncated: its tensors end at",
    ),
    "not safetensors": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"PK" * 99),
        "not a safetensors file",
    ),
    "damaged header": (
        lambda folder: (folder / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b"{" * 20),
        "header is damaged",
    ),
    "LFS pointer": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is a Git LFS pointer, not the weights; run `git lfs pull`",
    ),
    "wrong offsets": (lambda folder: header(folder / "model.safetensors", lengthen), f"{LAYER} is 32772 bytes long"),
    "overlap": (lambda folder: header(folder / "model.safetensors", overlap), "overlaps another one"),
    "unknown dtype": (
        lambda folder: header(folder / "model.safetensors", lambda entries: entries[LAYER].update(dtype="F4")),
        f"{LAYER} has the unsupported dtype F4",
    ),
    "damaged entry": (
        lambda folder: header(folder / "model.safetensors", lambda entries: entries[LAYER].pop("shape")),
        f"entry of tensor {LAYER} is damaged",
    ),
    "missing shard": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-2.safetensors"}}'
        ),
        "shards named in model.safetensors.index.json are missing: model-2.safetensors",
    ),
    "index of others": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model.safetensors"}}'
        ),
        "names tensors that no shard holds: a",
    ),
    "index of lists": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": []}}'),
        r"names a shard with something other than text, \[\]",
    ),
    "index too deep": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"a":' + "[" * 100_000),
        r"model.safetensors.index.json: cannot be read as JSON \(more than 32 levels deep\)",
    ),
    "dangling link": (
        lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").symlink_to("nowhere")),
        "model.safetensors: cannot be read: No such file",
    ),
    "index of a path": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../model.safetensors"}}'
        ),
        r"names '\.\./model\.safetensors' as a shard; it can only name files beside it",
    ),
    "half a character": (
        lambda folder: (folder / "generation_config.json").write_text('{"a": "\\ud800"}'),
        r"generation_config\.json: cannot be read as JSON .*surrogates not allowed",
    ),
    "a pipe": (
        lambda folder: ((folder / "model.safetensors").unlink(), os.mkfifo(folder / "model.safetensors")),
        r"model\.safetensors: is not an ordinary file",
    ),
    "a loop of links": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors").symlink_to("model.safetensors"),
        ),
        r"model\.safetensors: cannot be read: Too many levels of symbolic links",
    ),
    "index without map": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        "model.safetensors.index.json: has no weight_map",
    ),
    "a tensor twice": (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "other.safetensors"),
        "is in both .*model.safetensors and .*other.safetensors",
    ),
    "pickled": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        r"the weights are pickled \(pytorch_model.bin\). Unpickling can run any code",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files(case: str, tmp_path: Path) -> None:
    damage, message = FILES[case]
    folder = changed(APPLE, tmp_path / "source")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(folder, tmp_path / "out", dtype="float32")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def make_zip(path: Path, *files: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, f"inside/{file.name}")


def corrupt_zip(path: Path) -> None:
    make_zip(path, *APPLE.iterdir())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def reshape_norm(folder: Path, shape: tuple[int, ...]) -> None:
    """Gives a tensor that sizes are taken from another shape."""
    values = tensors(folder)
    values["model.norm.weight"] = np.ones(shape, np.float32)
    save_file(values, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("shape", "message"),
    [((), "tensor model.norm.weight is a single number"), ((0,), "hidden_size must be a positive integer, not 0")],
)
def test_a_size_is_not_taken_from_a_tensor_without_one(shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    folder = changed(APPLE, tmp_path / "source")
    reshape_norm(folder, shape)
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        plan(folder)


def test_names_in_a_checkpoint_that_are_no_text_reach_no_file(tmp_path: Path) -> None:
    folder = changed(APPLE, tmp_path / "\udcff")
    (folder / "LICENSE\udcff").write_text("terms")
    (folder / "LICENSE").write_text("terms")
    done = convert_checkpoint(folder, tmp_path / "out\udcfe", dtype="float32")
    assert done.config.source["name"] == "\\udcff"
    card = (tmp_path / "out\udcfe" / "README.md").read_text(encoding="utf-8")
    assert "# out\\udcfe" in card
    assert "see [LICENSE](LICENSE)." in card


SINGLE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "nothing": ("missing", lambda path: None, "no such folder or .zip archive"),
    "too deep": ("a/b/c", lambda path: None, "no such folder or .zip archive"),
    "pickle": ("consolidated.pth", lambda path: path.write_bytes(b"pickle"), "Unpickling can run any code"),
    "one file": ("model.safetensors", lambda path: path.write_bytes(b""), "give the folder that holds it"),
    "text": ("notes.txt", lambda path: path.write_text("hello"), "is not a .zip archive or is damaged"),
    "damaged zip": ("damaged.zip", corrupt_zip, "is not a .zip archive or is damaged"),
    "zip without config": (
        "bare.zip",
        lambda path: make_zip(path, APPLE / "model.safetensors"),
        "holds no config.json",
    ),
    "a pipe": ("pipe.zip", os.mkfifo, "is not an ordinary file"),
    "zip without weights": ("light.zip", lambda path: make_zip(path, APPLE / "config.json"), "no .safetensors file"),
}


@pytest.mark.parametrize("case", SINGLE)
def test_a_source_that_is_no_checkpoint(case: str, tmp_path: Path) -> None:
    name, make, message = SINGLE[case]
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / name, tmp_path / "out")


def test_hidden_files_are_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    apple_double = b"\0\5\x16\7\0\2\0\0Mac OS X        "
    folder = changed(APPLE, tmp_path / "source")
    for name in ("._model.safetensors", "._config.json", "._pytorch_model.bin"):
        (folder / name).write_bytes(apple_double)
    make_zip(tmp_path / "it.zip", *folder.iterdir())
    for source in (folder, tmp_path / "it.zip"):
        assert plan(source).output_bytes == plan(APPLE).output_bytes
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        plan(folder)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_existing_destination_is_not_touched(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    kept = target if kind == "file" else target / "precious"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("data")
    with pytest.raises(ConversionError, match="exists already; remove it or choose another destination"):
        convert_checkpoint(APPLE, target)
    assert kept.read_text() == "data"


def fail_after_one_tensor(monkeypatch: pytest.MonkeyPatch, raised: BaseException) -> None:
    write = ShardWriter.write
    calls = 0

    def failing(self: ShardWriter, *arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise raised
        return write(self, *arguments)

    monkeypatch.setattr(ShardWriter, "write", failing)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk is full; nothing was left there"),
        (errno.EIO, "cannot be written: Input/output error; nothing was left there"),
    ],
)
def test_a_disk_that_fails_leaves_nothing(
    code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_after_one_tensor(monkeypatch, OSError(code, os.strerror(code)))
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(APPLE, tmp_path / "new" / "out", dtype="float32")
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_noticed_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 10**5))
    with pytest.raises(ConversionError, match=r"takes 918 kB, but only 100 kB are free there"):
        convert_checkpoint(APPLE, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_after_one_tensor(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(APPLE, tmp_path / "new" / "out", dtype="float32")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    folder = changed(APPLE, tmp_path / "source")

    def shorten(_done: int, _total: int, label: str) -> None:
        if label == "writing":
            truncate(folder / "model.safetensors", 10**6)

    with pytest.raises(CheckpointError, match="bytes too early; it is truncated"):
        convert_checkpoint(folder, tmp_path / "out", dtype="float32", progress=shorten)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_is_replaced_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    folder = changed(APPLE, tmp_path / "source")
    other = changed(APPLE, tmp_path / "other", edit=lambda values: values[LAYER].fill(1))

    def replace(_done: int, _total: int, label: str) -> None:
        if label == "writing" and other.exists():
            (other / "model.safetensors").rename(folder / "model.safetensors")
            shutil.rmtree(other)

    with pytest.raises(CheckpointError, match="has changed while it was read"):
        convert_checkpoint(folder, tmp_path / "out", dtype="float32", progress=replace)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def appear(_done: int, _total: int, label: str) -> None:
        if label == "writing":
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "precious").write_text("data")

    with pytest.raises(ConversionError, match="exists already: it was written by another process at the same time"):
        convert_checkpoint(APPLE, tmp_path / "out", dtype="float32", progress=appear)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_tower_is_asked_for_where_there_is_none(tmp_path: Path) -> None:
    def export(values: Tensors) -> None:
        for name in list(values):
            value = values.pop(name)
            if not name.startswith("vision_tower."):
                values[name.replace("mm_projector.", "multi_modal_projector.linear_")] = value

    folder = changed(QUANTIZED, tmp_path / "exported", edit=export)
    with pytest.raises(
        ConversionError, match=r"has no vision tower .*name a checkpoint that has one with --vision-from"
    ):
        plan(folder)
    with pytest.raises(ConversionError, match="has no vision tower either"):
        plan(folder, vision_from=folder)
    with pytest.raises(ConversionError, match="has a vision tower of its own; leave --vision-from out"):
        plan(APPLE, vision_from=APPLE)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConversionError, match="dtype must be float16, bfloat16 or float32, not 'int8'"):
        plan(APPLE, dtype="int8")


def test_a_tower_that_overflows_float32_is_refused(tmp_path: Path) -> None:
    folder = changed(APPLE, tmp_path / "source", edit=filled(f"{TOWER}patch_embed.0.reparam_conv.bias", 3e38))
    with pytest.raises(ConversionError, match=r"activations overflow even float32, first at s"):
        convert_checkpoint(folder, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
