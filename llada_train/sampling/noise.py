"""Keyed noise, made where the logits are and the same on any device: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).

A generator of torch's would have to be set up for each position, and gives other numbers on a GPU than on a CPU.
"""

import torch
from torch import Tensor

from llada_train.objective.keyed import Purpose, position_words

_STEP = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, the golden ratio's, as int64, whose products wrap as unsigned ones do
_MULTIPLIERS = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def position_seeds(seed: int, key: int, step: int, places: Tensor) -> Tensor:
    """Of the noise at each of the `places` [n], below 2³², of the row of this key at one of its steps: int64 [n]."""
    of_row = int(position_words(seed, Purpose.SAMPLING_NOISE, key, 1).view("int64")[0])
    return _mix((places + (step << 32)).mul_(_STEP).add_(of_row))


def uniforms(seeds: Tensor, count: int) -> Tensor:
    """`count` numbers in (0, 1) for each seed: fp64 [n, count], odd multiples of 2⁻⁵³."""
    counter = torch.arange(1, count + 1, device=seeds.device).mul_(_STEP)
    bits = _shift_right(_mix(counter + seeds[:, None]), 12)
    return bits.double().add_(0.5).mul_(2.0**-52)


def _mix(x: Tensor) -> Tensor:
    """The finaliser, in place: every bit of the input moves every bit of the output."""
    for shift, multiplier in _MULTIPLIERS:
        x.bitwise_xor_(_shift_right(x, shift)).mul_(multiplier)
    return x.bitwise_xor_(_shift_right(x, 31))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """As of unsigned numbers."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
