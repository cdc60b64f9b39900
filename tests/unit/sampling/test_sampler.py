from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from llada_train.config.errors import UserError
from llada_train.sampling.sampler import SamplingOptions, generate, infill, transfer_counts

V, MASK = 7, 3
TABLE = torch.randn(12, V, generator=torch.Generator().manual_seed(1))  # logits by position


def by_position(ids: Tensor) -> Tensor:
    return TABLE[: ids.shape[1]].expand(len(ids), -1, -1)


class Recorder:
    """A model that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []

    def __call__(self, ids: Tensor) -> Tensor:
        self.asked.append(ids.clone())
        return by_position(ids)


def no_mask(logits: Tensor) -> Tensor:
    return logits.index_fill(-1, torch.tensor([MASK]), -torch.inf)


def test_transfers_of_the_released_code() -> None:
    counts = transfer_counts(torch.tensor([10, 4, 2, 0]), 4)
    assert counts.tolist() == [[3, 3, 2, 2], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]


@given(
    ids=st.lists(st.lists(st.integers(0, V - 1), min_size=9, max_size=9), min_size=1, max_size=3),
    steps=st.integers(1, 5),
    temperature=st.sampled_from([0.0, 1.0]),
    remasking=st.sampled_from(["low_confidence", "random"]),
)
@settings(deadline=None, max_examples=60)
def test_masks_anywhere_are_filled_and_nothing_else_changes(
    ids: list[list[int]], steps: int, temperature: float, remasking: str
) -> None:
    given_ids = torch.tensor(ids)
    before = given_ids.clone()
    out = infill(by_position, given_ids, SamplingOptions(steps, None, temperature, remasking), MASK)
    assert torch.equal(given_ids, before)
    assert torch.equal(out[before != MASK], before[before != MASK])
    assert not (out == MASK).any()


def test_greedy_takes_the_most_probable_token_but_never_the_mask() -> None:
    table = TABLE.clone()
    table[:, MASK] = 100
    out = infill(lambda ids: table[None, :5], torch.full((1, 5), MASK), SamplingOptions(2), MASK)
    assert torch.equal(out[0], no_mask(TABLE[:5]).argmax(-1))


def test_the_most_confident_predictions_are_committed_first() -> None:
    model = Recorder()
    infill(model, torch.full((1, 8), MASK), SamplingOptions(steps=8), MASK)
    order = [
        int(((a == MASK) & (b != MASK)).nonzero()[0, 1]) for a, b in zip(model.asked, model.asked[1:], strict=False)
    ]
    confidence = no_mask(TABLE[:8]).softmax(-1).amax(-1)
    assert order == confidence.argsort(descending=True).tolist()[:7]


def test_confidence_ignores_the_temperature() -> None:
    """It is the probability of the drawn token under the model itself (generate.py)."""
    flat, sharp = torch.zeros(V), torch.eye(V)[0] * 30
    model_logits = torch.stack([flat, sharp])[None]
    asked: list[Tensor] = []

    def model(ids: Tensor) -> Tensor:
        asked.append(ids.clone())
        return model_logits

    infill(model, torch.full((1, 2), MASK), SamplingOptions(steps=2, temperature=5.0), MASK)
    assert asked[1][0, 0] == MASK and asked[1][0, 1] == 0


def test_blocks_go_from_left_to_right_from_the_first_generated_position() -> None:
    model = Recorder()
    out = generate(model, torch.tensor([[1, 2]]), 6, SamplingOptions(steps=3, block_length=2), MASK)
    assert [(ids == MASK).nonzero()[:, 1].tolist() for ids in model.asked] == [[2, 3, 4, 5, 6, 7], [4, 5, 6, 7], [6, 7]]
    assert out.shape == (1, 8) and out[0, :2].tolist() == [1, 2]


def test_rows_with_different_numbers_of_masks_do_not_disturb_each_other() -> None:
    ids = torch.tensor([[3, 1, 3, 3, 3, 0], [3, 1, 2, 4, 5, 3], [0, 1, 2, 4, 5, 6]])
    options = SamplingOptions(steps=4, block_length=2)
    together = infill(by_position, ids, options, MASK)
    for row, out in zip(ids, together, strict=True):
        assert torch.equal(infill(by_position, row[None], SamplingOptions(4), MASK)[0], out)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature: float) -> None:
    n = 20_000
    options = SamplingOptions(steps=1, temperature=temperature, seed=7)
    out = infill(by_position, torch.full((n, 1), MASK), options, MASK)
    expected = n * (no_mask(TABLE[0].double()) / temperature).softmax(-1)
    keep = np.arange(V) != MASK
    counts = np.bincount(out[:, 0].numpy(), minlength=V)
    assert chisquare(counts[keep], expected.numpy()[keep]).pvalue > 1e-3


def test_exact_conditionals_sample_the_exact_joint() -> None:
    """One token a step, in random order, from p(x_i | the others known) draws from p(x), for any p."""
    joint = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    joint /= joint.sum()
    rows = torch.tensor(list(product((0, 1), repeat=3)))
    mask = 2

    def exact(ids: Tensor) -> Tensor:
        fits = ((ids[:, None] == mask) | (ids[:, None] == rows)).all(-1).double() * joint.flatten()  # [B, 8]
        probability = torch.stack([(fits @ (rows == v).double()) for v in (0, 1)], dim=-1)
        return (probability / fits.sum(1)[:, None, None]).log()

    n = 8_000
    options = SamplingOptions(steps=3, temperature=1.0, remasking="random", seed=5)
    out = infill(exact, torch.full((n, 3), mask), options, mask)
    counts = np.bincount((out @ torch.tensor([4, 2, 1])).numpy(), minlength=8)
    assert chisquare(counts, (n * joint.flatten()).numpy()).pvalue > 1e-3


def test_random_remasking_commits_every_position_equally_often() -> None:
    n, model = 4_000, Recorder()
    infill(model, torch.full((n, 4), MASK), SamplingOptions(steps=4, remasking="random"), MASK)
    first = (model.asked[1] != MASK).sum(0).numpy()
    assert first.sum() == n and chisquare(first).pvalue > 1e-3


def test_the_seed_decides_everything() -> None:
    ids = torch.full((4, 10), MASK)
    a, b, c = (infill(by_position, ids, SamplingOptions(5, temperature=1.0, seed=s), MASK) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_no_more_forward_passes_than_masks() -> None:
    model = Recorder()
    infill(model, torch.tensor([[MASK, 1, MASK, 2]]), SamplingOptions(steps=50), MASK)
    assert len(model.asked) == 2
    model = Recorder()
    ids = torch.tensor([[0, 1, 2]])
    assert torch.equal(infill(model, ids, SamplingOptions(steps=4), MASK), ids) and not model.asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1, "block_length": 0}, "block length is 0"),
        ({"steps": 1, "temperature": -1.0}, "temperature"),
        ({"steps": 1, "temperature": float("nan")}, "temperature"),
        ({"steps": 1, "remasking": "entropy"}, "low_confidence, random"),
        ({"steps": 4, "block_length": 3}, "8 is not a multiple of block length 3"),
        ({"steps": 5, "block_length": 2}, "next larger number is 8"),
    ],
)
def test_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(by_position, torch.tensor([[1]]), 8, SamplingOptions(**options), MASK)


def test_prompt_with_masks_and_no_length() -> None:
    with pytest.raises(UserError, match="infill"):
        generate(by_position, torch.tensor([[1, MASK]]), 8, SamplingOptions(8), MASK)
    with pytest.raises(UserError, match="length is 0"):
        generate(by_position, torch.tensor([[1]]), 0, SamplingOptions(8), MASK)
