from fastvlm_mlx.bench.random_model import WordTokenizer


def test_the_stand_in_tokenizer_counts_like_qwens() -> None:
    tokenizer = WordTokenizer()
    assert len(tokenizer.encode("system\nYou are a helpful assistant.")) == 8
    assert tokenizer.decode(tokenizer.encode("one two")).count(" ") == 2
