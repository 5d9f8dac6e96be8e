import pytest

from fastvlm_mlx.jobs.metrics import anls, exact_match, normalize, relaxed_numeric, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("A red circle.", "red circle"),
        ("  THE   end\n", "end"),
        ("Three", "3"),
        ("1,234", "1234"),
        ("3.50", "3.50"),
        ("-7 °C", "-7 °c"),
        ("well-known", "well known"),
        ("有。", "有"),
        ("ＡＢＣ", "abc"),
        ("A", "a"),
        ("", ""),
    ],
)
def test_case_punctuation_articles_and_number_words_do_not_count(text: str, same: str) -> None:
    assert normalize(text) == same


def test_exact_match_takes_any_of_the_answers() -> None:
    assert exact_match("Two.", ["2", "a pair"]) == 1
    assert exact_match("22", ["2"]) == 0


def test_vqa_accuracy_leaves_each_annotator_out() -> None:
    people = ["red", "red", "red", "dark red", "orange", "red", "maroon", "red", "crimson", "pink"]
    assert vqa_accuracy("red", people) == 1
    # One of ten: 0 where that one is left out, a third for the other nine.
    assert vqa_accuracy("pink", people) == pytest.approx(0.3)
    assert vqa_accuracy("blue", people) == 0
    assert vqa_accuracy("yes", ["Yes."]) == 1


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("104", "100", 1),
        ("106", "100", 0),
        ("95%", "100 %", 1),
        ("$1,020", "1000", 1),
        ("red", "Red", 1),
        ("0", "0", 1),
    ],
)
def test_relaxed_numeric_allows_five_per_cent(prediction: str, answer: str, score: float) -> None:
    assert relaxed_numeric(prediction, [answer]) == score


def test_anls_falls_with_each_wrong_character_and_ends_at_one_half() -> None:
    assert anls("HOTEL", ["hotel"]) == 1
    assert anls("HOTAL", ["hotel", "motel"]) == pytest.approx(0.8)
    assert anls("HAT", ["hotel"]) == 0
    assert anls("", ["hotel"]) == 0
