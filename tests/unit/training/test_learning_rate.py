from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_train.config.load import load_config
from llada_train.config.schema import LearningRatePhase
from llada_train.training.learning_rate import learning_rate

PAPER = Path("configs/pretrain/llada_8b.yaml")
STEP = 1280 * 4096  # the paper's tokens in one step


@pytest.fixture(scope="module")
def paper() -> list[LearningRatePhase]:
    return load_config(Path(__file__).parents[3] / PAPER).optimizer.learning_rate


@pytest.mark.parametrize(
    ("steps_before", "expected"),
    [
        (0, 4e-4 / 2000),  # "linearly increased from 0 to 4e-4 over the first 2,000 iterations": never an idle step
        (999, 2e-4),
        (1999, 4e-4),
        (2000, 4e-4),
        (100_000, 4e-4),
        (int(1.2e12 // STEP) - 1, 4e-4),  # the last whole step within 1.2T tokens
        (int(1.2e12 // STEP), 1e-4),  # the step that passes 1.2T
        (300_000, 1e-4),
        (int(2.0e12 // STEP) - 1, 1e-4),
        (int(2.3e12 // STEP), 1e-5),  # the step that the run's end was rounded up to
    ],
)
def test_paper_schedule(paper: list[LearningRatePhase], steps_before: int, expected: float) -> None:
    assert learning_rate(paper, steps_before * STEP, STEP) == pytest.approx(expected, rel=1e-12)


def test_paper_decay_is_linear_over_the_last_300_billion_tokens(paper: list[LearningRatePhase]) -> None:
    half = int(2.15e12)
    assert learning_rate(paper, half - STEP, STEP) == pytest.approx(5.5e-5, rel=1e-12)


@given(st.integers(1, 100), st.integers(0, 300))
def test_equals_interpolation_where_nothing_jumps(tokens_per_step: int, step: int) -> None:
    ends, rates = [700, 5_000, 9_000], [3e-4, 3e-4, 0.0]
    phases = [LearningRatePhase(until_tokens=t, end=r) for t, r in zip(ends, rates, strict=True)]
    expected = np.interp((step + 1) * tokens_per_step, [0, *ends], [0.0, *rates])
    assert learning_rate(phases, step * tokens_per_step, tokens_per_step) == pytest.approx(float(expected), abs=1e-15)


def test_start_makes_a_jump_right_after_the_phase_before() -> None:
    phases = [
        LearningRatePhase(until_tokens=100, start=1.0, end=1.0),
        LearningRatePhase(until_tokens=200, start=0.5, end=0),
    ]
    assert [learning_rate(phases, t, 10) for t in (0, 90, 100, 190, 500)] == pytest.approx([1.0, 1.0, 0.45, 0.0, 0.0])
