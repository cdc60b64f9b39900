from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.cleaning.rules import Rules, broken_rules, load_rules
from data_tools.cleaning.words import split_words
from llada_train.config.errors import UserError

Datatrove = Callable[[str, Rules], str | None]

THEIR_NAMES = {
    "min_words": "gopher_short_doc",
    "max_words": "gopher_long_doc",
    "min_mean_word_length": "gopher_below_avg_threshold",
    "max_mean_word_length": "gopher_above_avg_threshold",
    "max_hashes_per_word": "gopher_too_many_hashes",
    "max_ellipses_per_word": "gopher_too_many_ellipsis",
    "max_bullet_lines": "gopher_too_many_bullets",
    "max_ellipsis_lines": "gopher_too_many_end_ellipsis",
    "min_alphabetic_words": "gopher_below_alpha_threshold",
    "min_stop_words": "gopher_enough_stop_words",
    "max_duplicate_paragraphs": "dup_para_frac",
    "max_duplicate_paragraph_characters": "dup_para_char_frac",
    "max_duplicate_lines": "dup_line_frac",
    "max_duplicate_line_characters": "dup_line_char_frac",
    **{f"max_top_{n}gram_characters": f"top_{n}_gram" for n in (2, 3, 4)},
    **{f"max_duplicate_{n}gram_characters": f"duplicated_{n}_n_grams" for n in range(5, 11)},
}


@pytest.fixture(scope="module")
def datatrove() -> Iterator[Datatrove]:
    """datatrove's two filters, one after the other, with our words in place of spaCy's: None, or the reason."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import gopher_quality_filter as quality
    from datatrove.pipeline.filters import gopher_repetition_filter as repetition

    def verdict(text: str, rules: Rules) -> str | None:
        quality_filter = quality.GopherQualityFilter(min_doc_words=rules.min_words, min_stop_words=rules.min_stop_words)
        for step in (quality_filter, repetition.GopherRepetitionFilter()):
            result = step.filter(Document(text, ""))
            if result is not True:
                return result[1]
        return None

    with pytest.MonkeyPatch.context() as patch:
        for module in (quality, repetition):
            patch.setattr(module, "split_into_words", lambda text, language: split_words(text))
        yield verdict


PIECES = ["the", "of", "and", "language", "models", "x", "42", "--", "#", "...", "wait…", "extraordinarily", "模"]
LINE = st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map(" ".join)
LINES = st.lists(st.one_of(LINE, st.sampled_from(["- a point", "again and again", ""])), max_size=12)
# Distinct words, so that what is repeated is only what the example repeats.
PROSE = " ".join(f"{letters}ing" for letters in map("".join, zip("abcdefghijklmnop" * 4, "qrstuvwxyz" * 7, "ao" * 40)))  # noqa: B905


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # datatrove's, for texts without a word
@given(LINES, st.integers(0, 60), st.sampled_from([None, 1, 2]), st.sampled_from([None, 5, 50]))
def test_decisions_are_datatroves(
    datatrove: Datatrove, lines: list[str], prose: int, min_stop_words: int | None, min_words: int | None
) -> None:
    text = "\n".join([*lines, *PROSE.split()[:prose]])
    if not text.strip():
        return
    rules = Rules(min_stop_words=min_stop_words, min_words=min_words)
    ours = next(broken_rules(text, rules), None)
    assert (THEIR_NAMES[ours[0]] if ours else None) == datatrove(text, rules)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("min_words", "the dog and a cat"),
        ("max_words", "the dog and cat " * 25_001),
        ("min_mean_word_length", "a b c of and to " * 10),
        ("max_mean_word_length", "extraordinarily comprehensive documentation " * 20),
        ("max_hashes_per_word", f"# the # and # {PROSE}" + " #" * 10),
        ("max_ellipses_per_word", f"the … and … {PROSE}" + "…" * 10),
        ("max_bullet_lines", "\n".join(f"• the {word} and" for word in PROSE.split())),
        ("max_ellipsis_lines", "\n".join(["the and"] + [" ".join(PROSE.split()[i : i + 12]) + "…" for i in range(9)])),
        ("min_alphabetic_words", f"the and {PROSE} " + "1234 " * 30),
        ("min_stop_words", PROSE),
        ("max_duplicate_paragraphs", "\n\n".join(["the dog", f"and {PROSE}", *["ok ok"] * 3])),
        ("max_duplicate_paragraph_characters", "\n\n".join(["the dog", "x", "y", f"and {PROSE}", f"and {PROSE}"])),
        ("max_duplicate_lines", "\n".join(["the dog", f"and {PROSE}", *["ok ok"] * 3])),
        ("max_duplicate_line_characters", "\n".join(["the dog", "x", "y", f"and {PROSE}", f"and {PROSE}"])),
        ("max_top_2gram_characters", " extraordinary machinery ".join(["the", *PROSE.split()[:20], "and"])),
        ("max_duplicate_10gram_characters", f"the and {PROSE} of {PROSE}"),
    ],
)
def test_each_rule_has_its_case_and_can_be_switched_off(rule: str, text: str) -> None:
    assert rule in dict(broken_rules(text, Rules()))
    if rule.endswith("gram_characters"):
        off = Rules(max_top_ngram_characters={}, max_duplicate_ngram_characters={10: None})
    else:
        off = Rules.model_validate({rule: None})
    assert rule not in dict(broken_rules(text, off))


def test_a_limit_itself_is_within_the_limits() -> None:
    text = "\n".join(["- one", "two", "three", "four"])
    assert not {"max_bullet_lines", "min_words"} & set(
        dict(broken_rules(text, Rules(max_bullet_lines=0.25, min_words=4)))
    )
    assert {"max_bullet_lines", "min_words"} <= set(dict(broken_rules(text, Rules(max_bullet_lines=0.24, min_words=5))))


def test_space_around_a_text_is_no_paragraph() -> None:
    assert "max_duplicate_paragraphs" not in dict(broken_rules("\n\nwords\n\n", Rules()))


def test_good_prose_passes() -> None:
    assert list(broken_rules(f"The {PROSE} of the {PROSE[::-1]} and that", Rules())) == []


@given(st.text(min_size=1).filter(str.strip))
def test_any_text_can_be_judged(text: str) -> None:
    rules = Rules(min_words=None, min_stop_words=None, min_mean_word_length=None)
    assert all(isinstance(value, int | float) for _, value in broken_rules(text, rules))


def test_rules_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("min_words: 20\nmin_stop_words: null\nmax_top_ngram_characters: {2: 0.3}\n")
    assert load_rules(path) == Rules(min_words=20, min_stop_words=None, max_top_ngram_characters={2: 0.3})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("min_word: 5\nmax_words: many\n", r"(?s)max_words: .*min_word: .*the rules are min_words, "),
        ("max_bullet_lines: 90", "max_bullet_lines"),
        ("- 5", "the file"),
        ("a: [", "not valid YAML"),
        ("\xff", "not valid YAML"),
        (None, "cannot be read: No such file"),
    ],
)
def test_faulty_rules_are_told(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "rules.yaml"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        load_rules(path)
