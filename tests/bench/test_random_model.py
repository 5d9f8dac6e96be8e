import json

import pytest

from fastvlm_mlx.bench.random_model import WordTokenizer
from fastvlm_mlx.checkpoint.released import SIZES, full_size
from tests.checkpoints import TESTS


@pytest.mark.parametrize("size", SIZES)
def test_random_models_have_the_shapes_of_the_released_ones(size: str) -> None:
    manifest = json.loads((TESTS / "manifests" / f"apple_{size}.json").read_text())["tensors"]
    text = full_size(size).text_config
    assert manifest["model.embed_tokens.weight"][1] == [text.vocab_size, text.hidden_size]
    assert manifest["model.layers.0.mlp.gate_proj.weight"][1] == [text.intermediate_size, text.hidden_size]
    assert manifest["model.layers.0.self_attn.k_proj.weight"][1][0] == text.num_key_value_heads * text.head_dim
    last = f"model.layers.{text.num_hidden_layers - 1}.input_layernorm.weight"
    assert last in manifest
    assert last.replace(str(text.num_hidden_layers - 1), str(text.num_hidden_layers)) not in manifest


def test_the_stand_in_tokenizer_counts_like_qwens() -> None:
    tokenizer = WordTokenizer()
    assert len(tokenizer.encode("system\nYou are a helpful assistant.")) == 8
    assert tokenizer.decode(tokenizer.encode("one two")).count(" ") == 2
