"""The tables of a tokenizer are its tokenizer.json, ready at once; what is not exactly that is not used."""

import json
import shutil
import sys

import pytest

from fastvlm_mlx.inputs import tokenizer as tokenizers_module
from fastvlm_mlx.inputs.token_tables import TABLES_FILE, read_tables
from fastvlm_mlx.inputs.tokenizer import StreamingDetokenizer, Tokenizer
from tests.checkpoints import TESTS
from tests.inputs.compare_tokenizers import compare

TINY = TESTS / "golden" / "apple" / "train"
SENTENCE = "What does the red sign say? It's naïve café 12 🙂"


@pytest.fixture
def folder(tmp_path):
    """A tokenizer.json and its tables."""
    Tokenizer(TINY).save(tmp_path)
    return tmp_path


@pytest.fixture
def no_library(monkeypatch):
    """Makes it an error to ask the library."""
    monkeypatch.setattr(tokenizers_module, "build_tokenizer", None)


def changed(folder, **values):
    """Saves a tokenizer whose tokenizer.json has other values; returns it as it reads itself."""
    description = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    for key, value in values.items():
        description["model" if key in description["model"] else key] |= (
            {key: value} if key in description["model"] else value
        )
    source = folder / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    Tokenizer(source).save(folder)
    return Tokenizer(folder)


def test_random_texts_in_many_scripts_have_the_librarys_ids():
    left, different = compare(2000, seed=3)
    assert different == []
    assert left < 500


def test_tables_do_all_that_a_question_needs_without_the_library(folder, no_library):
    tokenizer = Tokenizer(folder, 370)
    ids = tokenizer.encode(SENTENCE)
    detokenizer = StreamingDetokenizer(tokenizer)
    assert "".join(map(detokenizer.add, ids)) + detokenizer.finish() == tokenizer.decode(ids) == SENTENCE
    assert [tokenizer.token_id(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [367, 368, 369]
    tokenizer.check_ids()


def test_tables_agree_with_the_library(folder):
    tables = Tokenizer(folder)
    (folder / TABLES_FILE).rename(folder / "aside")
    library = Tokenizer(folder)
    assert tables.encode(SENTENCE) == library.encode(SENTENCE)
    assert tables.vocabulary() == library.vocabulary()
    assert tables.longest == library.longest
    for index in (-1, 0, 100, 366, 367, 369, 370, 10**30):
        for skip in (False, True):
            assert tables.token_bytes(index, skip_special_tokens=skip) == library.token_bytes(
                index, skip_special_tokens=skip
            )


@pytest.mark.parametrize("text", ["a\u0378b", "sign " * 4000, "a" * 600], ids=["rare", "long text", "long word"])
def test_what_is_unusual_is_left_to_the_library(text, folder):
    tables = read_tables(folder)
    assert tables is not None
    assert tables.encode(text) is None
    assert Tokenizer(folder).encode(text) == Tokenizer(TINY).encode(text)


def test_every_byte_that_is_damaged_is_noticed(folder):
    data = (folder / TABLES_FILE).read_bytes()
    for at in range(0, len(data), 101):
        (folder / TABLES_FILE).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"is damaged|is not a file of this version|is of another"):
            read_tables(folder)
    for length in range(0, len(data), 101):
        (folder / TABLES_FILE).write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"is damaged|is not a file of this version"):
            read_tables(folder)


def test_tables_of_another_vocabulary_are_not_used(folder):
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text.replace('"h":', '"\\u0068":'), encoding="utf-8")
    tokenizer = Tokenizer(folder)
    assert tokenizer.damage == "is of another tokenizer.json"
    assert tokenizer.encode(SENTENCE) == Tokenizer(TINY).encode(SENTENCE)
    tokenizer.save_tables()
    assert Tokenizer(folder).damage == ""


def test_tables_that_cannot_be_read_are_damaged(folder):
    (folder / TABLES_FILE).unlink()
    (folder / TABLES_FILE).mkdir()
    assert "cannot be read: Is a directory" in Tokenizer(folder).damage
    assert Tokenizer(folder).encode(SENTENCE) == Tokenizer(TINY).encode(SENTENCE)


def test_a_folder_without_tables_is_not_damaged():
    assert Tokenizer(TINY).damage == ""


def test_a_processor_of_the_other_byte_order_leaves_all_to_the_library(folder, monkeypatch):
    monkeypatch.setattr(sys, "byteorder", "big")
    assert read_tables(folder) is None


@pytest.mark.parametrize(
    "values",
    [
        {"normalizer": {"type": "NFKC"}},
        {
            "pre_tokenizer": {
                "pretokenizers": [
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
                ]
            }
        },
        {"ignore_merges": True},
        {"byte_fallback": True},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_tokenizer_of_other_rules_has_no_tables(values, tmp_path):
    tokenizer = changed(tmp_path, **values)
    assert not (tmp_path / TABLES_FILE).exists()
    assert tokenizer.encode("sign")


def test_a_vocabulary_without_every_byte_has_no_tables(tmp_path):
    for name in ("merges.txt", "added_tokens.json"):
        shutil.copy(TINY / name, tmp_path / name)
    vocab = json.loads((TINY / "vocab.json").read_text(encoding="utf-8"))
    vocab["zz"] = vocab.pop("~")
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "saved").mkdir()
    Tokenizer(tmp_path).save(tmp_path / "saved")
    assert not (tmp_path / "saved" / TABLES_FILE).exists()
