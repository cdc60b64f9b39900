import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from llada_train.evaluation.bound import variational_bound
from llada_train.objective.forward_process import Noise, validation_noise
from llada_train.sampling.denoiser import every_position

V, S, MASK = 3, 4, 3


def noise(seed: int, rows: np.ndarray) -> Noise:
    return validation_noise(seed, [len(rows)], rows.shape[1], epsilon=1e-3)


def test_uniform_logits_cost_ln_v() -> None:
    rows = np.random.default_rng(0).integers(0, 50, (2000, 32))
    bound = variational_bound(
        every_position(lambda ids: torch.zeros(*ids.shape, 50)), rows, noise(1, rows), 50, batch_size=250
    )
    assert bound.mean == pytest.approx(math.log(50), abs=4 * bound.standard_error)
    assert bound.standard_error < 0.05


@pytest.mark.parametrize("seed", [1, 2])
def test_exact_conditionals_of_a_markov_chain_give_its_entropy(seed: int) -> None:
    """The bound is tight for the true model: E[1/t · Σ_masked −ln p(x_i | x_t)] is then the entropy."""
    start = np.array([0.5, 0.3, 0.2])
    transition = np.array([[0.8, 0.1, 0.1], [0.2, 0.2, 0.6], [0.3, 0.4, 0.3]])
    rows = np.array(list(product(range(V), repeat=S)))
    joint = start[rows[:, 0]] * transition[rows[:, :-1], rows[:, 1:]].prod(1)
    entropy = -(joint * np.log(joint)).sum() / S
    all_rows, p = torch.from_numpy(rows), torch.from_numpy(joint)
    one_hot = torch.nn.functional.one_hot(all_rows, V).double()

    def logits(ids: Tensor) -> Tensor:
        fits = ((ids[:, None] == MASK) | (ids[:, None] == all_rows)).all(-1) * p  # [B, V^S]
        return torch.einsum("bn,nsv->bsv", fits / fits.sum(1, keepdim=True), one_hot).log()

    held_out = rows[np.random.default_rng(seed).choice(len(rows), 20_000, p=joint)]
    bound = variational_bound(every_position(logits), held_out, noise(seed, held_out), MASK, batch_size=2_000)
    assert bound.mean == pytest.approx(entropy, abs=3 * bound.standard_error)
    assert bound.standard_error < 0.02 * entropy

    wrong = variational_bound(
        every_position(lambda ids: logits(ids) / 2), held_out, noise(seed, held_out), MASK, batch_size=2_000
    )
    assert wrong.mean > entropy + 3 * wrong.standard_error


def test_only_the_noised_row_is_shown_and_batches_change_nothing() -> None:
    rows = np.random.default_rng(0).integers(0, V, (10, 8))
    seen: list[Tensor] = []
    progress: list[tuple[int, int]] = []

    @every_position
    def model(ids: Tensor) -> Tensor:
        seen.append(ids)
        return torch.stack([ids.double().sin() * v for v in range(V)], dim=-1)

    one = variational_bound(
        model, rows, noise(7, rows), MASK, batch_size=4, on_progress=lambda *step: progress.append(step)
    )
    shown = torch.cat(seen).numpy()
    masked = shown == MASK
    assert masked.any() and not masked.all() and (shown[~masked] == rows[~masked]).all()
    assert progress == [(4, 10), (8, 10), (10, 10)]
    two = variational_bound(model, rows, noise(7, rows), MASK, batch_size=10)
    assert one.mean == pytest.approx(two.mean, rel=1e-12)


def test_documents_are_given_to_the_model_one_by_one() -> None:
    """A model that tells how many tokens it is shown: rows in pieces of 1, 2 and 3 tokens, each ending in token 2."""
    rows = np.array([[2, 0, 2, 1, 0, 2]] * 400)
    shown: set[int] = set()

    @every_position
    def model(ids: Tensor) -> Tensor:
        shown.add(ids.shape[1])
        return torch.zeros(*ids.shape, V).index_fill(-1, torch.tensor([0]), float(ids.shape[1]))

    def lengths(row: np.ndarray) -> list[int]:
        return np.diff([0, *np.flatnonzero(row == 2) + 1]).tolist()

    bound = variational_bound(model, rows, noise(3, rows), MASK, lengths)
    assert shown == {1, 2, 3}
    costs = {n: math.log(math.exp(n) + 2) for n in (1, 2, 3)}  # of a token; n less, if it is token 0
    expected = (costs[1] + 2 * costs[2] - 2 + 3 * costs[3] - 3) / 6
    assert bound.mean == pytest.approx(expected, abs=4 * bound.standard_error)
    assert bound.standard_error < 0.1


def test_no_rows() -> None:
    empty = np.empty((0, 4), np.int64)
    with pytest.raises(ValueError, match="no rows"):
        variational_bound(every_position(lambda ids: ids), empty, noise(0, empty), MASK)
