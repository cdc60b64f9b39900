"""Log-likelihoods of answers given prompts, by Monte Carlo or by enumeration (paper Eq. 4 and 6, App. A.2).

Every draw is keyed by (seed, pair, sample), so that a result depends neither on the batch nor on the process.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llada_train.config.errors import UserError
from llada_train.evaluation.log_probability import log_probabilities
from llada_train.objective.keyed import Purpose, position_words, sample_words, uniform
from llada_train.sampling.denoiser import Denoiser, Query

Estimator = Literal["subset", "bernoulli", "exact", "chain"]
"""subset: l ~ U{1..L}, exactly l of the L answer tokens masked, weight L/l (Eq. 6), l spread evenly as released.
bernoulli: t ~ U(0, 1], each token masked with probability t, weight 1/t (Eq. 4); t spread evenly. Its variance is
large, since few masks at a small t weigh much: for checks, with a thousand samples or more.
exact: Eq. 6 without sampling, over all subsets.
chain: Σ log p(x_i | prompt, x_<i, the later ones masked) (SMDM, 2410.18514): no bound, a likelihood, in L passes."""

LONGEST_EXACT = 16
_SAMPLE_BITS = 20


@dataclass(frozen=True)
class LogLikelihood:
    """Of an answer, in nats."""

    value: float
    standard_error: float
    """As if the samples were independent; they are spread evenly, so the true one is smaller."""


def doubts(scores: Sequence[LogLikelihood], estimator: Estimator) -> str | None:
    """What to tell a user of estimates that say little; None: they are good enough."""
    large = [one.standard_error for one in scores if one.standard_error > max(1.0, 0.1 * abs(one.value))]
    if not large:
        return None
    advice = "take more samples" if estimator == "subset" else "take more samples, or estimator=subset"
    return (
        f"{len(large):,} of {len(scores):,} log-likelihoods have a standard error of more than a nat and a tenth of "
        f"their value (the largest: {max(large):.1f} nats): {advice}"
    )


@dataclass(frozen=True)
class Draws:
    """n ways to mask an answer of L tokens."""

    masked: np.ndarray
    """[n, L] bool."""
    counted: np.ndarray
    """[n, L] bool, masked ones whose log-probability counts."""
    weight: np.ndarray
    """[n]; the estimate is Σ weight · Σ_counted log p."""
    sampled: bool = True


def draws(length: int, estimator: Estimator, samples: int, seed: int, key: int) -> Draws:
    """The noise of one pair.

    Raises:
        UserError: an answer too long to enumerate, or no samples.
    """
    if not 1 <= samples < 1 << _SAMPLE_BITS:
        raise UserError(f"likelihood: {samples} samples; give at least 1, and fewer than {1 << _SAMPLE_BITS:,}")
    if estimator == "exact":
        if length > LONGEST_EXACT:
            raise UserError(
                f"likelihood: an answer of {length} tokens has 2^{length} subsets; enumerate up to {LONGEST_EXACT}, "
                "or estimate"
            )
        masked = np.array([row for row in product((False, True), repeat=length) if any(row)])
        count = masked.sum(1)
        return Draws(masked, masked, 1 / (count * np.array([math.comb(length, int(n)) for n in count])), False)
    if estimator == "chain":
        return Draws(np.triu(np.ones((length, length), bool)), np.eye(length, dtype=bool), np.ones(length), False)
    first = sample_words(seed, Purpose.LIKELIHOOD_STRATUM, key, 1)[0, 0]
    samples_of_key = ((key << _SAMPLE_BITS) + j for j in range(samples))
    noise = np.stack([uniform(position_words(seed, Purpose.LIKELIHOOD_MASK, j, length)) for j in samples_of_key])
    if estimator == "bernoulli":
        t = 1 - (np.arange(samples) + uniform(first)) / samples
        masked = noise < t[:, None]
        return Draws(masked, masked, 1 / (t * samples))
    count = spread(length, samples, 1 + int(uniform(first) * length))
    masked = noise.argsort(1).argsort(1) < count[:, None]
    return Draws(masked, masked, length / (count * samples))


def spread(length: int, samples: int, first: int) -> np.ndarray:
    """Numbers of masks in 1 … length, evenly spread: ((round(first + j·L/b) − 1) mod L) + 1 (get_log_likelihood.py)."""
    return (np.round(first + np.arange(samples) * length / samples).astype(int) - 1) % length + 1


@torch.no_grad()
def log_likelihoods(
    denoiser: Denoiser,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    mask_id: int,
    estimator: Estimator = "subset",
    samples: int = 128,
    seed: int = 0,
    cfg: float = 0.0,
    batch_size: int = 8,
    keys: Sequence[int] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LogLikelihood]:
    """log p(answer | prompt) of each pair of token ids.

    Equal masks of an answer are computed once. With guidance, w = `cfg`, the prompt is masked for the unconditional
    logits.

    Args:
        keys: of the pairs' noise; their places if left out.
        on_progress: gets (pairs done, pairs in all).

    Raises:
        UserError: an answer is empty, or as `draws`.
    """
    for number, (_, answer) in enumerate(pairs):
        if not len(answer):
            raise UserError(f"likelihood: the answer of pair {number + 1} is empty; give a token at least")
    found: dict[int, LogLikelihood] = {}
    of_pair: dict[int, tuple[Draws, np.ndarray, Tensor]] = {}  # its noise, the way of each sample, log p of each way

    def rows() -> Iterator[_Row]:
        for number in sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1])):
            noise = draws(len(pairs[number][1]), estimator, samples, seed, number if keys is None else keys[number])
            ways, way_of = np.unique(np.stack([noise.masked, noise.counted], 1), axis=0, return_inverse=True)
            of_pair[number] = noise, way_of.ravel(), torch.zeros(len(ways), dtype=torch.float64)
            for way, (masked, counted) in enumerate(ways):
                yield _Row(number, way, *pairs[number], masked, counted, is_last=way == len(ways) - 1)

    waiting = rows()
    while batch := list(islice(waiting, batch_size)):
        for row, log_p in zip(batch, _log_p(denoiser, batch, mask_id, cfg), strict=True):
            noise, way_of, sums = of_pair[row.pair]
            sums[row.way] = log_p
            if row.is_last:
                values = noise.weight * sums.numpy()[way_of]
                error = float(values.std(ddof=1)) * math.sqrt(len(values)) if len(values) > 1 else math.inf
                found[row.pair] = LogLikelihood(float(values.sum()), error if noise.sampled else 0.0)
                del of_pair[row.pair]
                on_progress(len(found), len(pairs))
    return [found[number] for number in range(len(pairs))]


@dataclass(frozen=True)
class _Row:
    """One way to mask and count the answer of one pair."""

    pair: int
    way: int
    prompt: Sequence[int]
    answer: Sequence[int]
    masked: np.ndarray
    counted: np.ndarray
    is_last: bool


def _log_p(denoiser: Denoiser, batch: Sequence[_Row], mask_id: int, cfg: float) -> Tensor:
    """The sum over the counted tokens of each row: fp64 [B]. Rows are padded on the right."""
    shape = len(batch), max(len(row.prompt) + len(row.answer) for row in batch)
    ids = torch.zeros(shape, dtype=torch.int64)
    masked, wanted, given, visible = torch.zeros(4, *shape, dtype=torch.bool)
    for i, row in enumerate(batch):
        start, stop = len(row.prompt), len(row.prompt) + len(row.answer)
        ids[i, :stop] = torch.tensor([*row.prompt, *row.answer])
        masked[i, start:stop], wanted[i, start:stop] = map(torch.from_numpy, (row.masked, row.counted))
        given[i, :start] = visible[i, :stop] = True
    noised = ids.masked_fill(masked, mask_id)
    query = Query(noised, wanted, None if visible.all() else visible)
    if cfg:
        query = replace(query, unconditional=noised.masked_fill(given, mask_id), cfg=cfg)
    return log_probabilities(denoiser, query, ids).sum(1)
