"""Noise against SplitMix64's published stream, and against uniform numbers."""

import numpy as np
import torch
from scipy.stats import kstest

from llada_train.sampling.noise import position_seeds, uniforms

# Of seed 1234567, as in Vigna's splitmix64.c and Rosetta Code.
PUBLISHED = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)


def test_numbers_are_the_published_ones() -> None:
    found = uniforms(torch.tensor([1234567]), 5)[0]
    assert found.tolist() == [((word >> 12) + 0.5) / 2**52 for word in PUBLISHED]


def test_positions_steps_and_rows_have_noise_of_their_own() -> None:
    places = torch.arange(8)
    seeds = torch.cat(
        [position_seeds(seed, key, step, places) for seed in (0, 1) for key in (0, 2**64 - 1) for step in range(4)]
    )
    assert len(seeds.unique()) == len(seeds)
    numbers = uniforms(seeds, 500).numpy()
    assert kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(numbers) - np.eye(len(numbers))).max() < 0.25
    assert torch.equal(position_seeds(0, 0, 1, places[3:5]), seeds[8 + 3 : 8 + 5])
