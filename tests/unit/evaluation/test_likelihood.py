import math
import re

import numpy as np
import pytest
import torch
from reference_model import MASK, formula_model
from scipy.stats import chisquare

from llada_train.config.errors import UserError
from llada_train.evaluation.likelihood import LogLikelihood, doubts, draws, log_likelihoods, spread
from llada_train.sampling.denoiser import every_position
from llada_train.sampling.plain import PlainDenoiser

MODEL = PlainDenoiser(formula_model(kv_heads=2), 16)
PAIR = ([3, 1], [5, 2, 8])
EXACT = -8.518004  # Eq. 6, by the released code


def test_exact_value() -> None:
    (found,) = log_likelihoods(MODEL, [PAIR], MASK, "exact")
    assert found.value == pytest.approx(EXACT, abs=1e-5) and found.standard_error == 0


@pytest.mark.parametrize("estimator", ["subset", "bernoulli"])
def test_estimators_have_the_exact_value_as_mean_and_know_their_error(estimator: str) -> None:
    (once,) = log_likelihoods(MODEL, [PAIR], MASK, estimator, samples=20_000, batch_size=64)  # type: ignore[arg-type]
    assert abs(once.value - EXACT) < 4 * once.standard_error < 0.5
    many = log_likelihoods(MODEL, [PAIR] * 300, MASK, estimator, samples=16, batch_size=64)  # type: ignore[arg-type]
    values = np.array([one.value for one in many])
    assert values.mean() == pytest.approx(EXACT, abs=4 * values.std() / math.sqrt(300))
    # Told for independent samples: what spreads them evenly makes it smaller. The other's tail is too long for that.
    if estimator == "subset":
        assert 0.3 < values.std() / np.mean([one.standard_error for one in many]) < 1.1


def test_estimates_that_say_little_are_told() -> None:
    few = log_likelihoods(MODEL, [PAIR], MASK, "bernoulli", samples=8)
    message = doubts(few, "bernoulli")
    assert message and re.search(rf"1 of 1 .*{few[0].standard_error:.1f} nats.*estimator=subset", message)
    assert doubts(log_likelihoods(MODEL, [PAIR], MASK, samples=128), "subset") is None


def test_subsets_of_the_released_code() -> None:
    assert spread(5, 4, 2).tolist() == [2, 3, 4, 1]
    assert spread(10, 4, 7).tolist() == [7, 10, 2, 4]
    noise = draws(5, "subset", 5, seed=1, key=3)
    assert sorted(noise.masked.sum(1)) == [1, 2, 3, 4, 5]
    assert (noise.weight * noise.masked.sum(1)) == pytest.approx(1.0)
    each = np.stack([draws(6, "subset", 1, seed=2, key=key).masked[0] for key in range(3_000)])
    assert chisquare(np.bincount(each.sum(1), minlength=7)[1:]).pvalue > 1e-3
    assert chisquare(each.sum(0)).pvalue > 1e-3


def test_chain_rule_is_the_likelihood_from_left_to_right() -> None:
    ids = torch.tensor([[3, 1, MASK, MASK, MASK], [3, 1, 5, MASK, MASK], [3, 1, 5, 2, MASK]])
    with torch.no_grad():
        log_p = formula_model(kv_heads=2)(ids).logits.log_softmax(-1)
    wanted = sum(log_p[i, i + 2, token].item() for i, token in enumerate(PAIR[1]))
    assert log_likelihoods(MODEL, [PAIR], MASK, "chain")[0].value == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("cfg", [0.0, 0.5])
def test_a_result_depends_neither_on_the_batch_nor_on_the_process(cfg: float) -> None:
    pairs = [PAIR, ([4], [1]), ([1, 2, 3, 4, 5], [7, 7]), ([9] * 7, [3, 2, 1, 0])]
    wanted = log_likelihoods(MODEL, pairs, MASK, samples=9, batch_size=1, seed=5, cfg=cfg)
    for batch_size in (4, 64):
        close(log_likelihoods(MODEL, pairs, MASK, samples=9, batch_size=batch_size, seed=5, cfg=cfg), wanted)
    for rank in (0, 1):  # each second pair in another process
        mine = list(range(rank, 4, 2))
        some = log_likelihoods(MODEL, [pairs[i] for i in mine], MASK, samples=9, seed=5, cfg=cfg, keys=mine)
        close(some, [wanted[i] for i in mine])
    other = log_likelihoods(MODEL, pairs, MASK, samples=2, seed=6, cfg=cfg)
    assert other[0].value != pytest.approx(wanted[0].value)


def close(found: list[LogLikelihood], wanted: list[LogLikelihood]) -> None:
    assert [one.value for one in found] == pytest.approx([one.value for one in wanted], abs=1e-4)


def test_guidance_masks_the_prompt() -> None:
    """u + (w + 1)(c − u), by hand, for an answer of one token."""
    with torch.no_grad():
        conditional, unconditional = formula_model(kv_heads=2)(torch.tensor([[3, 1, 15], [15, 15, 15]])).logits[:, 2]
    wanted = (unconditional + 1.5 * (conditional - unconditional)).log_softmax(-1)[5].item()
    (found,) = log_likelihoods(MODEL, [([3, 1], [5])], MASK, cfg=0.5)
    assert found.value == pytest.approx(wanted, abs=1e-5) and found.standard_error == pytest.approx(0, abs=1e-5)


def test_equal_masks_are_computed_once() -> None:
    rows = 0

    def uniform_logits(ids: torch.Tensor) -> torch.Tensor:
        nonlocal rows
        rows += len(ids)
        return torch.zeros(*ids.shape, 16)

    found = log_likelihoods(every_position(uniform_logits), [PAIR], MASK, samples=500)
    assert rows == 7 and found[0].value == pytest.approx(-3 * math.log(16))


def test_mistakes() -> None:
    with pytest.raises(UserError, match="pair 2 is empty"):
        log_likelihoods(MODEL, [PAIR, ([1], [])], MASK)
    with pytest.raises(UserError, match=r"20 tokens has 2\^20 subsets"):
        log_likelihoods(MODEL, [([1], [2] * 20)], MASK, "exact")
    with pytest.raises(UserError, match="0 samples"):
        log_likelihoods(MODEL, [PAIR], MASK, samples=0)
