"""Samples to rows: nothing lost, nothing too long, hardly more rows than there have to be."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_train.data.packing import first_fit_decreasing

CAPACITY = 24


def fewest(lengths: tuple[int, ...]) -> int:
    """Rows of the best packing, by trying all."""

    @cache
    def least(left: tuple[int, ...], rooms: tuple[int, ...]) -> int:
        if not left:
            return len(rooms)
        first, rest = left[0], left[1:]
        into = [tuple(sorted((*rooms[:i], room - first, *rooms[i + 1 :]))) for i, room in enumerate(rooms)]
        fitting = [after for after, room in zip(into, rooms, strict=True) if room >= first]
        return min(least(rest, after) for after in [*fitting, tuple(sorted((*rooms, CAPACITY - first)))])

    return least(lengths, ())


@given(st.lists(st.integers(1, CAPACITY), max_size=60))
def test_every_sample_comes_once_and_no_row_is_too_long(lengths: list[int]) -> None:
    rows = first_fit_decreasing(lengths, CAPACITY)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    filled = [sum(lengths[sample] for sample in row) for row in rows]
    assert all(0 < tokens <= CAPACITY for tokens in filled)
    assert sum(2 * tokens <= CAPACITY for tokens in filled) <= 1  # two such rows would be one
    assert rows == first_fit_decreasing(list(lengths), CAPACITY)


@given(st.lists(st.integers(1, CAPACITY), max_size=7))
def test_there_are_hardly_more_rows_than_in_the_best_packing(lengths: list[int]) -> None:
    assert 9 * len(first_fit_decreasing(lengths, CAPACITY)) <= 11 * fewest(tuple(lengths)) + 6


def test_by_hand() -> None:
    assert first_fit_decreasing([3, 7, 5, 5, 10, 2], 10) == [[4], [1, 0], [2, 3], [5]]


def test_what_fits_into_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="25 tokens do not fit into a row of 24"):
        first_fit_decreasing([3, 25], CAPACITY)
