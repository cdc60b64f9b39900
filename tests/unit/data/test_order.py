import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from llada_train.data.order import QUANTA, Mixture, Order, permute

SEEDS = st.integers(0, 2**63 - 1)
WEIGHTS = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8)


@given(size=st.integers(1, 5000), seed=SEEDS, stream=st.tuples(st.integers(0, 9), st.integers(0, 2**40)))
def test_permute_is_a_bijection(size: int, seed: int, stream: tuple[int, int]) -> None:
    result = permute(np.arange(size), size, seed, stream)
    assert np.array_equal(np.sort(result), np.arange(size))
    i = seed % size
    assert permute(i, size, seed, stream) == result[i]


@given(size=st.integers(2**49, 2**62), seed=SEEDS, data=st.data())
def test_permute_of_huge_sizes(size: int, seed: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=50, unique=True)))
    result = permute(index, size, seed, (0, 0))
    assert result.min() >= 0
    assert result.max() < size
    assert len(np.unique(result)) == len(index)


def test_permute_of_a_huge_size_is_spread_evenly() -> None:
    size = 2**50 + 12_345
    assert kstest(permute(np.arange(4000), size, 0, (0, 0)) / size, "uniform").pvalue > 0.001


@pytest.mark.parametrize("size", [2, 3, 5, 16, 30])
def test_positions_are_uniform_over_seeds(size: int) -> None:
    permutations = np.array([permute(np.arange(size), size, seed, (0, 0)) for seed in range(3000)])
    for element in range(size):
        counts = np.bincount(permutations[:, element], minlength=size)
        assert chisquare(counts).pvalue > 1e-4, element
    if size > 2:  # two elements together: their distance is uniform over 1..size-1
        distance = (permutations[:, 1] - permutations[:, 0]) % size
        assert chisquare(np.bincount(distance, minlength=size)[1:]).pvalue > 1e-4


def test_streams_and_seeds_have_their_own_permutations() -> None:
    keys = [(0, (0, 0)), (1, (0, 0)), (0, (1, 0)), (0, (0, 1)), (0, (1, 1))]
    permutations = [permute(np.arange(1000), 1000, seed, stream) for seed, stream in keys]
    for i in range(len(keys)):
        for j in range(i):
            # Of two independent permutations, about one place agrees (Poisson).
            assert np.count_nonzero(permutations[i] == permutations[j]) < 8


def test_the_order_of_a_run_never_changes() -> None:
    # A new release must go on with the runs of an old one: these numbers are part of every run.
    assert permute(np.arange(8), 10, 1234, (1, 2)).tolist() == [5, 3, 9, 0, 4, 2, 1, 6]
    assert [a.tolist() for a in Order([3, 2], [(0, [2, 1])], 1234).locate(np.arange(8))] == [
        [0, 1, 0, 0, 1, 0, 0, 1],
        [0, 0, 0, 0, 0, 1, 1, 1],
        [0, 1, 2, 1, 0, 0, 1, 0],
    ]


@pytest.mark.parametrize(("index", "size"), [([0], 0), ([0], 2**62 + 1), ([5], 5), ([-1], 5)])
def test_permute_refuses_what_is_out_of_range(index: list[int], size: int) -> None:
    with pytest.raises(ValueError, match=r"is not in"):
        permute(index, size, 0, ())


@given(weights=WEIGHTS)
@settings(max_examples=50)
def test_every_prefix_keeps_to_the_weights(weights: list[float]) -> None:
    mixture = Mixture(weights)
    period = int(mixture.counts.sum())
    corpus, n = mixture.locate(np.arange(period))
    shares = mixture.counts / period
    for c, share in enumerate(shares):
        occurrences = np.cumsum(corpus == c)
        bound = 0.5 + 0.5 * share * max(0, len(weights) - 2)
        assert np.abs(occurrences - share * np.arange(1, period + 1)).max() <= bound + 1e-6
        assert np.array_equal(n[corpus == c], np.arange(mixture.counts[c]))
    asked = np.array(weights) / np.sum(weights)
    assert np.abs(shares - asked).max() <= len(weights) / QUANTA


@given(weights=WEIGHTS, first=st.integers(0, 10**13))
def test_mixture_counts_on_over_periods(weights: list[float], first: int) -> None:
    mixture = Mixture(weights)
    g = np.arange(first, first + 2 * int(mixture.counts.sum()))
    corpus, n = mixture.locate(g)
    for c, count in enumerate(mixture.counts):
        own = n[corpus == c]
        assert len(own) == 2 * count
        assert np.array_equal(own, own[0] + np.arange(2 * count))


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [float("nan")], [float("inf")]])
def test_mixture_refuses_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must be finite"):
        Mixture(weights)


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=1, max_size=4), SEEDS)
def test_every_block_once_per_epoch(sizes_and_weights: list[tuple[int, float]], seed: int) -> None:
    sizes, weights = zip(*sizes_and_weights, strict=True)
    corpus, epoch, block = Order(sizes, [(0, weights)], seed).locate(np.arange(600))
    for c, size in enumerate(sizes):
        for e in range(epoch[corpus == c].max(initial=0)):  # the last epoch may be under way
            assert np.array_equal(np.sort(block[(corpus == c) & (epoch == e)]), np.arange(size))


