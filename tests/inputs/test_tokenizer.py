"""The tokenizer is Qwen2's, whatever files it is built from, and text is never markup."""

import json
import random
import shutil

import pytest

from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.inputs.tokenizer import StreamingDetokenizer, Tokenizer
from fastvlm_mlx.inputs.tokenizer_files import build_tokenizer
from tests.checkpoints import TESTS

QWEN2 = TESTS / "tokenizer" / "qwen2"
TINY = TESTS / "golden" / "apple" / "train"
ROWS = json.loads((TESTS / "tokenizer" / "expected_ids.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def backend():
    return build_tokenizer(QWEN2)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(QWEN2)


@pytest.fixture
def folder(tmp_path):
    """Tiny vocab.json, merges.txt, added_tokens.json and tokenizer_config.json to damage."""
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_vocabulary_and_merges_give_qwen2s_ids_and_text(row, backend, tokenizer):
    assert backend.encode(row["text"]).ids == row["ids"]
    assert tokenizer.decode(row["ids"], skip_special_tokens=False) == row["decoded"]
    if "note" not in row:  # the others have chat markup parsed
        assert tokenizer.encode(row["text"]) == row["ids"]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_streamed_text_equals_decoded_text(row, tokenizer):
    detokenizer = StreamingDetokenizer(tokenizer)
    pieces = [detokenizer.add(index) for index in row["ids"]]
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(row["ids"])
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_is_streamed_when_its_last_byte_arrives(tokenizer):
    ids = tokenizer.encode(" 🧑")  # the space and half of the character, then the rest in two steps
    detokenizer = StreamingDetokenizer(tokenizer)
    assert [detokenizer.add(index) for index in ids] == [" ", "", "🧑"]
    assert detokenizer.finish() == ""


def test_an_unfinished_character_ends_as_a_replacement(tokenizer):
    detokenizer = StreamingDetokenizer(tokenizer)
    first = tokenizer.encode(" 🧑")[0]
    assert detokenizer.add(first) == " "
    assert detokenizer.finish() == "\ufffd"
    assert tokenizer.decode([first]) == " \ufffd"


def test_random_ids_decode_as_the_library_decodes_them(backend, tokenizer):
    rng = random.Random(0)
    for _ in range(500):
        # Half of them single bytes, to meet every kind of broken UTF-8; up to the padded end of the embedding.
        ids = [rng.randrange(rng.choice((256, 151_936))) for _ in range(10)]
        detokenizer = StreamingDetokenizer(tokenizer)
        assert tokenizer.decode(ids) == backend.decode(ids)
        assert "".join(map(detokenizer.add, ids)) + detokenizer.finish() == backend.decode(ids)


@pytest.mark.parametrize("text", ["<|im_end|>", "<|im_start|>system\n", "<|endoftext|>", "a<|im_end|>b", "<image>"])
def test_markup_in_text_is_text(text, tokenizer):
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.token_id("<|endoftext|>")
    assert tokenizer.decode(ids) == text


def test_added_tokens_that_are_not_special_stay_out_of_text_too(tmp_path):
    values = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    values["added_tokens"].append({**values["added_tokens"][-1], "id": 370, "content": "<image>", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.token_id("<image>") == 370
    assert 370 not in tokenizer.encode("an <image> here")


def test_special_tokens_are_skipped_in_text(tokenizer):
    ids = [tokenizer.token_id("<|im_start|>"), *tokenizer.encode("yes"), tokenizer.token_id("<|im_end|>")]
    assert tokenizer.decode(ids) == "yes"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>yes<|im_end|>"


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer):
    assert tokenizer.decode([151_646, 151_935, 10**9, 10**30, -200]) == ""


@pytest.mark.parametrize(
    "golden",
    [
        "apple/train",
        "apple/reparam",
        "apple_untied/train",
        "apple_hot/train",
        "transformers_train/model",
        "mlx_vlm/fp32",
    ],
)
def test_tokenizer_json_and_vocabulary_agree(golden, tmp_path):
    folder = TESTS / "golden" / golden
    reference = build_tokenizer(folder)
    for name in ("vocab.json", "added_tokens.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / name)
    shutil.copy(TINY / "merges.txt", tmp_path / "merges.txt")
    built = build_tokenizer(tmp_path)
    text = "<|im_start|>user\nWhat does the red sign say? It's naïve café 12 🙂<|im_end|>\n"
    assert built.encode(text).ids == reference.encode(text).ids
    assert built.get_vocab() == reference.get_vocab()


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    saved = Tokenizer(tmp_path)
    for row in ROWS:
        assert saved.encode(row["text"]) == tokenizer.encode(row["text"])
    assert build_tokenizer(tmp_path).encode("<|im_end|>").ids == [151_645]


def test_vocabulary_without_added_tokens_gets_qwen2s(folder):
    (folder / "added_tokens.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer(folder)
    assert [tokenizer.token_id(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [367, 368, 369]


def test_truncation_in_tokenizer_json_does_not_cut_prompts(tmp_path):
    reference = build_tokenizer(TINY)
    reference.enable_truncation(3)
    reference.enable_padding(length=50)
    reference.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).encode("What does the sign say?") == Tokenizer(TINY).encode("What does the sign say?")


def test_folder_without_tokenizer_is_refused_at_once(folder):
    (folder / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer: neither tokenizer\.json nor vocab\.json and merges"):
        Tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", '{"version": "1.0"', r"tokenizer\.json: not a tokenizer .*fetch it again"),
        ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer"),
        ("vocab.json", '{"a": 0', r"vocab\.json: cannot be read as JSON .*fetch it again"),
        ("vocab.json", "[]", r"vocab\.json: must hold a JSON object"),
        ("vocab.json", '{"a": "0"}', r"vocab\.json: must map tokens to whole numbers"),
        (
            "merges.txt",
            "#version: 0.2\nh e\nh zebra\n",
            r"merges\.txt: line 3 merges 'h zebra', which does not fit vocab",
        ),
        ("merges.txt", "h\n", r"merges\.txt: line 1 merges 'h'"),
        ("added_tokens.json", '{"<|im_end|>": "x"}', r"added_tokens\.json are malformed"),
        ("added_tokens.json", '{"<|other|>": 500}', r"the added token '<\|other\|>' should have id 500 but gets 370"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"367": {}}}', "are malformed"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "are malformed"),
    ],
)
def test_damaged_file_is_refused_by_name(name, text, message, folder):
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        build_tokenizer(folder)


IDS = {
    "shared": ({"a": 0, "b": 1, "c": 1}, "'b' and 'c' have the same id, 1"),
    "all equal": ({"a": 0, "b": 0}, "'a' and 'b' have the same id, 0"),
    "beyond the embedding": ({"a": 384}, "the tokenizer has id 384, the embedding 384 rows"),
    "beyond 31 bits": ({"a": 2**31}, "the tokenizer has id 2147483648, the embedding 384 rows"),
    "beyond 64 bits": ({"a": 10**30}, "the tokenizer has id 10{30}, the embedding 384 rows"),
    "negative": ({"a": -1}, "must map tokens to whole numbers"),
    "true": ({"a": True}, "must map tokens to whole numbers"),
    "a fraction": ({"a": 1.5}, "must map tokens to whole numbers"),
    "a list": ({"a": [1]}, "must map tokens to whole numbers"),
}


@pytest.mark.parametrize("case", IDS)
def test_an_id_that_is_not_a_row_of_its_own_is_refused(case, folder):
    vocab, message = IDS[case]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(CheckpointError, match=rf"vocab\.json: {message}"):
        build_tokenizer(folder, 384)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("added_tokens.json", {"<|x|>": 2**31}, "the id of an added token must be at most 383, not 2147483648"),
        ("added_tokens.json", {"<|x|>": -1}, "the id of an added token must be an integer of at least 0, not -1"),
        ("added_tokens.json", {"<|x|>": True}, "the id of an added token must be an integer of at least 0, not True"),
        ("added_tokens.json", {"<|x|>": 367}, r"'<\|endoftext\|>' and '<\|x\|>' have the same id, 367"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 30: {"content": "x"}}}, "not '9999"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"370": {"content": 5}}}, "token 370 must be a text, not 5"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"370": 5}}, "token 370 must be an object, not 5"),
    ],
)
def test_an_added_token_that_cannot_be_one_is_refused(name, values, message, folder):
    (folder / name).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"are malformed: .*{message}"):
        build_tokenizer(folder, 384)


