"""Queries, as the words of an album take them."""

import sqlite3

import pytest

from fastvlm_mlx.album.words import any_of, is_unspaced, phrase, plain, terms

TEXTS = {
    1: "A red circle and two blue crosses.",
    2: "A blue circle, a red square.",
    3: "一个红色的圆形和蓝色的星形。",
    4: 'NEAR the AND of cafés: 3.5 * "quotes"',
}


@pytest.fixture
def search():
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE VIRTUAL TABLE t USING fts5 (text, tokenize = 'porter unicode61 remove_diacritics 2')")
    connection.executemany("INSERT INTO t (rowid, text) VALUES (?, ?)", [(n, plain(text)) for n, text in TEXTS.items()])

    def find(expression):
        rows = connection.execute("SELECT rowid FROM t WHERE t MATCH ? ORDER BY rowid", (expression,))
        return [row[0] for row in rows]

    yield find
    connection.close()


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("red circle", [1]),
        ("circle red", []),
        ("cross", [1]),
        ("Crossed", [1]),
        ("cafe", [4]),
        ("红色的圆形", [3]),
        ("色", [3]),
        ("圆红", []),
        ("星形。", [3]),
    ],
)
def test_a_phrase_is_found_by_its_stems_and_chinese_by_any_part(search, query, found):
    assert search(phrase(terms(query))) == found


@pytest.mark.parametrize(
    "query",
    [
        '"',
        "red AND",
        "NEAR(red, 2)",
        "text:red",
        "-red",
        "red*",
        "(red",
        "red'); DROP TABLE t",
        "^red",
        "{a b}:red",
        "+",
    ],
)
def test_operators_and_quotes_are_plain_text(search, query):
    words = terms(query)
    if words:
        assert search(any_of(words)) in ([1, 2], [1, 2, 4])
    else:
        assert not any(char.isalnum() for char in query)


def test_words_that_say_nothing_are_left_out_unless_there_are_no_others():
    assert terms("Is there a red circle in the picture?") == ["is", "red", "circle"][1:]
    assert terms("the") == ["the"]
    assert terms("two words, two words") == ["two", "words"]


def test_a_run_of_chinese_is_one_term_beside_other_words():
    assert terms("a 红色的 circle") == ["红色的", "circle"]
    assert is_unspaced("abc 圆")
    assert not is_unspaced("abc é")


def test_a_query_of_thousands_of_words_is_cut(search):
    assert len(terms(" ".join(f"w{number}" for number in range(5000)))) == 64
