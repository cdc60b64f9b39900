from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chisquare
from torch import Tensor

from llada_train.config.errors import UserError
from llada_train.sampling.denoiser import Query, Read, every_position
from llada_train.sampling.noise import position_seeds
from llada_train.sampling.options import SamplingOptions
from llada_train.sampling.predict import Prediction
from llada_train.sampling.sampler import generate, infill
from llada_train.sampling.schedule import keyed_uniforms, masked_fractions, random_steps, transfer_counts

V, MASK = 7, 3
TABLE = torch.randn(12, V, generator=torch.Generator().manual_seed(1))  # logits by position


@every_position
def by_position(ids: Tensor) -> Tensor:
    return TABLE[: ids.shape[1]].expand(len(ids), -1, -1)


class Recorder:
    """A model that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []

    def __call__(self, query: Query, read: Read) -> Tensor:
        self.asked.append(query.ids)
        return by_position(query, read)


def no_mask(logits: Tensor) -> Tensor:
    return logits.index_fill(-1, torch.tensor([MASK]), -torch.inf)


def test_transfers() -> None:
    released = SamplingOptions(rules="released")
    assert [transfer_counts(n, 4, released) for n in (10, 4, 2)] == [[3, 3, 2, 2], [1, 1, 1, 1], [1, 1, 0, 0]]
    paper = SamplingOptions()
    assert [transfer_counts(n, 4, paper) for n in (10, 4, 2)] == [[2, 3, 2, 3], [1, 1, 1, 1], [0, 1, 0, 1]]
    cosine = SamplingOptions(timesteps="cosine")  # t = .9619, .8536, .6913, .5, .3087, .1464, .0381, 0
    assert transfer_counts(100, 8, cosine) == [3, 11, 16, 20, 19, 16, 11, 4]
    assert masked_fractions(8, "cosine") == pytest.approx(
        [0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060, 0], abs=1e-6
    )


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


def test_logits_that_are_no_numbers_give_some_id_and_leave_the_others_alone() -> None:
    """As of a model whose activations overflow: a run's validation is to tell of it."""
    logits, index = torch.randn(3, V, generator=torch.Generator().manual_seed(2)), torch.arange(3)
    read = Prediction(SamplingOptions(temperature=1.0), MASK, position_seeds(0, 0, 0, index))
    sound = read(logits.clone(), index)[:, 0]
    found = read(logits.index_fill(0, torch.tensor([1]), torch.nan), index)[:, 0]
    assert found[[0, 2]].tolist() == sound[[0, 2]].tolist() and found[1] in range(V)


def test_greedy_takes_the_most_probable_token_but_never_the_mask() -> None:
    table = TABLE.clone()
    table[:, MASK] = 100
    out = infill(every_position(lambda ids: table[None, :5]), torch.full((1, 5), MASK), SamplingOptions(2), MASK)
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
        asked.append(ids)
        return model_logits

    infill(every_position(model), torch.full((1, 2), MASK), SamplingOptions(steps=2, temperature=5.0), MASK)
    assert asked[1][0, 0] == MASK and asked[1][0, 1] == 0


def test_blocks_go_from_left_to_right_from_the_first_generated_position() -> None:
    model = Recorder()
    out = generate(model, torch.tensor([[1, 2]]), 6, SamplingOptions(steps=3, block_length=2), MASK)
    assert [(ids == MASK).nonzero()[:, 1].tolist() for ids in model.asked] == [[2, 3, 4, 5, 6, 7], [4, 5, 6, 7], [6, 7]]
    assert out.shape == (1, 8) and out[0, :2].tolist() == [1, 2]


def test_rows_with_different_numbers_of_masks_do_not_disturb_each_other() -> None:
    ids = torch.tensor([[3, 1, 3, 3, 3, 0], [3, 1, 2, 4, 5, 3], [0, 1, 2, 4, 5, 6]])
    options = SamplingOptions(4, block_length=2, temperature=1.0)
    together = infill(by_position, ids, options, MASK)
    for key, (row, out) in enumerate(zip(ids, together, strict=True)):
        assert torch.equal(infill(by_position, row[None], options, MASK, keys=[key])[0], out)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature: float) -> None:
    n = 20_000
    out = infill(
        every_position(lambda ids: TABLE[:1].expand(1, n, -1)),
        torch.full((1, n), MASK),
        SamplingOptions(steps=1, temperature=temperature, seed=7),
        MASK,
    )
    expected = n * (no_mask(TABLE[0].double()) / temperature).softmax(-1)
    keep = np.arange(V) != MASK
    counts = np.bincount(out[0].numpy(), minlength=V)
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

    n = 2_000
    options = SamplingOptions(steps=3, temperature=1.0, remasking="random", rules="released", seed=5)
    out = infill(every_position(exact), torch.full((n, 3), mask), options, mask)
    counts = np.bincount((out @ torch.tensor([4, 2, 1])).numpy(), minlength=8)
    assert chisquare(counts, (n * joint.flatten()).numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("timesteps", "left"), [("uniform", [0.75, 0.5, 0.25, 0]), ("cosine", [0.853553, 0.5, 0.146447, 0])]
)
def test_random_remasking_keeps_a_mask_with_probability_s_over_t(timesteps: Any, left: list[float]) -> None:
    """Alg. 4: each mask by itself, so that those that go at a step are a binomial number."""
    n, options = 2_000, SamplingOptions(steps=4, remasking="random", timesteps=timesteps)
    when = torch.stack([random_steps(8, 4, options, keyed_uniforms(0, key, 8)) for key in range(n)])
    expected = -np.diff([1.0, *left])
    assert chisquare(np.bincount(when.flatten(), minlength=4), 8 * n * expected).pvalue > 1e-3
    first = np.bincount((when == 0).sum(1), minlength=9)
    assert chisquare(*_pooled(first, n * binom.pmf(range(9), 8, expected[0]))).pvalue > 1e-3
    settled: list[int] = []
    infill(by_position, torch.full((1, 8), MASK), options, MASK, on_step=lambda some: settled.append(len(some)))
    assert settled == [count for count in np.bincount(when[0], minlength=4) if count]


def test_random_remasking_of_the_released_code_commits_a_count() -> None:
    n, options = 2_000, SamplingOptions(4, remasking="random", rules="released")
    when = torch.stack([random_steps(4, 4, options, keyed_uniforms(1, key, 4)) for key in range(n)])
    assert (when.sort(dim=1).values == torch.arange(4)).all()
    assert chisquare((when == 0).sum(0)).pvalue > 1e-3


def _pooled(observed: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rare last ones as one."""
    return np.append(observed[:3], observed[3:].sum()), np.append(expected[:3], expected[3:].sum())


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
        ({"cfg": -0.5}, "cfg is -0.5"),
        ({"threshold": 2.0}, "give a probability"),
        ({"threshold": 0.9, "steps": 4}, "leave out the steps"),
        ({"threshold": 0.9, "remasking": "random"}, "needs low_confidence"),
        ({"timesteps": "cosine", "rules": "released"}, "uniform timesteps only"),
        ({"seed": -1}, "seed is -1"),
        ({"cache": "dual"}, "keeps no keys"),
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
