"""Counter-based randomness: every draw is a pure function of (seed, purpose, sample index).

Nothing is carried from draw to draw, so a run needs no generator state: any rank can recompute any sample's draws, in
any order, before and after a restart. The generator is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011): key = (seed, purpose), and a counter of four 64-bit words, whose every value gives one block of
four words. They come from numpy's bit generator, whose stream is fixed; numpy's distributions may change.
"""

from enum import IntEnum

import numpy as np

# Counter word 2 tells the two kinds of draw apart, so that they never share a block, whatever their purpose.
_PER_POSITION = 1 << 128


class Purpose(IntEnum):
    """What a draw is for. The numbers are part of every run's noise: never change or reuse one."""

    MASK_PROBABILITY = 1
    STRATUM = 2
    LENGTH = 3
    MASK = 4
    VALIDATION_STRATUM = 5
    VALIDATION_MASK = 6
    ORDER = 7  # of the rows; its counters are those of llada_train.data.order
    RESPONSE = 8  # which one of a dialogue
    SAMPLING_ORDER = 20  # in which masks are committed at random
    SAMPLING_NOISE = 21  # of tokens drawn
    LIKELIHOOD_STRATUM = 22
    LIKELIHOOD_MASK = 23


def sample_words(seed: int, purpose: Purpose, first_sample: int, count: int) -> np.ndarray:
    """One block for each of the samples `first_sample` … `first_sample + count - 1`: uint64 [count, 4].

    Counter words: (sample, 0, 0, 0). Neither number may reach 2⁶⁴.
    """
    return _words(seed, purpose, first_sample, 4 * count).reshape(count, 4)


def position_words(seed: int, purpose: Purpose, sample: int, count: int) -> np.ndarray:
    """One word for each of the first `count` positions of a sample: uint64 [count].

    Counter words: (position // 4, sample, 1, 0).
    """
    return _words(seed, purpose, _PER_POSITION + (sample << 64), count)


def uniform(words: np.ndarray) -> np.ndarray:
    """Words → float64 in [0, 1), a multiple of 2⁻⁵³ each."""
    return (words >> np.uint64(11)) * 2.0**-53


def _words(seed: int, purpose: Purpose, counter: int, count: int) -> np.ndarray:
    # numpy increments the counter before it makes a block.
    return np.random.Philox(key=(purpose << 64) + seed, counter=(counter - 1) % 2**256).random_raw(count)
