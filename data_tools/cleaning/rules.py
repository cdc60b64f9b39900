"""Quality rules: those of Gopher (Rae et al., 2021, arXiv 2112.11446, section A1.1 and table A1).

Decisions are those of datatrove's GopherQualityFilter and GopherRepetitionFilter given the same words. The words are
not: datatrove asks spaCy for them, these are what stands between spaces (see `words`).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from data_tools.cleaning.words import hash_ngrams, hash_words, split_words
from llada_train.config.errors import UserError

Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Broken = tuple[str, float]
"""The rule, and what was measured."""


class Rules(BaseModel):
    """The limits; None switches a rule off. Fractions are of words, of lines, or of all characters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_words: Count | None = 50  # these two do not count words of punctuation alone
    max_words: Count | None = 100_000
    min_mean_word_length: float | None = 3  # characters
    max_mean_word_length: float | None = 10
    max_hashes_per_word: float | None = 0.1  # of "#"
    max_ellipses_per_word: float | None = 0.1  # of "..." and "…"
    max_bullet_lines: Fraction | None = 0.9  # lines that begin with "•" or "-"
    max_ellipsis_lines: Fraction | None = 0.3  # lines that end in "..." or "…"
    min_alphabetic_words: Fraction | None = 0.8  # words with a letter in them
    min_stop_words: Count | None = 2  # different ones
    stop_words: frozenset[str] = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
    max_duplicate_paragraphs: Fraction | None = 0.3
    max_duplicate_paragraph_characters: Fraction | None = 0.2
    max_duplicate_lines: Fraction | None = 0.3
    max_duplicate_line_characters: Fraction | None = 0.2
    max_top_ngram_characters: dict[int, Fraction | None] = {2: 0.2, 3: 0.18, 4: 0.16}  # the most frequent n words
    max_duplicate_ngram_characters: dict[int, Fraction | None] = {
        5: 0.15,
        6: 0.14,
        7: 0.13,
        8: 0.12,
        9: 0.11,
        10: 0.10,
    }


def load_rules(path: Path) -> Rules:
    """Read a YAML file of limits; what it does not name keeps Gopher's value.

    Raises:
        UserError: the file cannot be read, or any limit is wrong; all problems are listed.
    """
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        return Rules.model_validate({} if tree is None else tree)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()]
        known = ", ".join(Rules.model_fields)
        raise UserError("\n  ".join([f"{path}: wrong rules:", *problems, f"the rules are {known}"])) from None


def broken_rules(text: str, rules: Rules) -> Iterator[Broken]:
    """Each rule that `text` breaks. The cheap ones come first: one that wants only the first need not ask for more."""
    words = split_words(text)
    yield from _length(words, rules)
    yield from _symbols(text, words, rules)
    yield from _lines(text, rules)
    yield from _language(words, rules)
    yield from _repeated_pieces(text, rules)
    yield from _repeated_ngrams(text, words, rules)


def _at_least(rule: str, value: float, limit: float | None) -> Iterator[Broken]:
    if limit is not None and value < limit:
        yield rule, value


def _at_most(rule: str, value: float, limit: float | None) -> Iterator[Broken]:
    if limit is not None and value > limit:
        yield rule, value


def _length(words: list[str], rules: Rules) -> Iterator[Broken]:
    lengths = [len(word) for word in words if any(map(str.isalnum, word))]
    yield from _at_least("min_words", len(lengths), rules.min_words)
    yield from _at_most("max_words", len(lengths), rules.max_words)
    if lengths:
        mean = sum(lengths) / len(lengths)
        yield from _at_least("min_mean_word_length", mean, rules.min_mean_word_length)
        yield from _at_most("max_mean_word_length", mean, rules.max_mean_word_length)


def _symbols(text: str, words: list[str], rules: Rules) -> Iterator[Broken]:
    ellipses = text.count("...") + text.count("…")
    yield from _at_most("max_hashes_per_word", text.count("#") / len(words), rules.max_hashes_per_word)
    yield from _at_most("max_ellipses_per_word", ellipses / len(words), rules.max_ellipses_per_word)


def _lines(text: str, rules: Rules) -> Iterator[Broken]:
    lines = text.splitlines()
    bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
    ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    yield from _at_most("max_bullet_lines", bullets / len(lines), rules.max_bullet_lines)
    yield from _at_most("max_ellipsis_lines", ellipses / len(lines), rules.max_ellipsis_lines)


def _language(words: list[str], rules: Rules) -> Iterator[Broken]:
    alphabetic = sum(any(map(str.isalpha, word)) for word in words)
    yield from _at_least("min_alphabetic_words", alphabetic / len(words), rules.min_alphabetic_words)
    yield from _at_least("min_stop_words", len(rules.stop_words.intersection(words)), rules.min_stop_words)


def _repeated_pieces(text: str, rules: Rules) -> Iterator[Broken]:
    for name, pieces in (("paragraph", re.split(r"\n{2,}", text.strip())), ("line", re.split(r"\n+", text))):
        seen: set[str] = set()
        duplicates = [piece for piece in pieces if piece in seen or seen.add(piece)]  # type: ignore[func-returns-value]
        for rule, value in (
            (f"max_duplicate_{name}s", len(duplicates) / len(pieces)),
            (f"max_duplicate_{name}_characters", sum(map(len, duplicates)) / len(text)),
        ):
            yield from _at_most(rule, value, getattr(rules, rule))


def _repeated_ngrams(text: str, words: list[str], rules: Rules) -> Iterator[Broken]:
    hashes = hash_words(words)
    ends = np.cumsum([0, *map(len, words)])  # of each word, spaces not counted
    for n, limit in rules.max_top_ngram_characters.items():
        if limit is not None and len(words) >= n:
            _, first, counts = np.unique(hash_ngrams(hashes, n), return_index=True, return_counts=True)
            start = first[counts == counts.max()].min()
            length = int(ends[start + n] - ends[start]) + n - 1
            yield from _at_most(f"max_top_{n}gram_characters", length * int(counts.max()) / len(text), limit)
    for n, limit in rules.max_duplicate_ngram_characters.items():
        if limit is not None:
            repeated = _repeated_characters(hash_ngrams(hashes, n), ends, n)
            yield from _at_most(f"max_duplicate_{n}gram_characters", repeated / len(text), limit)


def _repeated_characters(ngrams: np.ndarray, ends: np.ndarray, n: int) -> int:
    """Characters in n-grams that were met before, none counted twice: after a repeated one, go on behind it."""
    _, ids, counts = np.unique(ngrams, return_inverse=True, return_counts=True)
    candidates = np.flatnonzero(counts[ids] > 1)
    seen: set[int] = set()
    repeated = behind = 0
    for i, ngram in zip(candidates.tolist(), ids[candidates].tolist(), strict=True):
        if i < behind:
            continue
        if ngram in seen:
            repeated += int(ends[i + n] - ends[i])
            behind = i + n
        else:
            seen.add(ngram)
    return repeated
