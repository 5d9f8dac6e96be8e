"""What ends an answer: stop strings, or its first sentence."""

import pytest

from fastvlm_mlx.generation.stop import FirstSentence, StopStrings, TextStream


@pytest.mark.parametrize(
    ("stop", "pieces", "shown"),
    [
        (("END",), ["abcE", "N", "Dxyz"], ["abc", "", ""]),
        (("END",), ["abcE", "N", "xyz"], ["abc", "", "ENxyz"]),
        (("aab",), ["a", "a", "a", "b"], ["", "", "a", ""]),
        (("\n\n", "."), ["one\n", "two.", "three"], ["one", "\ntwo"]),
        ((), ["abc"], ["abc"]),
    ],
)
def test_what_may_begin_a_stop_string_is_held_back(stop, pieces, shown):
    stream, got = StopStrings(stop), []
    for piece in pieces:
        text, ended = stream.add(piece)
        got.append(text)
        if ended:
            break
    assert got == shown


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("A dog runs. It is brown.", "A dog runs."),
        ("A dog.\n\nA cat.", "A dog."),
        ("What?! Where.", "What?!"),
        ('He says "Hi." Then he goes.', 'He says "Hi."'),
        ("**A dog.** It runs.", "**A dog.**"),
        ("Dr. J. Doe sits at No. 5 of St. James. Cars pass.", "Dr. J. Doe sits at No. 5 of St. James."),
        ("The U.S. flag, e.g. here, is 3.5 m. long. It waves.", "The U.S. flag, e.g. here, is 3.5 m. long."),
        ("1. A dog. 2. A cat.", "1. A dog."),
        ("一只狗。它跑。", "一只狗。"),
        (" . A dog. It runs.", " . A dog."),
    ],
)
def test_an_answer_can_end_with_its_first_sentence(text, sentence):
    for size in range(1, len(text) + 1):
        stream, shown, ended = FirstSentence(), "", False
        for start in range(0, len(text), size):
            piece, ended = stream.add(text[start : start + size])
            shown += piece
            if ended:
                break
        assert (shown, ended) == (sentence, True)


class Letters:
    """A detokenizer whose ids are characters; the last one waits for the end."""

    def __init__(self):
        self._last = ""

    def add(self, token):
        text, self._last = self._last, chr(token)
        return text

    def finish(self):
        return self._last


@pytest.mark.parametrize(
    ("text", "stop", "shown", "ended", "stop_string"),
    [
        ("A dog. It", (), "A dog.", True, None),
        ("A dog. I", (), "A dog.", True, None),  # what decides comes with the last text
        ("A dog. ", (), "A dog. ", False, None),
        ("A dog. It", ("d",), "A ", True, "d"),
        ("A dog. It", ("It",), "A dog. ", True, "It"),
    ],
)
def test_sentences_and_stop_strings_go_together(text, stop, shown, ended, stop_string):
    stream = TextStream(Letters(), stop, sentence=True)
    pieces = []
    for char in text:
        pieces.append(stream.add(ord(char)))
        if pieces[-1][1]:
            break
    else:
        pieces.append(stream.finish())
    assert ("".join(piece for piece, _ in pieces).rstrip(), pieces[-1][1]) == (shown.rstrip(), ended)
    assert stream.stop_string == stop_string


@pytest.mark.parametrize(
    ("prefix", "text", "limits", "shown"),
    [
        ("A photo of", " a dog", {}, "A photo of a dog"),
        ("By Anna.", " A dog runs. It is brown.", {"sentence": True}, "By Anna. A dog runs."),
        ("By Dr", ". Doe. It", {"sentence": True}, "By Dr. Doe."),
        ("A photo of", " a dog, a cat", {"max_words": 5}, "A photo of a dog"),
        ("END of", " it. END", {}, "END of it. "),
        ("One,", " two. Three four", {"sentence": True, "max_words": 3}, "One, two."),
        ("", "one two three. Four", {"sentence": True, "max_words": 2}, "one two"),
        ("", "one two END three", {"max_words": 4}, "one two "),
        ("Only", "", {"max_words": 4, "sentence": True}, "Only"),
    ],
)
def test_what_ends_an_answer_goes_together_with_its_prefix(prefix, text, limits, shown):
    stream, got, ended = TextStream(Letters(), ("END",), prefix=prefix, **limits), "", False
    for char in text:
        piece, ended = stream.add(ord(char))
        got += piece
        if ended:
            break
    else:
        got += stream.finish()[0]
    assert got == shown
