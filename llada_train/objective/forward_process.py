"""The forward process of LLaDA (paper Alg. 1 and 2; GUIDELINES.md of ML-GSAI/LLaDA), keyed by sample index.

For a sequence of length L, u ~ U[0,1) gives the mask probability p = (1 − ε)·u + ε; each token is masked independently
with probability p; the loss is Σ_masked CE / (p·L), averaged over the sequences. Here all of it is a pure function of
(seed, place of the sample in the run's global order): each rank computes the lengths, probabilities and weights of the
whole global batch and the masks of its own rows, and every layout sees the same noise. A row without any mask is legal:
its loss is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from llada_train.config.schema import ObjectiveConfig
from llada_train.objective.keyed import Purpose, position_words, sample_words, uniform


@dataclass(frozen=True)
class Noise:
    """The draw of N consecutive samples."""

    seed: int
    purpose: Purpose  # of the masks
    first_sample: int
    lengths: np.ndarray  # [N] int64, tokens of each row; the rest of it is cut off
    mask_probability: np.ndarray  # [N] float64, p
    loss_weight: np.ndarray  # [N] float64, of the NLL of each masked token; normalised over the N samples

    def mask(self, row: int) -> np.ndarray:
        """Which tokens of row 0 … N−1 are masked: bool [lengths[row]]."""
        sample, length = self.first_sample + row, int(self.lengths[row])
        return uniform(position_words(self.seed, self.purpose, sample, length)) < self.mask_probability[row]


def training_noise(
    seed: int, first_sample: int, global_batch_size: int, sequence_length: int, objective: ObjectiveConfig
) -> Noise:
    """The draw of the global batch that starts at `first_sample`."""
    lengths = _lengths(seed, first_sample, global_batch_size, sequence_length, objective.random_length_probability)
    p = _training_probability(seed, first_sample, global_batch_size, objective)
    return Noise(seed, Purpose.MASK, first_sample, lengths, p, loss_weight(p, lengths, objective.loss_normalization))


def fine_tuning_noise(
    seed: int, first_sample: int, lengths: np.ndarray, learnt: np.ndarray, objective: ObjectiveConfig
) -> Noise:
    """The draw of the global batch of rows of `lengths` [N], of which `learnt` [N] tokens may be masked (Alg. 2).

    A row's `mask` is of all its tokens: whoever asks for it takes the prompt out (GUIDELINES.md: noise over the row,
    then the prompt is restored). The loss is (1/N)·Σ_b (1/L'_b)·Σ_masked CE/p, L' being what is learnt.
    """
    p = _training_probability(seed, first_sample, len(lengths), objective)
    return Noise(seed, Purpose.MASK, first_sample, lengths, p, loss_weight(p, learnt, objective.loss_normalization))


def _training_probability(seed: int, first_sample: int, count: int, objective: ObjectiveConfig) -> np.ndarray:
    if objective.t_sampling == "stratified":
        u = _stratified(seed, first_sample, count)
    else:
        u = uniform(sample_words(seed, Purpose.MASK_PROBABILITY, first_sample, count)[:, 0])
    return mask_probability(u, objective.epsilon)


def validation_noise(
    seed: int, counts: Sequence[int], lengths: npt.ArrayLike, epsilon: float, learnt: np.ndarray | None = None
) -> Noise:
    """The draw of all validation rows, `counts` of each corpus one after another; the same every time.

    The rows have `lengths` [N] tokens, or a number for all, of which `learnt` [N] may be masked (none: all). Those of a
    corpus have u on a grid of their own, (i + ½)/count, permuted by key, so that the bound of each corpus is over all
    of t. N = Σ counts.
    """
    words = sample_words(seed, Purpose.VALIDATION_STRATUM, 0, sum(counts))[:, 0]
    borders = np.cumsum(counts)[:-1]
    strata = [(np.argsort(part, kind="stable") + 0.5) / max(1, len(part)) for part in np.split(words, borders)]
    p = mask_probability(np.concatenate(strata), epsilon)
    lengths = np.broadcast_to(lengths, len(words))
    weight = loss_weight(p, lengths if learnt is None else learnt, "sequence")
    return Noise(seed, Purpose.VALIDATION_MASK, 0, lengths, p, weight)


def mask_probability(u: np.ndarray, epsilon: float) -> np.ndarray:
    """p = (1 − ε)·u + ε, in [ε, 1] for u in [0, 1] (GUIDELINES.md, `forward_process`)."""
    return (1 - epsilon) * u + epsilon


def loss_weight(p: np.ndarray, lengths: np.ndarray, normalization: Literal["sequence", "token"]) -> np.ndarray:
    """Weight of each masked token's NLL, by row, over the N rows of a global batch: float64 [N].

    sequence: 1/(p_b·L_b·N), so that every sequence counts alike (paper Alg. 1, Eq. 3); token: 1/(p_b·Σ_b L_b).
    """
    tokens = lengths.sum() if normalization == "token" else lengths * len(lengths)
    return 1 / (p * tokens)


def _stratified(seed: int, first_sample: int, count: int) -> np.ndarray:
    """u_i = (π(i) + o) / count: one sample in each of `count` equal strata, each marginal U[0,1): float64 [count].

    The permutation π and the offset o are the global batch's own. (Low-variance sampling of t: Kingma et al.,
    "Variational diffusion models", 2021, there without a permutation.)
    """
    words = sample_words(seed, Purpose.STRATUM, first_sample, count)
    return (np.argsort(words[:, 0], kind="stable") + uniform(words[0, 1])) / count


def _lengths(seed: int, first_sample: int, count: int, sequence_length: int, cut_probability: float) -> np.ndarray:
    """Tokens of each sample, int64 [count]: with `cut_probability` U{1..sequence_length}, else all (GUIDELINES.md).

    The authors' code cuts the whole batch of a device; here each sequence is cut by itself, so that shapes never change
    and the noise does not depend on the layout.
    """
    words = sample_words(seed, Purpose.LENGTH, first_sample, count)
    cut = 1 + (uniform(words[:, 1]) * sequence_length).astype(np.int64)
    return np.where(uniform(words[:, 0]) < cut_probability, cut, sequence_length)
