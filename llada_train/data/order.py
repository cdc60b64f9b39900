"""The run's order of blocks in closed form: block → (corpus, epoch, block). Nothing to build, save or restore."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llada_train.objective.keyed import Purpose

QUANTA = 1 << 18  # weights are multiples of 1/QUANTA
ROUNDS = 8
MAX_SIZE = 1 << 62


def permute(index: npt.ArrayLike, size: int, seed: int, stream: tuple[int, ...]) -> np.ndarray:
    """Where a keyed permutation of range(size) sends each `index`: int64, of index's shape.

    A balanced Feistel network over the least even power of two ≥ size (Luby & Rackoff 1988), walked along its cycle
    until it is back inside range(size) (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"): the domain is
    less than 4 times `size`, so that fewer than 4 steps are expected. Each `seed` and each `stream` (at most 3
    numbers) has its own permutation.

    Raises:
        ValueError: size is not in 1..2^62, or an index is not in range(size).
    """
    return _walk(_feistel, index, size, seed, stream)


def unpermute(index: npt.ArrayLike, size: int, seed: int, stream: tuple[int, ...]) -> np.ndarray:
    """What `permute` sends to each `index`; arguments and errors are the same."""
    return _walk(_feistel_backwards, index, size, seed, stream)


def _walk(
    network: Callable[[np.ndarray, np.uint64, np.ndarray], np.ndarray],
    index: npt.ArrayLike,
    size: int,
    seed: int,
    stream: tuple[int, ...],
) -> np.ndarray:
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size {size} is not in 1..2^62")
    index = np.asarray(index, dtype=np.int64)
    if index.size and (index.min() < 0 or index.max() >= size):
        raise ValueError(f"index {index.min()}..{index.max()} is not in range({size})")
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    round_keys = _round_keys(seed, stream)
    result = network(index.astype(np.uint64).ravel(), half_bits, round_keys)
    while (outside := np.flatnonzero(result >= size)).size:
        result[outside] = network(result[outside], half_bits, round_keys)
    return result.astype(np.int64).reshape(index.shape)


def _round_keys(seed: int, stream: tuple[int, ...]) -> np.ndarray:
    # Philox increments its counter's first word, so the streams' counters never meet.
    counter = [0, *stream, *[0] * (3 - len(stream))]
    return np.random.Philox(key=[seed, Purpose.ORDER], counter=counter).random_raw(ROUNDS)


def _feistel(value: np.ndarray, half_bits: np.uint64, round_keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = value >> half_bits, value & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half_bits) | right


def _feistel_backwards(value: np.ndarray, half_bits: np.uint64, round_keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = value >> half_bits, value & mask
    for key in round_keys[::-1]:
        left, right = right ^ (_mix(left + key) & mask), left
    return (left << half_bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): every output bit depends on every input bit; wraps modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Mixture:
    """Interleaves corpora by weight, without state.

    The weights are rounded to k_c / 2^18, each k_c at least 1 (0 for a weight of 0), and K = Σ k_c blocks make one
    period, in which corpus c comes exactly k_c times, its j-th time at the place (j + ½) / k_c of the period.

    Any prefix of n blocks holds n·w_c blocks of corpus c within ½ + ½·w_c·max(0, C − 2), with w_c = k_c / K and C
    corpora of weight. For at the place x corpus c has come k_c·x + e_c times, |e_c| ≤ ½, and n = K·x + Σ e, so the
    distance is |e_c − w_c·Σ e| ≤ ½·(1 − w_c) + ½·w_c·(C − 1).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """
        Raises:
            ValueError: no weights, all 0, or one that is negative or not finite.
        """
        shares = np.asarray(weights, dtype=np.float64)
        if not np.all(np.isfinite(shares)) or shares.min(initial=0) < 0 or not shares.any():
            raise ValueError(f"weights must be finite, none below and one above 0: {list(weights)}")
        self.counts = np.maximum(shares > 0, np.rint(shares / shares.sum() * QUANTA)).astype(np.int64)  # k_c
        corpus = np.repeat(np.arange(len(self.counts), dtype=np.int32), self.counts)
        rank = np.concatenate([np.arange(count, dtype=np.int32) for count in self.counts])
        # Equal fractions are equal floats, division being correctly rounded: ties go to the earlier corpus everywhere.
        places = np.argsort((rank + 0.5) / self.counts[corpus], kind="stable")
        self._corpus, self._rank = corpus[places], rank[places]

    def locate(self, g: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Blocks g [n] → (the corpus of each, the how-manieth block of that corpus it is), both int64 [n]."""
        period, r = np.divmod(np.asarray(g, dtype=np.int64), len(self._corpus))
        corpus = self._corpus[r].astype(np.int64)
        return corpus, period * self.counts[corpus] + self._rank[r]

    def place(self, corpus: int, n: int) -> int:
        """Where the n-th block of a corpus comes, whose weight is not 0; `locate` the other way."""
        period, rank = divmod(n, int(self.counts[corpus]))
        return period * len(self._corpus) + int(np.flatnonzero(self._corpus == corpus)[rank])

    def counts_before(self, n: int) -> np.ndarray:
        """Blocks of each corpus among the first n: int64 [corpora]."""
        periods, rest = divmod(n, len(self._corpus))
        return periods * self.counts + np.bincount(self._corpus[:rest], minlength=len(self.counts))


class BlockIndex(NamedTuple):
    """Which block of a corpus each block of the run is: int64 arrays of one shape."""

    corpus: np.ndarray
    epoch: np.ndarray
    block: np.ndarray


class Order:
    """The global order of a run's blocks: a mixture of corpora, each in a new order every epoch.

    Where the weights change, each corpus goes on where it was: within one (corpus, epoch) every block comes exactly
    once, whatever the weights.
    """

    def __init__(
        self, blocks_per_corpus: Sequence[int], mixtures: Sequence[tuple[int, Sequence[float]]], seed: int
    ) -> None:
        """`mixtures`: from which block on (the first: 0) which weights hold; shares of the blocks, not of the epochs.

        Raises:
            ValueError: a corpus without blocks, not as many weights as corpora, or mixtures out of order.
        """
        sizes = list(blocks_per_corpus)
        if min(sizes, default=0) < 1 or any(len(weights) != len(sizes) for _, weights in mixtures):
            raise ValueError(f"corpora of {sizes} blocks with weights {[list(weights) for _, weights in mixtures]}")
        starts = [first for first, _ in mixtures]
        if starts[:1] != [0] or sorted(set(starts)) != starts:
            raise ValueError(f"mixtures from blocks {starts}: not in order from 0")
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._starts = np.asarray(starts, dtype=np.int64)
        self._mixtures = [Mixture(weights) for _, weights in mixtures]
        spans = np.diff(self._starts).tolist()
        counts = [mixture.counts_before(span) for mixture, span in zip(self._mixtures, spans, strict=False)]
        self._before = np.cumsum([np.zeros_like(self._sizes), *counts], axis=0)  # [mixtures, corpora]
        self._seed = seed

    def locate(self, blocks: npt.ArrayLike) -> BlockIndex:
        """Blocks of the run [n] → the block that each one is, by (corpus, epoch, block within the corpus)."""
        index = np.asarray(blocks, dtype=np.int64)
        number = np.searchsorted(self._starts, index, side="right") - 1
        corpus, n = np.empty_like(index), np.empty_like(index)
        for m in np.unique(number).tolist():
            here = number == m
            corpus[here], n[here] = self._mixtures[m].locate(index[here] - self._starts[m])
        epoch, place = np.divmod(n + self._before[number, corpus], self._sizes[corpus])
        block = np.empty_like(place)
        for c, e in np.unique(np.stack([corpus, epoch]).reshape(2, -1), axis=1).T.tolist():
            here = (corpus == c) & (epoch == e)
            block[here] = permute(place[here], int(self._sizes[c]), self._seed, (c, e))
        return BlockIndex(corpus, epoch, block)

    def counts_before(self, blocks: int) -> np.ndarray:
        """Blocks of each corpus among the run's first so many: int64 [corpora]."""
        m = int(np.searchsorted(self._starts, blocks, side="right")) - 1
        counts: np.ndarray = self._before[m] + self._mixtures[m].counts_before(blocks - int(self._starts[m]))
        return counts

    def occurrences(self, corpus: int, block: int, before: int) -> Iterator[int]:
        """Where among the run's first `before` blocks a block of a corpus comes; in order, once in an epoch."""
        size = int(self._sizes[corpus])
        until = int(self.counts_before(before)[corpus])
        for epoch in range(-(-until // size)):
            n = epoch * size + int(unpermute(block, size, self._seed, (corpus, epoch)))
            if n < until:
                m = int(np.searchsorted(self._before[:, corpus], n, side="right")) - 1
                within = self._mixtures[m].place(corpus, n - int(self._before[m, corpus]))
                yield int(self._starts[m]) + within
