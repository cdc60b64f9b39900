from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_train.objective.keyed import Purpose, position_words, sample_words, uniform


def philox4x64_10(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """One block, straight from the definition (Salmon et al. 2011, §3.3 and Random123's constants)."""
    word = 2**64
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, word)
        high1, low1 = divmod(0xCA5A826395121157 * c2, word)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % word, (k1 + 0xBB67AE8584CAA73B) % word
    return c0, c1, c2, c3


def test_definition_gives_the_published_vectors() -> None:
    # Random123's known answers (kat_vectors).
    zeros = (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)
    ones = (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0)
    assert philox4x64_10((0, 0, 0, 0), (0, 0)) == zeros
    assert philox4x64_10((2**64 - 1,) * 4, (2**64 - 1,) * 2) == ones


@pytest.mark.parametrize("seed", [0, 1234, 2**63 - 1])
@pytest.mark.parametrize("sample", [0, 1, 2**40])
def test_draws_are_philox_of_seed_purpose_and_sample(seed: int, sample: int) -> None:
    key = (seed, Purpose.LENGTH)
    expected = [list(philox4x64_10((g, 0, 0, 0), key)) for g in (sample, sample + 1)]
    assert sample_words(seed, Purpose.LENGTH, sample, 2).tolist() == expected
    row = [word for block in range(3) for word in philox4x64_10((block, sample, 1, 0), key)]
    assert position_words(seed, Purpose.LENGTH, sample, 9).tolist() == row[:9]


@given(first=st.integers(0, 2**62), cuts=st.lists(st.integers(0, 20), max_size=4))
def test_ranges_agree_however_they_are_split(first: int, cuts: list[int]) -> None:
    whole = sample_words(5, Purpose.LENGTH, first, 20)
    edges = [0, *sorted(cuts), 20]
    parts = [sample_words(5, Purpose.LENGTH, first + a, b - a) for a, b in pairwise(edges)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_a_shorter_row_has_the_same_words() -> None:
    assert np.array_equal(position_words(5, Purpose.MASK, 3, 7), position_words(5, Purpose.MASK, 3, 50)[:7])


def test_no_two_draws_share_a_block() -> None:
    words = [sample_words(seed, purpose, 0, 50).ravel() for seed in (0, 1) for purpose in Purpose]
    words += [position_words(seed, p, sample, 32) for seed in (0, 1) for p in Purpose for sample in range(50)]
    together = np.concatenate(words)
    assert len(np.unique(together)) == len(together)


def test_uniform_is_half_open() -> None:
    values = uniform(np.array([0, 2**11 - 1, 2**63, 2**64 - 1], np.uint64))
    assert values.tolist() == [0, 0, 0.5, 1 - 2**-53]
