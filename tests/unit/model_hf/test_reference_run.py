"""Numbers of the released modelling and sampling code, run once on a tiny model with weights given by a formula."""

import math
from itertools import combinations

import pytest
import torch
from reference_model import MASK, formula_model
from torch import Tensor

from llada_train.model.hf.modeling_llada import LLaDAModelLM, mask_tokens
from llada_train.sampling.denoiser import every_position
from llada_train.sampling.options import SamplingOptions
from llada_train.sampling.sampler import generate

IDS = torch.tensor([[3, 1, 15, 7, 0]])


def logits(model: LLaDAModelLM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    ("kv_heads", "a", "c", "position", "expected"),
    [
        (2, 0.5, 0.0, 0, [0.761966, -0.696214, 0.607567, -0.498940]),
        (2, 0.5, 0.0, 4, [-0.417215, 0.354727, -0.280573, 0.197193]),
        (1, 0.5, 0.0, 0, [0.491527, -0.439404]),
        (2, 0.8, 0.011, 0, [1.970465, -1.982294]),
    ],
)
def test_logits(kv_heads: int, a: float, c: float, position: int, expected: list[float]) -> None:
    got = logits(formula_model(kv_heads, a, c), IDS)[0, position, : len(expected)]
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-5, rtol=0)


def test_cross_entropy_of_the_masked_position() -> None:
    log_p = logits(formula_model(kv_heads=2), IDS)[0, 2].log_softmax(-1)
    assert -log_p[5].item() == pytest.approx(3.155875, abs=1e-5)


def test_exact_likelihood_bound() -> None:
    """Paper Eq. 6 without sampling: every subset of the answer, L/l · Σ log p over its l masked tokens."""
    model, ids, answer = formula_model(kv_heads=2), torch.tensor([3, 1, 5, 2, 8]), (2, 3, 4)
    bound = 0.0
    for masked in (1, 2, 3):
        subsets = list(combinations(answer, masked))
        for subset in subsets:
            noised = ids.clone()
            noised[list(subset)] = MASK
            log_p = logits(model, noised[None])[0].log_softmax(-1)
            log_likelihood = sum(log_p[i, ids[i]].item() for i in subset)
            bound += log_likelihood * len(answer) / masked / len(subsets) / len(answer)
    assert bound == pytest.approx(-8.518004, abs=1e-5)


def test_loss_of_labels_is_the_bound_on_average() -> None:
    """The same bound, per token, by 1/p and independent masks; ε moves it by less than 0.001 of itself."""
    model, rows = formula_model(kv_heads=2), 60_000
    ids, labels = torch.tensor([3, 1, 5, 2, 8]).repeat(rows, 1), torch.tensor([-100, -100, 5, 2, 8]).repeat(rows, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        noised, weights = mask_tokens(labels, MASK)
        by_row = masked_loss_rows(model, torch.where(labels == -100, ids, noised), labels, weights)
        error = by_row.std() / math.sqrt(rows)
        torch.manual_seed(0)
        loss = model(ids, labels=labels).loss
    assert loss.item() == pytest.approx(by_row.mean().item(), rel=1e-5)
    assert abs(loss.item() - 8.518004 / 3) < 4 * error < 0.1
    assert set((weights > 0).sum(1).tolist()) == {0, 1, 2, 3} and (weights[:, :2] == 0).all()


def masked_loss_rows(model: LLaDAModelLM, ids: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """[B], by log_softmax and gather: Σ weight · NLL ÷ 3 answer tokens."""
    log_p = model(ids).logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return -(weights * log_p).sum(-1) / 3


@pytest.mark.parametrize(
    ("steps", "block_length", "expected"),
    [(4, 8, [0, 13, 13, 5, 15, 0, 0, 13]), (8, 4, [5, 5, 2, 5, 2, 2, 2, 2])],
)
def test_generate(steps: int, block_length: int, expected: list[int]) -> None:
    """The first one predicts, and so keeps, the mask id 15."""
    model, options = formula_model(2, 0.8, 0.011), SamplingOptions(steps, block_length, rules="released")
    out = generate(every_position(lambda ids: model(ids).logits), torch.tensor([[3, 1]]), 8, options, MASK)
    assert out.tolist() == [[3, 1, *expected]]
