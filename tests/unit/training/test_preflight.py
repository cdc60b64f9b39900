"""A layout has to fit what is still in force of a run's past, not only what its config says now."""

from collections.abc import Callable
from pathlib import Path

import pytest

from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.data.timeline import Timeline
from llada_train.training.preflight import check_phases


def test_a_batch_size_still_in_force_has_to_fit_the_processes(make_config: Callable[..., Path]) -> None:
    """16 rows a step until a block of 1,024 tokens ends, then 24: three processes can only share the latter."""
    path = make_config(data__block_length=1024, training__micro_batch_size=1)
    past = Timeline(load_config(path)).begun(16)
    config = load_config(path, ["training.global_batch_size=24"], 3)
    timeline = Timeline(config, past, 16)
    assert [phase.global_batch_size for phase in timeline.phases] == [16, 24]
    with pytest.raises(UserError, match=r"from sample 16 on the run has batches of 16 × 32 tokens(.|\n)*give another"):
        check_phases(config, timeline, 16, world_size=3)
    check_phases(config, timeline, timeline.phases[1].first_sample, world_size=3)
    check_phases(config, timeline, 16, world_size=2)
