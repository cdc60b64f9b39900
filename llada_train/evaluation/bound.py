"""The variational bound of a masked diffusion model on held-out text (paper Eq. 4)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llada_train.evaluation.log_probability import log_probabilities
from llada_train.objective.forward_process import Noise
from llada_train.sampling.denoiser import Denoiser, Query


@dataclass(frozen=True)
class Bound:
    """An estimate of an upper bound on the negative log-likelihood, in nats per token."""

    mean: float
    standard_error: float
    """As if the rows' noise were independent; t is spread evenly, so the true one is smaller."""
    rows: np.ndarray
    """The estimate of each row, [M]."""


@torch.no_grad()
def variational_bound(
    denoiser: Denoiser,
    rows: np.ndarray,
    noise: Noise,
    mask_id: int,
    document_lengths: Callable[[np.ndarray], Sequence[int]] = lambda row: (len(row),),
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bound:
    """Mean over the rows of Σ_masked −ln p(token | noised row) / (p·S), p the row's mask probability.

    Args:
        rows: clean token ids [M, S].
        noise: of the M rows, such as validation's: the same every time, p spread evenly over [ε, 1].
        document_lengths: clean tokens of a row [S] → the lengths of the pieces that are given to the model one by one;
            by default a row is one piece.
        on_progress: gets (rows done, M).

    Raises:
        ValueError: there are no rows.
    """
    M, S = rows.shape
    if not M:
        raise ValueError("no rows to measure the bound on")
    estimates: list[Tensor] = []
    for start in range(0, M, batch_size):
        stop = min(start + batch_size, M)
        clean = torch.from_numpy(rows[start:stop].astype(np.int64))
        masked = torch.from_numpy(np.stack([noise.mask(row) for row in range(start, stop)]))
        noised = clean.masked_fill(masked, mask_id)
        pieces = [tuple(document_lengths(row)) for row in rows[start:stop]]
        if all(len(row) == 1 for row in pieces):
            nll = _nll(denoiser, noised, clean, masked)
        else:
            rows_alone = zip(noised, clean, masked, pieces, strict=True)
            nll = torch.stack([_nll_of_pieces(denoiser, *row) for row in rows_alone])
        estimates.append(nll / torch.from_numpy(noise.mask_probability[start:stop] * S))
        on_progress(stop, M)
    values = torch.cat(estimates)
    spread = values.std().item() if M > 1 else math.inf
    return Bound(values.mean().item(), spread / math.sqrt(M), values.numpy())


def _nll_of_pieces(
    denoiser: Denoiser, noised: Tensor, clean: Tensor, masked: Tensor, lengths: tuple[int, ...]
) -> Tensor:
    """The sum over one row's masked tokens [S], each piece of it by itself: fp64, a scalar."""
    parts = zip(*(tensor.unsqueeze(0).split(lengths, dim=1) for tensor in (noised, clean, masked)), strict=True)
    found = [_nll(denoiser, part, tokens, at) for part, tokens, at in parts if at.any()]
    return torch.cat(found or [torch.zeros(1)]).sum()


def _nll(denoiser: Denoiser, noised: Tensor, clean: Tensor, masked: Tensor) -> Tensor:
    """The sum over each row's masked tokens, fp64 [B]."""
    return -log_probabilities(denoiser, Query(noised, masked), clean).sum(1)
