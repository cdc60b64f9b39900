from hypothesis import example, given
from hypothesis import strategies as st

from data_tools.cleaning.words import bare_words, hash_ngrams, hash_words, split_words

WORDS = st.lists(st.sampled_from(["a", "b", "ab", "ba", "aa", "è", "中", "x" * 40]), max_size=60)


def test_characters_of_scripts_without_spaces_are_words() -> None:
    assert split_words("LLaDA是 一种 模型, v2\nกข") == ["LLaDA", "是", "一", "种", "模", "型", ",", "v2", "ก", "ข"]
    assert split_words(" don't stop... \t") == ["don't", "stop..."]


def test_copies_have_the_same_words() -> None:
    assert bare_words("“The CAFÉ, ﬁne”; x_1=y(２)") == ["the", "café", "fine", "x_1", "y", "2"]
    assert bare_words("the café -- fine? x_1 Y 2") == bare_words("“The CAFÉ, ﬁne”; x_1=y(２)")


@given(WORDS, st.integers(1, 12))
def test_ngrams_have_equal_hashes_exactly_where_they_are_equal(words: list[str], n: int) -> None:
    hashes = hash_ngrams(hash_words(words), n).tolist()
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    assert len(hashes) == len(ngrams)
    assert len(set(hashes)) == len(set(ngrams)) == len(set(zip(hashes, ngrams, strict=True)))


@given(st.text())
@example("\ud800 half a surrogate pair \x1c\x1f")
def test_any_text_has_words(text: str) -> None:
    assert "".join(split_words(text)) == "".join(text.split())
    assert len(hash_words(bare_words(text))) == len(bare_words(text))
