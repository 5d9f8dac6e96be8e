"""Compares the tables with the tokenizers library on random texts: `python -m tests.inputs.compare_tokenizers`."""

import random
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from fastvlm_mlx.inputs.token_tables import read_tables
from fastvlm_mlx.inputs.tokenizer import Tokenizer
from tests.checkpoints import TESTS

QWEN2 = TESTS / "tokenizer" / "qwen2"
# First code points of scripts; a text takes characters from the 96 that follow.
BLOCKS = [
    *(0x20, 0x80, 0x100, 0x180, 0x250, 0x2B0, 0x300, 0x370, 0x400, 0x480, 0x530, 0x590, 0x600, 0x660, 0x700, 0x780),
    *(0x900, 0x980, 0xA00, 0xA80, 0xB00, 0xB80, 0xC00, 0xC80, 0xD00, 0xD80, 0xE00, 0xE80, 0xF00, 0x1000, 0x10A0),
    *(0x1100, 0x1160, 0x11A8, 0x1200, 0x13A0, 0x1400, 0x1680, 0x1780, 0x1800, 0x1E00, 0x1F00, 0x2000, 0x2070, 0x20D0),
    *(0x2100, 0x2190, 0x2200, 0x2460, 0x2500, 0x2600, 0x2C00, 0x3000, 0x3040, 0x30A0, 0x3130, 0x3200, 0x3300, 0x4E00),
    *(0x5000, 0x6C00, 0x9000, 0xAC00, 0xC000, 0xD780, 0xE000, 0xF900, 0xFB00, 0xFE00, 0xFF00, 0xFF60, 0x10000),
    *(
        0x10330,
        0x10900,
        0x11000,
        0x11900,
        0x12000,
        0x13000,
        0x1D100,
        0x1D400,
        0x1E900,
        0x1F300,
        0x1F600,
        0x1F900,
        0x20000,
    ),
    *(0x2F800, 0x30000, 0xE0000, 0xF0000),
]
PUNCTUATION = " \t\n\r\v\f'\".,;:!?()[]{}<|>-_/\\@#&%*+=~^`$0123456789\u00a0\u3000\u2028\u200d"
WORDS = [
    "'s",
    "'LL",
    "'ve",
    "'ſ",
    "can't",
    "I'M",
    "  ",
    "\r\n",
    "\n\n\n",
    "<|im_end|>",
    "<image>",
    "e\u0301",
    "👩‍👩‍👧",
    "①",
]


def texts(seed: int, tokens: list[str]) -> Iterator[str]:
    """Texts without end: of scripts, of tokens, of one character again and again, and of all of these."""
    rng = random.Random(seed)

    def of_scripts() -> str:
        blocks = rng.sample(BLOCKS, rng.randint(1, 3))
        chars = [chr(rng.choice(blocks) + rng.randrange(96)) for _ in range(rng.randint(1, 30))]
        return "".join(char if rng.random() < 0.8 else rng.choice(PUNCTUATION) for char in chars)

    def of_tokens() -> str:
        return "".join(rng.choices(tokens, k=rng.randint(1, 12)))

    def of_few() -> str:
        few = rng.choices([*PUNCTUATION, *"aAeſé字", *WORDS], k=rng.randint(1, 3))
        return "".join(rng.choices(few, k=rng.randint(1, 40)))

    kinds: list[Callable[[], str]] = [of_scripts, of_tokens, of_few]
    while True:
        text = "".join(rng.choice(kinds)() for _ in range(rng.choice((1, 1, 2))))
        form = rng.choice((None, None, None, "NFD", "NFC", "NFKD"))
        text = unicodedata.normalize(form, text) if form else text
        yield "".join(char for char in text if not 0xD800 <= ord(char) < 0xE000)


def compare(count: int, seed: int = 0) -> tuple[int, list[str]]:
    """How many of `count` texts the tables leave to the library; those of which they give other ids."""
    library = Tokenizer(QWEN2)  # which has no tables
    with tempfile.TemporaryDirectory() as folder:
        library.save(Path(folder))
        tables = read_tables(Path(folder))
    assert tables is not None
    words = [token.decode("utf-8", "ignore") for token in tables.tokens()]
    source = texts(seed, [word for word in words if word])
    left, different = 0, []
    for text in islice(source, count):
        ids = tables.encode(text)
        left += ids is None
        if ids not in (None, library.encode(text)):
            different.append(text)
    return left, different


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    rest, others = compare(number, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    sys.stdout.write(f"{number} texts: {len(others)} have other ids, {rest} are left to the library\n")
    sys.stdout.writelines(f"{example!a}\n" for example in others[:20])