def tokenizer_json(folder, vocab, merges=(), prefix=None):
    values = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    values["model"] |= {"vocab": vocab, "merges": list(merges), "continuing_subword_prefix": prefix}
    values["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")


def test_a_panic_of_the_library_is_an_error_like_others(folder):
    tokenizer_json(
        folder, {"a": 0, "b": 1, "ab": 2}, [["a", "b"]], prefix="####"
    )  # longer than the token it is cut from
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer \(range end index"):
        build_tokenizer(folder)


def test_more_tokens_than_rows_are_refused(folder):
    tokenizer_json(folder, {"a": 0, "b": 1, "c": 2})
    with pytest.raises(CheckpointError, match="the tokenizer has 3 tokens, the embedding 2 rows"):
        build_tokenizer(folder, 2)


def test_an_id_beyond_the_rows_is_refused_where_it_is_used(folder):
    tokenizer_json(folder, {"a": 0, "b": 7})
    tokenizer = Tokenizer(folder, 5)
    assert tokenizer.encode("a") == [0]
    for use in (lambda: tokenizer.encode("ab"), lambda: tokenizer.token_id("b"), lambda: tokenizer.save(folder)):
        with pytest.raises(CheckpointError, match="the tokenizer has id 7, the embedding 5 rows"):
            use()


def test_two_tokens_of_one_id_are_not_saved(folder):
    tokenizer_json(folder, {"a": 0, "b": 0})
    with pytest.raises(CheckpointError, match=r"'[ab]' and '[ab]' have the same id, 0"):
        Tokenizer(folder).save(folder)


def test_a_file_in_another_encoding_is_refused(folder):
    (folder / "merges.txt").write_bytes("é è\n".encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"merges\.txt: cannot be read"):
        build_tokenizer(folder)


def test_a_foreign_vocabulary_is_refused_by_its_missing_tokens(tmp_path):
    values = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    values["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"has no <\|im_start\|>; is this a FastVLM checkpoint"):
        Tokenizer(tmp_path).token_id("<|im_start|>")
