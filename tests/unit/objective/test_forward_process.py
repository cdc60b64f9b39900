"""The statistical tests have fixed seeds: they hold or fail for good. A p-value below 1e-3 is a failure."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from llada_train.config.schema import ObjectiveConfig
from llada_train.objective.forward_process import Noise, loss_weight, training_noise, validation_noise

SEED = 11
EPSILON = 1e-3


def whole_rows(**settings: object) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate({"random_length_probability": 0, **settings})


def u_of(noise: Noise, epsilon: float = EPSILON) -> np.ndarray:
    return (noise.mask_probability - epsilon) / (1 - epsilon)


def test_u_is_uniform() -> None:
    u = u_of(training_noise(SEED, 0, 20_000, 8, whole_rows()))
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert abs(stats.pearsonr(u[1:], u[:-1]).statistic) < 4 / math.sqrt(
        len(u)
    )  # and one sample says nothing of the next


@pytest.mark.parametrize("t_sampling", ["uniform", "stratified"])
def test_mask_probability_lies_between_epsilon_and_one(t_sampling: str) -> None:
    p = training_noise(SEED, 0, 4096, 8, whole_rows(epsilon=0.3, t_sampling=t_sampling)).mask_probability
    assert 0.3 <= p.min() < 0.301
    assert 0.999 < p.max() <= 1


def test_each_token_is_masked_by_itself_with_probability_p() -> None:
    noise = training_noise(SEED, 0, 4000, 32, whole_rows())
    masks = np.array([noise.mask(i) for i in range(4000)])
    p = noise.mask_probability[:, None]
    standardized = (masks - p) / np.sqrt(p * (1 - p))
    # Every position alike: z² of 32 positions is chi-square.
    z = standardized.sum(axis=0) / math.sqrt(len(masks))
    assert 1e-3 < stats.chi2.sf((z**2).sum(), df=32) < 1 - 1e-3
    # The number of masks of a row is binomial: its randomised probability transform is uniform.
    count, jitter = masks.sum(axis=1), np.random.default_rng(0).random(4000)
    below, up_to = (stats.binom.cdf(count - k, 32, p[:, 0]) for k in (1, 0))
    assert stats.kstest(below + jitter * (up_to - below), "uniform").pvalue > 1e-3
    # No correlation between neighbours in a row, nor between consecutive samples.
    for a, b in ((standardized[:, 1:], standardized[:, :-1]), (standardized[1:], standardized[:-1])):
        assert abs((a * b).mean()) < 4 / math.sqrt(a.size)


def test_samples_and_seeds_have_their_own_masks() -> None:
    def mask(seed: int, sample: int) -> bytes:
        noise = training_noise(seed, 0, 64, 256, whole_rows(epsilon=0.499999, t_sampling="stratified"))
        return noise.mask(sample).tobytes()

    assert len({mask(seed, sample) for seed in (1, 2) for sample in range(64)}) == 128


@given(first=st.integers(0, 2**50), size=st.integers(1, 40))
def test_uniform_noise_depends_on_the_sample_only(first: int, size: int) -> None:
    """The same sample drawn in another global batch: a run may change its batch size."""
    objective = ObjectiveConfig(random_length_probability=0.5)
    a, b = training_noise(SEED, first, 40, 16, objective), training_noise(SEED, first + 40 - size, size, 16, objective)
    assert np.array_equal(a.lengths[-size:], b.lengths)
    assert np.array_equal(a.mask_probability[-size:], b.mask_probability)
    assert np.array_equal(a.mask(39), b.mask(size - 1))


def test_stratified_puts_one_sample_in_each_stratum() -> None:
    u = u_of(training_noise(SEED, 640, 64, 8, whole_rows(t_sampling="stratified")))
    assert sorted(np.floor(u * 64)) == list(range(64))
    offset = u * 64 % 1
    assert np.allclose(offset, offset[0])
    assert np.any(np.diff(u) < 0)


def test_stratified_marginals_are_uniform_and_no_corpus_is_bound_to_a_stratum() -> None:
    steps = [training_noise(SEED, 12 * s, 12, 8, whole_rows(t_sampling="stratified")) for s in range(3000)]
    u = np.array([u_of(noise) for noise in steps])
    for place in range(12):
        assert stats.kstest(u[:, place], "uniform").pvalue > 1e-3
    stratum, corpus = np.floor(u * 12).astype(int), np.broadcast_to(np.arange(12) % 3, u.shape)
    table = np.zeros((3, 12))
    np.add.at(table, (corpus, stratum), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_one_percent_of_the_sequences_is_cut_to_a_uniform_length() -> None:
    lengths = training_noise(SEED, 0, 200_000, 16, ObjectiveConfig()).lengths
    assert stats.binomtest(int((lengths < 16).sum()), len(lengths), 0.01 * 15 / 16).pvalue > 1e-3
    always = training_noise(SEED, 0, 32_000, 16, ObjectiveConfig(random_length_probability=1)).lengths
    assert stats.chisquare(np.bincount(always, minlength=17)[1:]).pvalue > 1e-3
    assert set(training_noise(SEED, 0, 1000, 16, whole_rows()).lengths) == {16}


def test_normalisations_of_unequal_lengths_by_hand() -> None:
    p, lengths = np.array([0.5, 0.25]), np.array([4, 2])
    assert loss_weight(p, lengths, "sequence").tolist() == [1 / 4, 1]  # 1/(½·4·2), 1/(¼·2·2)
    assert loss_weight(p, lengths, "token").tolist() == [1 / 3, 2 / 3]  # 1/(½·6), 1/(¼·6)


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize("t_sampling", ["uniform", "stratified"])
def test_constant_nll_is_the_expected_loss(normalization: str, t_sampling: str) -> None:
    """NLL ln V at every mask (uniform logits) → expected loss ln V, whatever the lengths: 1/p is unbiased."""
    nll = math.log(126_464)
    objective = ObjectiveConfig.model_validate(
        {"random_length_probability": 0.5, "loss_normalization": normalization, "t_sampling": t_sampling}
    )
    losses = []
    for step in range(600):
        noise = training_noise(SEED, 8 * step, 8, 64, objective)
        losses.append(sum(noise.loss_weight[i] * noise.mask(i).sum() * nll for i in range(8)))
    standard_error = np.std(losses) / math.sqrt(len(losses))
    assert standard_error < 0.03 * nll
    assert abs(np.mean(losses) - nll) < 3 * standard_error


def test_nll_that_depends_on_the_mask_count_gives_the_mean_over_counts() -> None:
    """∫ C(L,m) pᵐ(1−p)ᴸ⁻ᵐ · m·c_m/(p·L) dp = c_m/L (any-order autoregression): with c_m = m the bound is (L + 1)/2."""
    rows, length = 8000, 9
    noise = training_noise(SEED, 0, rows, length, whole_rows(epsilon=1e-9))
    counts = np.array([noise.mask(i).sum() for i in range(rows)])
    losses = noise.loss_weight * rows * counts * counts
    assert abs(losses.mean() - (length + 1) / 2) < 3 * losses.std() / math.sqrt(rows)


def test_rows_without_a_mask_are_not_redrawn() -> None:
    """P(no mask) = ∫ (1−p)ᴸ dp = 1/(L + 1) for ε → 0."""
    noise = training_noise(SEED, 0, 4000, 4, whole_rows(epsilon=1e-9))
    without = sum(not noise.mask(i).any() for i in range(4000))
    assert stats.binomtest(without, 4000, 1 / 5).pvalue > 1e-3


def test_validation_noise_is_a_permuted_grid_of_its_own() -> None:
    noise, again = (validation_noise(SEED, [40], 64, EPSILON) for _ in range(2))
    assert np.array_equal(noise.mask_probability, again.mask_probability)
    assert all(np.array_equal(noise.mask(i), again.mask(i)) for i in range(40))
    u = u_of(noise)
    assert np.allclose(np.sort(u), (np.arange(40) + 0.5) / 40)
    assert np.any(np.diff(u) < 0)
    assert set(noise.lengths) == {64}
    assert np.allclose(noise.loss_weight, 1 / (noise.mask_probability * 64 * 40))
    # The draws are not those of the training samples 0 … 39, which equal p would show.
    training = training_noise(SEED, 0, 40, 64, whole_rows())
    ours, theirs = (replace(n, mask_probability=np.full(40, 0.5)) for n in (noise, training))
    assert not any(np.array_equal(ours.mask(i), theirs.mask(i)) for i in range(40))