@given(g=st.lists(st.integers(0, 10**13), min_size=1, max_size=30), seed=SEEDS)
def test_locate_is_one_by_one(g: list[int], seed: int) -> None:
    order = Order([7, 3 * 10**9, 1], [(0, [1, 5, 0.01]), (10**9, [1, 0, 0])], seed)
    together = order.locate(np.array(g))
    for i, block in enumerate(g):
        assert tuple(order.locate(block)) == tuple(part[i] for part in together)


def test_epochs_and_corpora_have_their_own_order() -> None:
    corpus, epoch, block = Order([500, 500], [(0, [1, 1])], 0).locate(np.arange(2000))
    orders = [block[(corpus == c) & (epoch == e)] for c in (0, 1) for e in (0, 1)]
    for i in range(4):
        for j in range(i):
            assert np.count_nonzero(orders[i] == orders[j]) < 8


def test_a_corpus_of_ten_trillion_tokens() -> None:
    blocks = 10**13 // 4096
    order = Order([blocks], [(0, [1.0])], 7)
    located = order.locate(np.array([0, blocks - 1, blocks, 3 * blocks + 5]))
    assert located.epoch.tolist() == [0, 0, 1, 3]
    assert located.block.min() >= 0
    assert located.block.max() < blocks


@pytest.mark.parametrize(
    ("blocks", "mixtures", "message"),
    [
        ([], [(0, [])], "blocks with weights"),
        ([5, 0], [(0, [1, 1])], "blocks with weights"),
        ([5], [(0, [1, 1])], "blocks with weights"),
        ([5], [(1, [1])], "not in order from 0"),
        ([5], [(0, [1]), (3, [1]), (3, [1])], "not in order from 0"),
        ([5], [], "not in order from 0"),
    ],
)
def test_order_refuses(blocks: list[int], mixtures: list[tuple[int, list[float]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Order(blocks, mixtures, 0)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, list[float]]]]:
    """Sizes of corpora, and weights that change, some of them 0."""
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    weights = st.lists(st.one_of(st.just(0.0), st.floats(0.1, 10)), min_size=len(sizes), max_size=len(sizes))
    starts = [0, *sorted(draw(st.sets(st.integers(1, 300), max_size=4)))]
    return sizes, [(start, draw(weights.filter(any))) for start in starts]


@given(mixtures(), SEEDS)
@settings(max_examples=30)
def test_each_corpus_goes_on_where_it_was_when_the_weights_change(
    drawn: tuple[list[int], list[tuple[int, list[float]]]], seed: int
) -> None:
    """Against a walk block by block that only asks each mixture for the next corpus."""
    sizes, changing = drawn
    located = Order(sizes, changing, seed).locate(np.arange(400))
    read = [0] * len(sizes)
    for i, (corpus, epoch, block) in enumerate(zip(*(part.tolist() for part in located), strict=True)):
        start, weights = [mixture for mixture in changing if mixture[0] <= i][-1]
        if i % 20 == 0:  # making a mixture takes milliseconds
            assert corpus == Mixture(weights).locate(i - start)[0]
        assert weights[corpus] > 0
        assert epoch == read[corpus] // sizes[corpus]
        assert block == permute(read[corpus] % sizes[corpus], sizes[corpus], seed, (corpus, epoch))
        read[corpus] += 1


@given(mixtures(), SEEDS)
@settings(max_examples=30)
def test_a_corpus_added_at_the_end_changes_nothing_before_it_is_read(
    drawn: tuple[list[int], list[tuple[int, list[float]]]], seed: int
) -> None:
    sizes, changing = drawn
    added = [(start, [*weights, 0.0]) for start, weights in changing]
    added.append((350, [*changing[-1][1], 1.0]))
    with_it, without = Order([*sizes, 9], added, seed), Order(sizes, changing, seed)
    for a, b in zip(with_it.locate(np.arange(350)), without.locate(np.arange(350)), strict=True):
        assert np.array_equal(a, b)
    later = with_it.locate(np.arange(350, 2000))
    assert np.count_nonzero(later.corpus == len(sizes)) > 0


@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5), n=st.integers(0, 200_000))
@settings(max_examples=30)
def test_blocks_before_a_place_are_counted(weights: list[float], n: int) -> None:
    mixture = Mixture([*weights, 0.0])
    expected = np.bincount(mixture.locate(np.arange(n))[0], minlength=len(weights) + 1)
    assert np.array_equal(mixture.counts_before(n), expected)
    periods = 10**13 // int(mixture.counts.sum())
    assert np.array_equal(
        mixture.counts_before(n + periods * int(mixture.counts.sum())), expected + periods * mixture.counts
    )
