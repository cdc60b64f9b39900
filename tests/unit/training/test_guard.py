"""Which steps are refused, when a run has gone wrong for good, and that a restart changes none of it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_train.checkpoint.manifest import GuardState
from llada_train.config.schema import GuardConfig
from llada_train.training.guard import Guard


def guard(**settings: object) -> Guard:
    return Guard(GuardConfig.model_validate(settings), GuardState())


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.inf), (2.0, math.nan)])
def test_what_is_not_finite_is_refused(loss: float, norm: float) -> None:
    assert not guard().accepts(loss, norm)


def test_a_spike_is_measured_against_the_median_of_the_applied_steps_of_a_full_window() -> None:
    of = guard(spike_factor=3, window_steps=4)
    for norm in (1.0, 1.0, 100.0):
        assert of.accepts(2.0, norm)  # the window is not full yet
        of.applied(norm)
    of.applied(2.0)
    assert of.accepts(2.0, 4.5)  # the median of 1, 1, 2, 100 is 1.5
    assert not of.accepts(2.0, 4.6)
    of.skipped(0)
    assert of.accepts(2.0, 4.5)  # a refused step is no measure
    of.applied(2.0)
    assert of.accepts(2.0, 6.0)  # of 1, 2, 2, 100: the oldest has left
    assert not of.accepts(2.0, 6.1)


def test_any_finite_norm_is_fine_without_a_factor() -> None:
    of = guard(window_steps=1)
    of.applied(1e-3)
    assert of.accepts(2.0, 1e9)


def test_only_skips_in_a_row_are_too_many() -> None:
    of = guard(max_skips=3)
    assert [of.skipped(16), of.skipped(32)] == [False, False]
    of.applied(1.0)
    assert [of.skipped(64), of.skipped(80), of.skipped(96)] == [False, False, True]
    assert (of.state.first_skipped_sample, of.state.skipped_steps) == (64, 5)


def test_going_back_keeps_what_the_checkpoint_knew_and_counts_the_skips() -> None:
    of = guard(max_skips=2)
    of.applied(1.5)
    saved = of.state
    of.skipped(16)
    of.skipped(32)
    skips = of.state.skips_in_a_row
    back = Guard(of.config, saved)
    back.went_back(10, skips)
    assert back.state == GuardState(norms=(1.5,), skipped_steps=2, went_back_to=10)


@given(
    norms=st.lists(st.floats(0) | st.just(math.nan), max_size=30),
    stops=st.sets(st.integers(0, 30)),
    factor=st.floats(1.1, 10),
    window=st.integers(1, 8),
)
def test_a_restart_from_the_saved_state_decides_alike(
    norms: list[float], stops: set[int], factor: float, window: int
) -> None:
    config = GuardConfig(spike_factor=factor, window_steps=window, max_skips=3)
    straight, stopped = Guard(config, GuardState()), Guard(config, GuardState())
    for i, norm in enumerate(norms):
        if i in stops:
            stopped = Guard(config, GuardState.model_validate_json(stopped.state.model_dump_json()))
        decisions = []
        for each in (straight, stopped):
            accepted = each.accepts(2.0, norm)
            decisions.append((accepted, each.applied(norm) if accepted else each.skipped(16 * i)))
        assert decisions[0] == decisions[1]
    assert straight.state == stopped.state
