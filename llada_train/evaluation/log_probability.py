"""Log-probabilities of tokens under a noised row."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llada_train.sampling.denoiser import Denoiser, Query, Read


@dataclass(frozen=True)
class LogProbability(Read):
    """Of one token at each position."""

    tokens: Tensor
    """[N] int64."""

    width = 1

    def __call__(self, logits: Tensor, index: Tensor) -> Tensor:
        nll = F.cross_entropy(logits.float(), self.tokens[index].to(logits.device), reduction="none")
        return -nll[:, None]


def log_probabilities(denoiser: Denoiser, query: Query, clean: Tensor) -> Tensor:
    """log p of the `clean` [B, L] tokens at the wanted positions, 0 elsewhere: fp64 [B, L], nats."""
    found = denoiser(query, LogProbability(clean[query.wanted]))
    return torch.zeros(clean.shape, dtype=torch.float64).masked_scatter(query.wanted, found)
