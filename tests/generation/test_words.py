"""Words as a person counts them, and an answer that ends after some of them."""

import random

import pytest

from fastvlm_mlx.generation.words import WordLimit, count_words, first_words


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("A dog runs.", 3),
        ("  A\n\ndog  ", 2),
        ("It's a well-known 3.5 m dog, e.g. here.", 8),
        ("A dog — and a cat - and/or —", 6),
        ("dog—cat", 2),
        ("“A” (dog) **runs** … !?", 3),
        ("Čeština i ελληνικά, हिन्दी भाषा", 5),
        ("한국어 문장입니다", 2),
        ("一只狗，它跑。", 5),
        ("犬が走る。", 4),
        ("ラーメン・ガ\u3099", 5),
        ("一只dog跑3次", 6),
        ("葛\U000e0100飾", 2),
    ],
)
def test_words_are_counted_as_a_person_counts_them(text: str, count: int) -> None:
    assert count_words(text) == count


CASES = [
    ("A dog, a cat and a bird.", 2, "A dog"),
    ("A dog runs. It is brown.", 3, "A dog runs."),
    ("A dog runs", 3, None),
    ("A dog runs.", 3, None),
    ("A dog runs.\n", 5, None),
    ("It costs 3.5, they say", 3, "It costs 3.5"),
    ("the dog (brown) runs", 3, "the dog (brown)"),
    ("the dog — brown — runs", 2, "the dog"),
    ("the dog; brown", 2, "the dog"),
    ("the well-known dog", 2, "the well-known"),
    ("he said “dog,” and left", 3, "he said “dog"),
    ("一只狗，它跑。", 3, "一只狗"),
    ("一只狗。它跑。", 3, "一只狗。"),
    ("「犬」が走る", 1, "「犬」"),
]


def limited(text: str, count: int, size: int) -> tuple[str, bool]:
    """What a stream shows of a text that comes in pieces, and whether it was ended."""
    stream, shown = WordLimit(count), ""
    for start in range(0, len(text), size):
        piece, ended = stream.add(text[start : start + size])
        shown += piece
        if ended:
            return shown, True
    piece, ended = stream.finish()
    return shown + piece, ended


@pytest.mark.parametrize(("text", "count", "shown"), CASES)
def test_an_answer_can_end_after_a_number_of_words(text: str, count: int, shown: str | None) -> None:
    for size in range(1, len(text) + 1):
        expected = text if shown is None else shown
        got, ended = limited(text, count, size)
        assert (got, ended) == (expected.rstrip() if ended else expected, shown is not None or ended)
    assert first_words(text, count) == (shown or text)


def test_no_answer_ends_within_a_word_or_has_more_of_them() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(
            rng.choice(["a", "b", "7", " ", " ", ",", ".", "-", "—", "“", ")", "犬", "。", "\n"]) for _ in range(30)
        )
        count = rng.randint(1, 9)
        shown, _ = limited(text, count, rng.randint(1, 6))
        assert text.startswith(shown)
        assert count_words(shown) == min(count, count_words(text))
        assert shown == limited(text, count, 30)[0]
        if count_words(text) > count:
            assert not shown.endswith((",", " ", "-", "—", "“"))
            assert not (
                shown[-1].isascii()
                and shown[-1].isalnum()
                and text[len(shown)].isascii()
                and text[len(shown)].isalnum()
            )


def test_the_words_of_a_phrase_that_will_be_removed_do_not_count() -> None:
    def opening(text: str) -> int:
        return 16 if text.startswith("The image shows a") else 0

    stream = WordLimit(2, opening)
    shown = "".join(
        stream.add(f"{word} ")[0] for word in "The image shows a dog that runs over the green grass today again".split()
    )
    assert shown == "The image shows a dog"
    assert stream.complete


def test_what_precedes_the_stream_counts_but_is_not_shown() -> None:
    stream = WordLimit(4, before="A photo of")
    assert [stream.add(text) for text in (" a", " dog")] == [(" a", False), ("", True)]
