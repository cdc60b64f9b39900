import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy

from llada_train.evaluation.baselines import bigram_cross_entropy, bits_per_byte, unigram_entropy

ROWS = arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.integers(0, 4))


def test_unigram_entropy_of_known_frequencies() -> None:
    assert unigram_entropy(np.array([[7, 7, 9, 9], [3, 3, 11, 11]])) == pytest.approx(math.log(4))
    assert unigram_entropy(np.repeat([1, 5, 8], [5, 2, 3])) == pytest.approx(entropy([0.5, 0.2, 0.3]))


@given(training=st.lists(ROWS, max_size=3), held_out=ROWS)
@settings(deadline=None)
def test_bigram_is_the_textbooks(training: list[np.ndarray], held_out: np.ndarray) -> None:
    pairs: Counter = Counter()
    before: Counter = Counter()
    tokens: Counter = Counter()
    for row in (row.tolist() for rows in training for row in rows):
        tokens.update(row)
        before.update(row[:-1])
        pairs.update(pairwise(row))
    nll = 0.0
    for row in held_out.tolist():
        nll -= math.log((tokens[row[0]] + 1) / (tokens.total() + 5))
        nll -= sum(math.log((pairs[a, b] + 1) / (before[a] + 5)) for a, b in pairwise(row))
    assert bigram_cross_entropy(training, held_out, 5) == pytest.approx(nll / held_out.size)


def test_bigram_of_a_markov_source_reaches_its_entropy_rate() -> None:
    rng = np.random.default_rng(0)
    transition = np.array([[0.8, 0.1, 0.1], [0.2, 0.2, 0.6], [0.3, 0.4, 0.3]])
    values, vectors = np.linalg.eig(transition.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary /= stationary.sum()
    rate = sum(p * entropy(row) for p, row in zip(stationary, transition, strict=True))
    n, S = 400, 500
    rows = np.empty((n, S), np.uint16)  # as a corpus stores them
    rows[:, 0] = rng.choice(3, n, p=stationary)
    for i in range(1, S):
        rows[:, i] = (rng.random((n, 1)) > transition[rows[:, i - 1]].cumsum(1)[:, :2]).sum(1)
    exact = (entropy(stationary) + (S - 1) * rate) / S
    assert bigram_cross_entropy([rows[:200], rows[200:300]], rows[300:], 3) == pytest.approx(exact, rel=0.01)
    assert unigram_entropy(rows) == pytest.approx(entropy(stationary), rel=0.01)


def test_bits_per_byte() -> None:
    """A coin toss for each of the bits of 4-byte tokens is 8 bits a byte."""
    assert bits_per_byte(32 * math.log(2), tokens=10, text_bytes=40) == pytest.approx(8)
