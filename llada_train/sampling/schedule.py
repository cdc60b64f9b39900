"""How many masks, or which, are committed at each step."""

import math

import torch
from torch import Tensor

from llada_train.objective.keyed import Purpose, position_words, uniform
from llada_train.sampling.options import SamplingOptions, Timesteps


def masked_fractions(steps: int, timesteps: Timesteps) -> list[float]:
    """What is still masked after each of the steps; the last one is 0."""
    if timesteps == "uniform":
        return [(steps - k) / steps for k in range(1, steps + 1)]
    return [math.cos(math.pi / 2 * k / steps) ** 2 for k in range(1, steps)] + [0.0]


def transfer_counts(masks: int, steps: int, options: SamplingOptions) -> list[int]:
    """Tokens to commit at each of the steps of a block of so many masks; their sum is `masks`.

    By the paper ⌊n(1 − s)⌋ are committed once the fraction s is masked (Alg. 5); by the released code n // steps at
    each, and one more at each of the first n % steps.
    """
    if options.rules == "released":
        return [masks // steps + (k < masks % steps) for k in range(steps)]
    if options.timesteps == "uniform":
        after = [masks * k // steps for k in range(steps + 1)]
    else:  # what is an integer but for rounding is one
        after = [0, *(math.floor(masks * (1 - s) + 1e-9) for s in masked_fractions(steps, options.timesteps))]
    return [after[k + 1] - after[k] for k in range(steps)]


def random_steps(masks: int, steps: int, options: SamplingOptions, uniforms: Tensor) -> Tensor:
    """The step, 0 … steps − 1, at which each mask of a block is committed under random remasking: int64 [masks].

    By the paper a mask is still one after the step to s with probability s (Alg. 4: with s/t, having been one at t), so
    it goes at the first step whose s is not above its uniform number. By the released code each step commits its count,
    in random order.
    """
    if options.rules == "released":
        counts = torch.tensor(transfer_counts(masks, steps, options))
        return torch.repeat_interleave(torch.arange(steps), counts)[uniforms.argsort().argsort()]
    left = torch.tensor(masked_fractions(steps, options.timesteps), dtype=torch.float64)
    return (left > uniforms[:, None]).sum(1)


def keyed_uniforms(seed: int, key: int, count: int) -> Tensor:
    """One number in [0, 1) for each of the first `count` positions of the row of this key: fp64 [count]."""
    return torch.from_numpy(uniform(position_words(seed, Purpose.SAMPLING_ORDER, key, count)))
